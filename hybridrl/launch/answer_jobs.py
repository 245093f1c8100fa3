"""Writes a model's answers to several lists of prompts, each list to a file of its own.

The same call continues an interrupted one, and its files then equal those of an uninterrupted call:
each engine samples whole waves, the seed of a response depends on its prompt alone, and a file that
was begun under other conditions is refused.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybridrl.controller.answering import Answer, Answering, Decoding, waves_of
from hybridrl.controller.preemption import Preemption
from hybridrl.core.errors import Preempted
from hybridrl.launch.loadable_model import LoadableModel
from hybridrl.launch.model_engines import ModelEngines, started_engines
from hybridrl.models.loading import resolve
from hybridrl.run_dir.answer_file import AnswerFile, opened, state_folder
from hybridrl.run_dir.contents import digest_of_files
from hybridrl.run_dir.inputs import MODEL_FILES, described
from hybridrl.types import Prompt

NOTICE = (
    b"Ctrl-C: ends within a second, finished answers are retained; press Ctrl-C again to end it at "
    b"once\n"
)
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
"""Settings of an engine on which the bits of a response may depend. The number of engines is not
among them, since each engine samples whole waves.
"""
LINE_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerJob:
    """Prompts to answer, and the file with one row for each."""

    name: str  # shown in the lines about progress
    prompts: Sequence[Prompt]
    decoding: Decoding
    out: Path
    reward: str | None = None
    """The reward function that is called; None: all of them."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """What the rows depend on besides the model, the prompts and the sampling."""


def run_jobs(
    model: LoadableModel,
    jobs: Sequence[AnswerJob],
    say: Callable[[str], None],
    *,
    judged: bool = False,
) -> None:
    """Append the missing rows to the files, one job after the other with the same engines. Then put
    the rows of each file in the order of its prompts.

    Args:
        say: prints a line.
        judged: add the values of the run's reward functions to the rows.

    Raises:
        ConfigError: a file was begun under other conditions; nothing was started.
        Preempted: a signal ended the call; the same call continues.
        HybridRLError: a worker failed.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(opened(job.out, conditions_of(model, job))) for job in jobs]
        for job, file in zip(jobs, files, strict=True):
            say(f"{job.name}: {len(file.done)} of {len(job.prompts)} prompts are in {job.out}")
        if any(len(file.done) < len(job.prompts) for job, file in zip(jobs, files, strict=True)):
            preemption = stack.enter_context(interruptible(jobs, files))
            log_dir = str(state_folder(jobs[0].out).absolute() / "logs")
            engines = stack.enter_context(started_engines(model, log_dir, say, judged=judged))
            stack.enter_context(preemption.listening())  # again: Ray replaces the handlers
            preemption.started()
            for job, file in zip(jobs, files, strict=True):
                write_answers(engines, model, job, file, preemption, say)
        for job, file in zip(jobs, files, strict=True):
            file.put_in_order([prompt.uid for prompt in job.prompts])


@contextmanager
def interruptible(jobs: Sequence[AnswerJob], files: Sequence[AnswerFile]) -> Iterator[Preemption]:
    """Handle stop signals in the block.

    Raises:
        Preempted: a signal arrived; the message counts the prompts that are answered.
    """
    try:
        with Preemption(NOTICE).listening() as preemption:
            yield preemption
    except Preempted as error:
        done = sum(len(file.done) for file in files)
        whole = sum(len(job.prompts) for job in jobs)
        folder = jobs[0].out if len(jobs) == 1 else jobs[0].out.parent
        raise Preempted(f"{error}; {done} of {whole} prompts are in {folder}") from error


def write_answers(
    engines: ModelEngines,
    model: LoadableModel,
    job: AnswerJob,
    file: AnswerFile,
    preemption: Preemption,
    say: Callable[[str], None],
) -> None:
    """Sample the answers that the file lacks, and append each as it finishes.

    Raises:
        Preempted: a signal ended it.
    """
    answering = Answering(
        engines.rollout,
        engines.rewards,
        model.tokenizer(),
        only=job.reward,
        check=preemption.check,
    )
    waves = waves_of(job.prompts, prompts_per_wave(model, job.decoding), file.done)
    began = time.monotonic()
    next_line = began + LINE_EVERY_S
    tokens = 0
    for answers in answering.answers(waves, job.decoding):
        file.append([row_of(answer) for answer in answers])
        tokens += sum(sum(answer.lengths) for answer in answers)
        now = time.monotonic()
        if now >= next_line:
            next_line = now + LINE_EVERY_S
            rate = f"{tokens / (now - began):.0f} tokens/s"
            say(f"{job.name}: {len(file.done)} of {len(job.prompts)} prompts, {rate}")
        preemption.check()


def prompts_per_wave(model: LoadableModel, decoding: Decoding) -> int:
    settings = model.settings
    return settings.generate.prompts_per_wave(settings.rollout.max_num_seqs, decoding.samples)


def row_of(answer: Answer) -> dict[str, Any]:
    """The row of an answer; the reward of a failed call is None."""
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


def conditions_of(model: LoadableModel, job: AnswerJob) -> dict[str, Any]:
    """Everything that the rows depend on, by the names under which messages report it."""
    rollout = asdict(model.settings.rollout)
    prompts = hashlib.sha256()
    for prompt in job.prompts:
        prompts.update(described(prompt, ()).encode())
        prompts.update(repr(prompt.teacher_prompts).encode())
    return {
        "the model's files": digest_of_model(model),
        "the teacher": model.teacher,
        "the prompts": prompts.hexdigest(),
        "model.dtype": model.config.dtype,
        "model.eos": model.config.eos,
        "the number of samples": job.decoding.samples,
        "the temperature": job.decoding.temperature,
        "the seed": job.decoding.seed,
        "generate.wave": prompts_per_wave(model, job.decoding),
        **{f"rollout.{name}": rollout[name] for name in ROLLOUT_CONDITIONS},
        **job.conditions,
    }


def digest_of_model(model: LoadableModel) -> str:
    """The digest of the files that an engine reads."""
    folder = resolve(model.config.path, model.config.revision, setting=model.setting)
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return digest_of_files((str(file.relative_to(folder)), file) for file in files)
