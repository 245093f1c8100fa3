"""Tokenizes problems to prompts, and the cursor that goes over the prompts in several epochs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import DataError
from hybridrl.data.chat import ChatTemplate
from hybridrl.data.conversation import check_template_settings, conversation
from hybridrl.data.problem import Problem
from hybridrl.data.responses import response_ids
from hybridrl.data.tokens import encode, has_unknown
from hybridrl.settings.run import DataConfig
from hybridrl.types import Prompt

log = logging.getLogger(__name__)


def tokenize(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    max_prompt_tokens: int,
    max_tokens: int | None = None,
    *,
    responses: bool = True,
    eos: int | None = None,
    teachers: Mapping[str, ChatTemplate] | None = None,
) -> list[Prompt]:
    """The tokens of each problem and its responses, special tokens included.

    A problem with too many tokens is an error; with data.drop_too_long it is dropped, and the
    number of dropped problems is logged. The uids are those of the problems.

    Args:
        max_prompt_tokens: rollout.max_model_len - rollout.max_new_tokens.
        max_tokens: limit of a prompt with one of its responses, rollout.max_model_len; None: no
            limit.
        responses: whether the run uses the given responses; otherwise they are ignored and need not
            be usable.
        eos: the id of model.eos, which ends every response; None: it is not set.
        teachers: the chat templates by which teachers read the prompts, by their names; None: they
            read the student's tokens.

    Raises:
        ConfigError: a setting of the chat template has no effect, or contradicts a row.
        DataError: a prompt is empty, a prompt or response is too long, the tokenizer lacks a
            character, or the chat template is missing, refuses a row or omits a part of it; the
            message names the row. Or no row remains.
    """
    check_template_settings(config, problems)
    template = ChatTemplate.of(tokenizer, config)
    prompts = []
    for problem in problems:
        answers = problem.responses if responses else ()
        try:
            prompt = _prompt(
                problem, answers, tokenizer, config, template, max_prompt_tokens, max_tokens, eos
            )
            if teachers:
                prompt = _with_teacher_prompts(
                    prompt, problem, config, teachers, max_prompt_tokens, max_tokens
                )
        except TooLong:
            if not config.drop_too_long:
                raise
        else:
            prompts.append(prompt)
    _warn_of_unclosed_tags(template)
    _report_dropped(len(problems) - len(prompts), len(problems))
    return prompts


class TooLong(DataError):
    """A row has more tokens than fit; data.drop_too_long drops such rows."""


class PromptSource:
    """A cursor over prompts in a permutation per epoch, which depends only on (seed, epoch, name).

    Example: with three prompts, next_batch(2) twice gives "b@0" "a@0", then "c@0" "a@1": a batch
    may span two epochs.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, name: str = "") -> None:
        """
        Args:
            seed: run.seed.
            name: the source's name in data.sources; empty: there is a single source.

        Raises:
            DataError: there are no prompts.
        """
        if not prompts:
            raise DataError("no training prompts" + (f" of data.sources.{name}" if name else ""))
        self.prompts = prompts
        self.seed = seed
        self.name = name
        self.epoch = 0
        self.position = 0
        self.returned: list[Prompt] = []  # prompts of put_back that were not given again yet
        self._order = self._permutation()

    def next_batch(self, n: int) -> list[Prompt]:
        """The next `n` prompts, those that were put back first.

        Their uids end in "@EPOCH" and so are unique in the run.
        """
        batch = self.returned[:n]
        self.returned = self.returned[n:]
        while len(batch) < n:
            if self.position == len(self.prompts):
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            batch.append(_of_epoch(self.prompts[self._order[self.position]], self.epoch))
            self.position += 1
        return batch

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Return prompts that were not trained on; next_batch gives them once more."""
        self.returned += prompts

    def epochs(self) -> dict[str, float]:
        """Empty; see PromptMixture. A single source has no name."""
        return {}

    def state_dict(self, in_flight: Sequence[Prompt] = ()) -> dict[str, Any]:
        """The state of the cursor for a checkpoint.

        Args:
            in_flight: prompts that were given but not yet trained on; a resumed run starts with
                them.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "owed": [p.uid for p in (*in_flight, *self.returned)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that state_dict returned.

        Raises:
            DataError: the state is of a source with other prompts.
        """
        if not 0 <= state["position"] <= len(self.prompts):
            source = f"data.sources.{self.name}" if self.name else "the data"
            raise DataError(
                f"the checkpoint is at prompt {state['position']} of an epoch; {source} has only "
                f"{len(self.prompts)}"
            )
        self.returned = prompts_owed(state["owed"], self.prompts)
        self.epoch = state["epoch"]
        self.position = state["position"]
        self._order = self._permutation()

    def _permutation(self) -> list[int]:
        rng = np.random.default_rng([self.seed, self.epoch, *self.name.encode()])
        return rng.permutation(len(self.prompts)).tolist()


def prompts_owed(uids: Sequence[str], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that were given but not trained on before a checkpoint.

    Args:
        uids: of these prompts, with "@EPOCH" at the end.
        prompts: all prompts of the source.

    Raises:
        DataError: one of them is not among the prompts; the error names it.
    """
    by_uid = {p.uid: p for p in prompts} if uids else {}
    owed = [uid.rpartition("@") for uid in uids]
    if unknown := next((uid for uid, _, _ in owed if uid not in by_uid), None):
        raise DataError(
            f"prompt {unknown}, which was drawn but not trained on before the checkpoint, is no "
            "longer in the data"
        )
    return [_of_epoch(by_uid[uid], int(epoch)) for uid, _, epoch in owed]


def _of_epoch(prompt: Prompt, epoch: int) -> Prompt:
    return replace(prompt, uid=f"{prompt.uid}@{epoch}")


def _prompt(
    problem: Problem,
    answers: Sequence[str | dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    template: ChatTemplate,
    max_prompt_tokens: int,
    max_tokens: int | None,
    eos: int | None,
) -> Prompt:
    row = problem.row
    chat = conversation(problem, config)
    text = chat.prompt_text(template)
    input_ids = encode(text, tokenizer, special_tokens=not chat.templated)
    if len(input_ids) > max_prompt_tokens:
        raise TooLong(
            f"{row}: the prompt has {len(input_ids)} tokens, rollout.max_model_len - "
            f"rollout.max_new_tokens leaves room for {max_prompt_tokens}; shorten it, raise "
            "rollout.max_model_len or set data.drop_too_long=true"
        )
    if has_unknown(input_ids, tokenizer):
        raise DataError(f"{row}: the tokenizer has no token for some character of {text[:80]!r}")
    responses = []
    for answer in answers:
        answer_text = chat.response_text(answer, text, template)
        ids = response_ids(
            answer_text, text, input_ids, tokenizer, row, templated=chat.templated, eos=eos
        )
        responses.append(ids)
    longest = len(input_ids) + max(map(len, responses), default=0)
    if max_tokens is not None and longest > max_tokens:
        raise TooLong(
            f"{row}: prompt and response have {longest} tokens, rollout.max_model_len is "
            f"{max_tokens}; raise it, or set data.drop_too_long=true to leave such rows out"
        )
    return Prompt(
        uid=problem.uid,
        input_ids=tuple(input_ids),
        text=text,
        columns=problem.columns,
        responses=tuple(responses),
        question=readable(chat.messages),
        answer=reference_answer(problem),
    )


def _with_teacher_prompts(
    prompt: Prompt,
    problem: Problem,
    config: DataConfig,
    teachers: Mapping[str, ChatTemplate],
    max_prompt_tokens: int,
    max_tokens: int | None,
) -> Prompt:
    """The prompt with the tokens for teachers that have their own chat template.

    For these teachers a text prompt becomes a user's message, whether or not it does so for the
    student.

    Raises:
        DataError: a template refuses the conversation or omits a part of it, or the tokens do not
            fit.
    """
    chat = conversation(problem, config)
    longest = max(map(len, prompt.responses), default=0)
    prompts = {}
    for name, template in teachers.items():
        text = template.prompt(chat.messages, chat.tools, problem.row)
        ids = encode(text, template.tokenizer, special_tokens=False)
        fits = max_tokens is None or len(ids) + longest <= max_tokens
        if len(ids) > max_prompt_tokens or not fits:
            raise TooLong(
                f"{problem.row}: the prompt that teacher {name} reads by its own chat template has "
                f"{len(ids)} tokens, which with the response do not fit into "
                "rollout.max_model_len; raise it or set data.drop_too_long=true"
            )
        prompts[name] = tuple(ids)
    return replace(prompt, teacher_prompts=prompts)


def _warn_of_unclosed_tags(template: ChatTemplate) -> None:
    """Log how many responses do not close the tag with which the template opens their turn."""
    if not template.unclosed:
        return
    row, tag = template.unclosed[0]
    log.warning(
        "%s opens the assistant's turn with %s, which %d given responses do not close, that of %s "
        "first: the model will learn these responses as text inside the tag; start each response "
        "with the tag and close it, or set data.chat_template_file",
        template.name,
        tag,
        len(template.unclosed),
        row,
    )


def _report_dropped(dropped: int, problems: int) -> None:
    """Log how many of the problems data.drop_too_long has dropped.

    Raises:
        DataError: all problems were dropped.
    """
    if not dropped:
        return
    log.warning("data.drop_too_long: left out %d of %d rows", dropped, problems)
    if dropped == problems:
        raise DataError(
            f"data.drop_too_long: all {problems} rows are too long; raise rollout.max_model_len"
        )


REFERENCE_COLUMNS = ("answer", "solution", "reference", "ground_truth")
"""Columns in which data sets store the right answer; the first that a row has is used."""


def readable(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation as text: the content of a single message, or each message after its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def reference_answer(problem: Problem) -> str | None:
    """The right answer of a problem: a column of REFERENCE_COLUMNS, else the first response; None
    without both.
    """
    for name in REFERENCE_COLUMNS:
        if problem.columns.get(name) is not None:
            return str(problem.columns[name])
    if not problem.responses:
        return None
    response = problem.responses[0]
    return response if isinstance(response, str) else response["content"]
