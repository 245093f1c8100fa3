"""Converts between the student's tokens and those that a teacher reads: its own prompt and its own
end token.

A scorer converts each batch that arrives to the teacher's tokens, and the scores back before it
returns them.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hybridrl.core.errors import ConfigError
from hybridrl.models.end_token import end_token_id
from hybridrl.models.loading import head_rows, load_tokenizer
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.types import Prompt, RolloutBatch, TokenScores, Trajectory

Ids = TypeVar("Ids", NDArray[np.int32], NDArray[np.int64])
Matrix = TypeVar("Matrix", Tensor, NDArray[np.float32] | NDArray[np.uint16])


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTokens:
    """The ids of the tokens with which the student and a teacher end a response; they differ.

    For the teacher, the two ids are exchanged. That only permutes its vocabulary: its probabilities
    still sum to 1, and none becomes 0.

    Example: EndTokens(student=2, teacher=5).exchanged([7, 5, 2]) -> [7, 2, 5]
    """

    student: int
    teacher: int

    def exchanged(self, ids: Ids) -> Ids:
        """A copy of token ids with the two ids exchanged; a second call undoes the first."""
        copy = ids.copy()
        copy[ids == self.student] = self.teacher
        copy[ids == self.teacher] = self.student
        return copy

    def exchange_rows(self, matrix: Matrix) -> None:
        """Exchange the two tokens' rows of a matrix [V, ...], in place."""
        matrix[[self.student, self.teacher]] = matrix[[self.teacher, self.student]]


def end_tokens(settings: RunSettings, teacher: str) -> EndTokens | None:
    """The two end tokens; None: the teacher has the student's end token.

    Raises:
        ConfigError: teachers.NAME.eos or model.eos is no special token, the student has no end
            token, or the teacher's end token has no row in the student's output embedding.
    """
    eos = settings.teachers[teacher].eos
    if eos is None:
        return None
    model = settings.model
    tokenizer = load_tokenizer(model.path, model.revision, eos=model.eos)
    setting = f"teachers.{teacher}.eos"
    own = end_token_id(eos, tokenizer, setting)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{setting}={eos}: model.path={model.path} has no end token with which it could be "
            "exchanged; set model.eos"
        )
    if own >= (rows := head_rows(model.path, model.revision)):
        raise ConfigError(
            f"{setting}={eos}: has id {own}, but the output embedding of model.path={model.path} "
            f"has only {rows} rows; name another token"
        )
    if own == tokenizer.eos_token_id:
        return None
    return EndTokens(student=tokenizer.eos_token_id, teacher=own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The conversion between the student's tokens and what one teacher reads."""

    teacher: str
    ends: EndTokens | None  # None: the teacher has the student's end token

    @classmethod
    def of(cls, settings: RunSettings, teacher: str) -> "Context":
        """The context of a teacher in a run.

        Raises:
            ConfigError: as end_tokens.
        """
        return cls(teacher=teacher, ends=end_tokens(settings, teacher))

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens as the teacher reads them."""
        return prompt.teacher_prompts.get(self.teacher, prompt.input_ids)

    def exchanged(self, ids: Ids) -> Ids:
        """A response's token ids converted from the student's to the teacher's, or back."""
        return ids if self.ends is None else self.ends.exchanged(ids)

    def read(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch as the teacher reads it: the same response tokens in the same order, each after
        the teacher's prompt, with the teacher's end token.

        End tokens in prompts and observations are not exchanged: they may end a turn there.
        """
        own = [prompts.get(self.teacher) for prompts in batch.teacher_prompts]
        if self.ends is None and not any(own):
            return batch
        prompts = [
            Prompt(
                uid=uid,
                input_ids=own[g] or tuple(batch.trajectory(g * batch.group_size).prompt_ids),
                text=batch.prompt_texts[g],
                columns=batch.columns[g],
            )
            for g, uid in enumerate(batch.uids)
        ]
        trajectories = [
            self._trajectory(batch.trajectory(i), prompts[i // batch.group_size])
            for i in range(batch.num_sequences)
        ]
        return RolloutBatch.pack(prompts, batch.group_size, trajectories, batch.source)

    def answer(
        self, scores: TokenScores, read: RolloutBatch, batch: RolloutBatch, evidence: Evidence
    ) -> TokenScores:
        """The scores converted back to the student's tokens.

        Args:
            scores: of `read`; their rows are changed in place.
            read: the batch as the method `read` returned it.
            batch: the batch before it was converted.
        """
        if read is batch:
            return scores
        logprobs = np.zeros(len(batch.input_ids), scores.logprobs.dtype)
        logprobs[batch.response_mask] = scores.logprobs[read.response_mask]
        if self.ends is not None and evidence.covers_vocabulary:
            self.ends.exchange_rows(scores.rows.T)  # a view: no copy of [R, V] numbers is made
        return replace(scores, logprobs=logprobs, support_ids=self.exchanged(scores.support_ids))

    def _trajectory(self, part: Trajectory, prompt: Prompt) -> Trajectory:
        """A response of the student after the teacher's prompt."""
        length = len(prompt.input_ids)
        response = np.where(
            part.response_mask[part.prompt_length :],
            self.exchanged(part.response_ids),
            part.response_ids,
        )
        nothing = np.zeros(length, np.float32)
        return replace(
            part,
            prompt_length=length,
            input_ids=np.concatenate([prompt.input_ids, response]).astype(np.int32),
            response_mask=np.concatenate(
                [nothing.astype(np.bool_), part.response_mask[part.prompt_length :]]
            ),
            rollout_logprobs=np.concatenate([nothing, part.rollout_logprobs[part.prompt_length :]]),
            policy_versions=np.concatenate(
                [nothing.astype(np.int32), part.policy_versions[part.prompt_length :]]
            ),
            support_ids=self.exchanged(part.support_ids),
        )
