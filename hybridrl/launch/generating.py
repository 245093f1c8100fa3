"""`hybridrl generate`: the responses of a model to the prompts of a file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hybridrl.controller.answering import Decoding
from hybridrl.data import records
from hybridrl.launch.answer_jobs import AnswerJob, run_jobs
from hybridrl.launch.loadable_model import LoadableModel, find_model, model_parser

FROM_FILE = (
    "~data.sources",
    "data.task=records",
    "data.dataset=null",
    "data.path=unused",
    "data.heldout_path=unused",
)
"""Overrides that replace a run's data by the rows of the file; data.columns names their keys."""


def main(arguments: Sequence[str]) -> int:
    """Run the verb; returns its exit status.

    Raises:
        HybridRLError: as find_model and generate.
    """
    parser = model_parser("generate", "Write the responses of a model to the prompts of a file.")
    parser.add_argument("--prompts", metavar="FILE", required=True, help="rows, as data.path")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON lines")
    given = parser.parse_intermixed_args(arguments)
    model = find_model(
        given.source,
        [*FROM_FILE, *given.overrides],
        step=given.step,
        teacher=given.teacher,
        settings_of=given.settings,
    )
    generate(model, given.prompts, given.out.expanduser())
    return 0


def generate(
    model: LoadableModel, prompts_file: str, out: Path, say: Callable[[str], None] = print
) -> None:
    """Append one row for each prompt to `out`; prompts with a row there are not sampled again.

    Args:
        prompts_file: as data.path.
        say: prints a line.

    Raises:
        ConfigError, DataError: the model, the prompts or `out` cannot be used; nothing was started.
        Preempted: a signal ended the call; the same call continues.
    """
    settings = model.settings
    data = settings.data
    prompts = model.prompts(records.load(prompts_file, "prompt", data.revision, data.columns))
    model.check()
    own = settings.generate.temperature
    decoding = Decoding(
        samples=settings.generate.samples,
        temperature=settings.algorithm.temperature if own is None else own,
        seed=settings.run.seed,
    )
    run_jobs(model, [AnswerJob(name=model.name, prompts=prompts, decoding=decoding, out=out)], say)
    say(f"{len(prompts)} prompts are answered in {out}")
