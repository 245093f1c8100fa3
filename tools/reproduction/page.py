"""The page of an experiment, and the summary of all; both are made from runs.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reproduction import lab
from reproduction.estimate import estimate
from reproduction.experiment import Arm, Experiment, Judgement, Run, Runs
from reproduction.records import Records

MARK = "Written by `tools/reproduce`; a test compares it with runs.jsonl."


def judgement(experiment: Experiment, runs: Runs) -> Judgement | None:
    """By the experiment's rule; None: an arm or a seed is not finished."""
    whole = all(len(runs.get(arm.name, ())) == len(experiment.seeds) for arm in experiment.arms)
    return experiment.judge(runs) if whole else None


def page(records: Records) -> str:
    """README.md of the experiment's folder."""
    experiment = records.experiment
    runs = records.latest()
    found = judgement(experiment, runs)
    finished = [run for of in runs.values() for run in of]
    planned = len(experiment.arms) * len(experiment.seeds)
    verdict = f"Not finished: {len(finished)} of {planned} runs."
    if found:
        verdict = f"**{found.verdict}**: {found.effect}. {found.reason}"
    seconds = sum(run.seconds for run in finished)
    machines = ", ".join(sorted({run.machine for run in finished}))
    commits = sorted({run.commit for run in finished})
    of_commits = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    done = {(run.arm, run.seed) for run in finished}
    failed = [run for run in records.read() if run.error and (run.arm, run.seed) not in done]
    trains = any(arm.trains for arm in experiment.arms)
    rates = {rate_of(arm) for arm in experiment.arms if arm.trains}
    numbers = ", ".join(map(str, experiment.seeds))
    seeds = f"Seeds: {numbers}." if len(experiment.seeds) > 1 else ""
    parts = [
        f"# {experiment.id}. {experiment.title}",
        MARK,
        f"**Claim.** {experiment.claim} Source: {experiment.source}.",
        f"**Design.** {experiment.design} {seeds}",
        f"**Limits.** {experiment.cuts}" if experiment.cuts else "",
        f"**Rule.** {experiment.rule}",
        f"**Verdict.** {verdict}",
        f"![{experiment.title}](picture.png)" if found else "",
        table(experiment, runs),
        "Means over the seeds; in brackets the 95 % interval by Student's t, which may pass the "
        "bounds of a share or a cosine; none where all seeds agree."
        if len(experiment.seeds) > 1
        else "Exact numbers: nothing is random.",
        "The seeds vary the training alone. The models that a run begins with and the held-out "
        "problems are the same for each, so the intervals do not cover these."
        if trains
        else "",
        f"The learning rate {' or '.join(sorted(rates))}." if rates else "",
        f"{len(finished)} runs, {seconds:.0f} s together, of {of_commits}, on {machines}."
        if finished
        else "",
        "A commit with a + had changes that were not committed yet." if "+" in of_commits else "",
        f"Failed runs: {', '.join(f'{run.arm}, seed {run.seed}: {run.error}' for run in failed)}."
        if failed
        else "",
        f"```bash\ntools/reproduce {experiment.id}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rate_of(arm: Arm) -> str:
    """How the learning rate of an arm that trains changes over the steps."""
    settings = arm.settings
    if settings.get("experiment", lab.COMMON["experiment"]) != "quickstart":
        return "is constant"
    if settings.get("train.lr_end", 0.0) == settings.get("train.lr"):
        return "rises for 10 steps and is constant then"
    return "rises for 10 steps and then falls to 0 by a cosine"


def table(experiment: Experiment, runs: Runs) -> str:
    head = ["arm", *experiment.columns.values()]
    lines = [head, ["---"] * len(head)]
    for arm, of in runs.items():
        lines.append([arm, *[cell(of, name) for name in experiment.columns]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(runs: Sequence[Run], name: str) -> str:
    """Empty if no run has this number; a whole number from 100 on, as in "91599 [91234, 91963]"."""
    values = [run.numbers[name] for run in runs if name in run.numbers]
    if not values:
        return ""
    found = estimate(values)
    return found.text(digits=0 if abs(found.mean) >= 100 else 3)


def summary(every: Sequence[Records]) -> str:
    """README.md of the folder of all experiments: a row each."""
    rows = [
        "| experiment | claim | verdict | effect | time |",
        "|---|---|---|---|---|",
    ]
    for records in every:
        experiment = records.experiment
        runs = records.latest()
        found = judgement(experiment, runs)
        verdict = f"**{found.verdict}**" if found else "not finished"
        seconds = sum(run.seconds for of in runs.values() for run in of)
        time = f"{seconds / 60:.0f} min" if seconds >= 60 else "< 1 min"
        rows.append(
            f"| [{experiment.id}. {experiment.title}]({experiment.id}/README.md) | "
            f"{experiment.claim} | {verdict} | {found.effect if found else ''} | "
            f"{time if found else ''} |"
        )
    return (
        f"# Are the papers' claims true?\n\n{MARK}\n\n"
        "The claim, the design and the rule of each experiment stand in its file in\n"
        "[tools/reproduction](../reproduction), committed before its first run; a page says where\n"
        "a rule was changed later. The verdict is computed by that rule from the numbers of its\n"
        "runs.jsonl. `undecided` and `refuted` are results. Those that train models go through\n"
        "the whole system, on workers that stay between the runs. Before the first run their time\n"
        "is estimated from a run of five steps, and refused above the budget; the estimate leaves\n"
        "out evaluations and the making of models, so some took longer. Most of their models are\n"
        "tiny: a verdict holds at this scale. Recipes at the papers' own scale have been planned\n"
        "and not run: [conf](../../conf/README.md#recipes-at-the-papers-own-scale-not-run).\n"
        "Not every claim is measured in a paper, e.g. the 30 % of V1: each page names its\n"
        "source. `time` is that of all runs together, on one or two cores.\n\n"
        + "\n".join(rows)
        + "\n\n"
        "```bash\n"
        "tools/reproduce --list      # all experiments, and how many of their runs are finished\n"
        "tools/reproduce V1 A1       # run what is missing of these, then write their pages\n"
        "tools/reproduce all\n"
        "tools/reproduce --pages all # write the pages anew, from the runs that are finished\n"
        "hybridrl report tools/experiments   # all of them as one page, report.html\n"
        "```\n\n"
        "Run `tools/setup` and `source .venv/bin/activate` first. A run is finished if it has a\n"
        "line in the runs.jsonl of its experiment and the code still computes the same in a small\n"
        "run. So in a fresh clone nothing of these is run again: to repeat an experiment, remove\n"
        "its runs.jsonl. A run that a signal stopped is continued by the next call. `--retry`\n"
        "repeats runs that failed, `--smoke` makes a small run of each arm and writes nothing,\n"
        "and `--over-budget` runs an experiment that would take longer than its budget.\n"
    )


def write_page(records: Records) -> None:
    """The page, and the picture if every run is finished."""
    runs = records.latest()
    records.folder.mkdir(parents=True, exist_ok=True)
    (records.folder / "README.md").write_text(page(records))
    if judgement(records.experiment, runs):
        draw(records.experiment, runs, records.folder / "picture.png")


def draw(experiment: Experiment, runs: Runs, path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(f"{experiment.id}. {experiment.title}", loc="left", fontsize=11)
    experiment.draw(axes, runs)
    FigureCanvasAgg(figure).print_figure(path, dpi=110, metadata={"Software": None})
