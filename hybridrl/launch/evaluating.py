"""`hybridrl eval`: a model on the held-out problems and sets of its run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridrl.controller.answering import Decoding
from hybridrl.controller.held_out_set import seed_kind
from hybridrl.controller.pipeline import wave_seed
from hybridrl.controller.set_statistics import SetStatistics, statistics_of, statistics_of_sources
from hybridrl.core.errors import ConfigError
from hybridrl.core.files import replace_text
from hybridrl.data.problem_sources import load_problems
from hybridrl.launch.answer_jobs import AnswerJob, run_jobs
from hybridrl.launch.loadable_model import LoadableModel, find_model, model_parser
from hybridrl.launch.set_prompts import set_problems
from hybridrl.launch.teacher_levels import sha256_of
from hybridrl.rewards.check import check_columns, check_judge, loaded_rewards
from hybridrl.run_dir.answer_file import read_rows
from hybridrl.run_dir.directory import check_no_links
from hybridrl.run_dir.inputs import file_digests
from hybridrl.settings.held_out import HELDOUT
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

EVALS = "evals"
"""The folder with the results, in the run directory."""
COLUMNS = ("set", "problems", "avg@k", "stderr", "pass@k", "k", "tokens", "truncated", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """Problems by which a model is judged, tokenized, and how it answers them."""

    name: str
    prompts: Sequence[Prompt]
    decoding: Decoding
    reward: str | None = None  # the reward function that judges; None: the first one


def main(arguments: Sequence[str]) -> int:
    """Run the verb; returns its exit status.

    Raises:
        HybridRLError: as find_model and evaluate_model.
    """
    parser = model_parser("eval", "Judge a model by the problems and rewards of a run.")
    parser.add_argument("--out", metavar="DIR", type=Path, help="by default evals/ in the run")
    given = parser.parse_intermixed_args(arguments)
    model = find_model(
        given.source,
        [word for word in given.overrides if "=" in word],
        step=given.step,
        teacher=given.teacher,
        settings_of=given.settings,
    )
    names = [word for word in given.overrides if "=" not in word]
    evaluate_model(model, names, given.out)
    return 0


def evaluate_model(
    model: LoadableModel, names: Sequence[str], out: Path | None, say: Callable[[str], None] = print
) -> dict[str, SetStatistics]:
    """Answer the problems of the sets, write their rows and statistics, and print a table.

    Args:
        names: the names of the sets; empty: all sets.
        out: the folder for the rows SET.jsonl and the statistics SET.json of each set; None: a
            folder for the model in the folder `evals` of its run.
        say: prints a line.

    Returns:
        The statistics by the name of the set, and those of each data source by SET/SOURCE.

    Raises:
        ConfigError, DataError: the model, its data or its rewards cannot be used, there is no such
            set, or `out` is missing or has results of other settings; nothing was started.
        Preempted: a signal ended the call; the same call continues.
    """
    folder = folder_of(model, out)
    sets = problem_sets(model, names)
    model.check()
    check_judges(model.settings, sets)
    conditions = judges_of(model.settings)
    jobs = [
        AnswerJob(
            name=problems.name,
            prompts=problems.prompts,
            decoding=problems.decoding,
            out=folder / f"{problems.name}.jsonl",
            reward=problems.reward,
            conditions=conditions | judge_of(problems),
        )
        for problems in sets
    ]
    run_jobs(model, jobs, say, judged=bool(model.settings.reward.functions))
    statistics: dict[str, SetStatistics] = {}
    for job, problems in zip(jobs, sets, strict=True):
        of_set = statistics_of(read_rows(job.out), problems.reward)
        of_sources = statistics_of_sources(read_rows(job.out), problems.reward)
        content = {"model": model.name, "set": job.name, **values_of(of_set)}
        if of_sources:
            content["sources"] = {name: values_of(value) for name, value in of_sources.items()}
        replace_text(folder / f"{job.name}.json", json.dumps(content, indent=1) + "\n")
        statistics[job.name] = of_set
        statistics |= {f"{job.name}/{name}": value for name, value in of_sources.items()}
    for line in table(statistics):
        say(line)
    say(f"rows and statistics of {model.name} are in {folder}")
    return statistics


def folder_of(model: LoadableModel, out: Path | None) -> Path:
    """The folder of the results.

    Raises:
        ConfigError: the model belongs to no run, and `out` is None.
        RunDirectoryError: a part of the run is a link, which a run does not write through.
    """
    if out is not None:
        return out.expanduser()
    if model.run_dir is None:
        raise ConfigError(f"--out: {model.name} belongs to no run; name a folder for the results")
    check_no_links(model.run_dir)
    if model.teacher is not None:
        return model.run_dir / EVALS / f"teacher-{model.teacher}"
    # Exports of one step in several dtypes are different models.
    return model.run_dir / EVALS / Path(model.settings.model.path).name


def problem_sets(model: LoadableModel, names: Sequence[str]) -> list[ProblemSet]:
    """The sets of the settings, as the run evaluates them.

    Args:
        names: the names of the sets; empty: all sets.

    Raises:
        ConfigError: there is no such set; or as load_problems.
        DataError: as load_problems.
    """
    settings = model.settings
    known = [HELDOUT, *settings.eval.sets]
    for i, name in enumerate(names):
        if name not in known:
            raise ConfigError(f"{name}: there is no such set; the settings have {', '.join(known)}")
        if name in names[:i]:
            raise ConfigError(f"{name}: is named twice; name each set once")
    return [problem_set(model, name) for name in names or known]


def problem_set(model: LoadableModel, name: str) -> ProblemSet:
    """One set, by its name; HELDOUT: the held-out problems of data.*.

    Raises:
        ConfigError, DataError: as load_problems and set_problems.
    """
    settings = model.settings
    seed = settings.run.seed
    step = model.step or 0
    if name == HELDOUT:
        _, problems = load_problems(settings.data, seed)
        decoding = Decoding(
            samples=1,
            temperature=0.0 if settings.eval.greedy else settings.algorithm.temperature,
            seed=wave_seed(seed, "eval", step),
        )
        return ProblemSet(name=name, prompts=model.prompts(problems), decoding=decoding)
    held_out = settings.eval.sets[name]
    return ProblemSet(
        name=name,
        prompts=model.prompts(set_problems(settings, name)),
        decoding=Decoding(
            samples=held_out.samples,
            temperature=held_out.temperature_of(
                greedy=settings.eval.greedy, sampled=settings.algorithm.temperature
            ),
            seed=wave_seed(seed, seed_kind(name), step),
        ),
        reward=held_out.reward,
    )


def check_judges(settings: RunSettings, sets: Sequence[ProblemSet]) -> None:
    """Load the reward functions once, and refuse one that needs a column that a set lacks.

    Raises:
        ConfigError: names the function.
    """
    with loaded_rewards(settings.reward, settings.deadlines.start_s) as rewards:
        for problems in sets:
            if rewards is not None:
                key = f"eval.sets.{problems.name}"
                check_judge(key, problems.reward, settings.reward, problems.prompts)
                check_columns(rewards, settings.reward, [], problems.prompts, only=problems.reward)


def judges_of(settings: RunSettings) -> dict[str, Any]:
    """The settings and files on which the rewards depend. The options of a function may contain a
    secret key, so their digest replaces them.
    """
    functions = {
        f"reward.functions.{name}": [
            judge.function,
            sha256_of(repr(judge.options)),
            *([judge.route] if judge.route else []),  # files of earlier versions have none
        ]
        for name, judge in settings.reward.functions.items()
    }
    files = {
        f"the file of {key}": digest
        for key, digest in file_digests(settings).items()
        if key.startswith("reward.")
    }
    return functions | files


def judge_of(problems: ProblemSet) -> dict[str, str]:
    """The function that a set names; empty: it names none. The rows hold the values of no other."""
    if problems.reward is None:
        return {}
    return {f"eval.sets.{problems.name}.reward": problems.reward}


def values_of(statistics: SetStatistics) -> dict[str, Any]:
    """The values that a file of statistics holds."""
    return finite(asdict(statistics) | {"passed": statistics.passed})


def finite(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values with None instead of NaN, in nested mappings too."""
    return {name: _finite(value) for name, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return finite(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def table(statistics: Mapping[str, SetStatistics]) -> list[str]:
    """The lines of a table: the names of the columns, then a row for each set or source.

    Example: the first two cells of a row are "heldout" and "512".
    """
    rows = [COLUMNS]
    for name, of_set in statistics.items():
        rows.append(
            (
                name,
                str(of_set.problems),
                _number(of_set.average),
                _number(of_set.standard_error),
                _number(of_set.passed),
                str(of_set.samples),
                f"{of_set.length:.1f}",
                f"{of_set.truncated:.1%}",
                f"{of_set.failed:.1%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
