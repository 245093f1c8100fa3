"""`hybridrl generate`: the responses of a model to the prompts of a file."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridrl.controller.answering import Answer, Answering, Decoding, Wave, waves_of
from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import Preempted
from hybridrl.data import records
from hybridrl.launch.loadable_model import LoadableModel, find_model, model_parser
from hybridrl.launch.model_engines import ModelEngines, started_engines
from hybridrl.models.loading import resolve
from hybridrl.run_dir.answer_file import AnswerFile, opened, state_folder
from hybridrl.run_dir.contents import digest_of_files
from hybridrl.run_dir.inputs import MODEL_FILES, described
from hybridrl.runtime.calls import Pending
from hybridrl.types import Prompt

NOTICE = b"Ctrl-C: ends within a second, finished answers are retained; once more ends it at once\n"
ROLLOUT_CONDITIONS = (
    "max_new_tokens",
    "max_model_len",
    "max_num_seqs",
    "kv_cache_bytes",
    "gpu_memory_utilization",
    "tensor_parallel",
    "enforce_eager",
    "engine",
)
"""Settings of an engine on which the bits of a response may depend. The number of engines is none
of them, since each samples whole waves.
"""
LINE_EVERY_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """The verb; returns its exit status.

    Raises:
        HybridRLError: as find_model and generate.
    """
    parser = model_parser("generate", "Write the responses of a model to the prompts of a file.")
    parser.add_argument("settings_given", metavar="KEY=VALUE", nargs="*", help="see conf/SETTINGS")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="rows with a prompt")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON lines")
    parser.add_argument("--settings", metavar="RUN|FILE", help="of a model that is no run")
    given = parser.parse_intermixed_args(arguments)
    model = find_model(
        given.source,
        given.settings_given,
        step=given.step,
        teacher=given.teacher,
        settings_of=given.settings,
    )
    generate(model, given.prompts, given.out.expanduser())
    return 0


def generate(
    model: LoadableModel, prompts_file: str, out: Path, say: Callable[[str], None] = print
) -> None:
    """Append one row for each prompt to `out`; what is there already is not sampled again.

    Args:
        prompts_file: as data.path.
        say: prints a line.

    Raises:
        ConfigError, DataError: the model, the prompts or `out` cannot be used; nothing was started.
        Preempted: a signal ended it; the same call continues.
    """
    data = model.settings.data
    problems = records.load(prompts_file, "prompt", data.revision, data.columns)
    prompts = model.prompts(problems)
    model.check()
    settings = model.settings
    own = settings.generate.temperature
    decoding = Decoding(
        samples=settings.generate.samples,
        temperature=settings.algorithm.temperature if own is None else own,
        seed=settings.run.seed,
    )
    size = settings.generate.prompts_per_wave(settings.rollout.max_num_seqs, decoding.samples)
    with opened(out, conditions_of(model, prompts, decoding, size)) as file:
        waves = waves_of(prompts, size, file.done)
        if waves:
            say(f"{model.name}: {len(file.done)} of {len(prompts)} prompts are in {out}")
            with (
                interruptible(out, lambda: (len(file.done), len(prompts))) as preemption,
                started_engines(model, f"{state_folder(out)}/logs", say, judged=False) as engines,
            ):
                write_answers(engines, model, waves, decoding, file, preemption, len(prompts), say)
        file.put_in_order([prompt.uid for prompt in prompts])
    say(f"{len(prompts)} prompts are in {out}")


@contextmanager
def interruptible(out: Path, counts: Callable[[], tuple[int, int]]) -> Iterator[Preemption]:
    """Handle stop signals in the block.

    Args:
        out: the file of answers.
        counts: returns the numbers of finished and of all prompts.

    Raises:
        Preempted: one arrived; the message says what is done.
    """
    try:
        with Preemption(NOTICE).listening() as preemption:
            yield preemption
    except Preempted as error:
        done, whole = counts()
        raise Preempted(f"{error} with {done} of {whole} prompts in {out}") from error


def write_answers(
    engines: ModelEngines,
    model: LoadableModel,
    waves: Sequence[Wave],
    decoding: Decoding,
    file: AnswerFile,
    preemption: Preemption,
    whole: int,
    say: Callable[[str], None],
) -> None:
    """Sample the waves, and append each answer as it finishes.

    Args:
        whole: the number of prompts, for the lines about the progress.

    Raises:
        Preempted: a signal ended it.
    """

    def watch() -> Pending | None:
        preemption.check()
        return engines.rollout.silent()

    answering = Answering(engines.rollout, engines.rewards, model.tokenizer(), watch)
    with preemption.listening():  # again: Ray replaces the handlers at its start
        preemption.started()
        began = time.monotonic()
        next_line = began + LINE_EVERY_S
        tokens = 0
        for answers in answering.answers(waves, decoding):
            file.append([row_of(answer) for answer in answers])
            tokens += sum(sum(answer.lengths) for answer in answers)
            now = time.monotonic()
            if now >= next_line:
                next_line = now + LINE_EVERY_S
                say(f"{len(file.done)} of {whole} prompts, {tokens / (now - began):.0f} tokens/s")


def row_of(answer: Answer) -> dict[str, Any]:
    """The row of an answer; a reward of a failed call is null."""
    row = {
        "uid": answer.prompt.uid,
        "prompt": answer.prompt.question,
        "responses": answer.responses,
        "finish_reasons": [str(reason) for reason in answer.finish_reasons],
        "lengths": answer.lengths,
        "columns": answer.prompt.columns,
    }
    if answer.rewards:
        row["rewards"] = {
            name: [value if value == value else None for value in values]  # NaN != NaN
            for name, values in answer.rewards.items()
        }
    return row


def conditions_of(
    model: LoadableModel, prompts: Sequence[Prompt], decoding: Decoding, wave: int
) -> dict[str, Any]:
    """Everything that the responses depend on, by the names under which messages report it."""
    rollout = asdict(model.settings.rollout)
    content = hashlib.sha256()
    for prompt in prompts:
        content.update(described(prompt, ()).encode())
        content.update(repr(prompt.teacher_prompts).encode())
    return {
        "the model's files": digest_of_model(model),
        "the teacher": model.teacher,
        "the prompts": content.hexdigest(),
        "model.dtype": model.config.dtype,
        "model.eos": model.config.eos,
        "the number of samples": decoding.samples,
        "the temperature": decoding.temperature,
        "run.seed": decoding.seed,
        "generate.wave": wave,
        **{f"rollout.{name}": rollout[name] for name in ROLLOUT_CONDITIONS},
    }


def digest_of_model(model: LoadableModel) -> str:
    """The digest of the files that an engine reads."""
    folder = resolve(model.config.path, model.config.revision, setting=model.setting)
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return digest_of_files((str(file.relative_to(folder)), file) for file in files)
