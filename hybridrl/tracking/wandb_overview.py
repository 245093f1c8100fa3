"""A view of a project in Weights & Biases with the most important metrics.

It is saved once in a project, under a fixed internal name, and never overwritten, so that changes
of users are kept.

    python -m hybridrl.tracking.wandb_overview OWNER/PROJECT
"""

import logging
import re
import sys
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hybridrl.core.plain_text import described
from hybridrl.tracking.console import PHASES
from hybridrl.tracking.glossary import explain
from hybridrl.tracking.wandb_internals import set_view_name, view_exists

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Workspace

PACKAGE = "wandb_workspaces"
MODULE = "hybridrl.tracking.wandb_overview"
NEEDS = (
    "it needs the package wandb-workspaces, which is not installed; pip install "
    "'hybridrl[overview]'"
)
NAME = "hybridrl"
"""The internal name of the view, which is part of its address."""
TITLE = "hybridrl overview"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One diagram over the steps."""

    title: str
    keys: tuple[str, ...]  # as in the glossary, such as eval/<set>/accuracy
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A section of diagrams."""

    title: str
    plots: tuple[Plot, ...]


PARTS = (
    Part(
        title="Evaluation",
        plots=(
            Plot(
                title="Held-out accuracy",
                keys=("eval/accuracy", "eval/<set>/accuracy", "eval/accuracy_source/<name>"),
            ),
            Plot(title="Solved within several tries", keys=("eval/<set>/pass_at_<k>",)),
            Plot(
                title="Loss on given responses",
                keys=("pair/loss", "nll/token", "eval/loss", "eval/<set>/loss"),
            ),
            Plot(
                title="Pairs ranked right",
                keys=("pair/accuracy", "eval/pair_accuracy", "eval/<set>/pair_accuracy"),
            ),
        ),
    ),
    Part(
        title="Reward",
        plots=(
            Plot(title="Training reward", keys=("reward/mean",)),
            Plot(title="Each reward function", keys=("reward/<name>/mean",)),
            Plot(title="Failed reward calls", keys=("reward/error_rate",)),
        ),
    ),
    Part(
        title="Teacher",
        plots=(
            Plot(title="Distance to the teacher", keys=("kl/token", "kl/sampled")),
            Plot(title="Weights of the two goals", keys=("schedule/lambda", "schedule/imitation")),
        ),
    ),
    Part(
        title="Gradient",
        plots=(
            Plot(title="Gradient norm", keys=("train/grad_norm",)),
            Plot(title="Learning rate", keys=("train/lr",)),
            Plot(
                title="Gradient by its parts",
                keys=("grad/dense_norm", "grad/sparse_norm"),
                log=True,
            ),
        ),
    ),
    Part(
        title="Time",
        plots=(
            Plot(
                title="Where the time goes",
                keys=tuple(f"time/{phase}_s" for phase in PHASES),
            ),
            Plot(title="Throughput", keys=("perf/tokens_per_s",)),
            Plot(
                title="Tokens per second of the slowest worker",
                keys=("perf/<workers>/tokens_per_s_min",),
            ),
        ),
    ),
    Part(
        title="Responses",
        plots=(
            Plot(title="Response length", keys=("rollout/length_mean", "rollout/length_p95")),
            Plot(title="Cut-off responses", keys=("rollout/truncated_frac",)),
            Plot(title="Entropy", keys=("entropy/token",)),
        ),
    ),
    Part(
        title="Sampler against learner",
        plots=(
            Plot(title="Importance ratio", keys=("policy/rho_mean", "policy/ess")),
            Plot(
                title="Difference of log-probs",
                keys=("policy/logprob_gap", "policy/probe_gap"),
            ),
            Plot(title="Age of the data", keys=("policy/staleness_mean",)),
        ),
    ),
    Part(
        title="Engines",
        plots=(
            Plot(title="KV cache in use", keys=("engine/<workers>/kv_use",)),
            Plot(
                title="Requests that run and wait",
                keys=("engine/<workers>/running", "engine/<workers>/waiting"),
            ),
            Plot(title="Preemptions", keys=("engine/<workers>/preemptions",)),
            Plot(title="Prefixes found", keys=("engine/<workers>/prefix_hit_rate",)),
        ),
    ),
    Part(
        title="Memory",
        plots=(Plot(title="Largest of each phase", keys=("memory/<workers>/<phase>_bytes",)),),
    ),
)
"""The sections in the order of the report, with the titles of its panels where they are the same.
"""


def overview(entity: str, project: str) -> "Workspace":
    """The view, not yet saved.

    Args:
        entity: the user or team that owns the project.
    """
    from wandb_workspaces.workspaces import Section, Workspace, WorkspaceSettings

    view = Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            Section(name=part.title, panels=[line_plot(plot) for plot in part.plots], is_open=True)
            for part in PARTS
        ],
        settings=WorkspaceSettings(x_axis="train/step"),
    )
    set_view_name(view, NAME)
    return view


def line_plot(plot: Plot) -> "LinePlot":
    """The diagram of one or more metrics. If a key has a placeholder, W&B finds the metrics by a
    regular expression.
    """
    from wandb_workspaces.reports.v2 import LinePlot

    several = any("<" in key for key in plot.keys)
    return LinePlot(
        title=plot.title,
        x="train/step",
        y=[] if several else list(plot.keys),
        metric_regex="^(" + "|".join(map(pattern, plot.keys)) + ")$" if several else None,
        log_y=plot.log or None,
    )


def pattern(key: str) -> str:
    """A regular expression for a key of the glossary."""
    metric = explain(key)
    return metric.pattern if metric and metric.key == key else re.escape(key)


def save_overview(entity: str, project: str) -> str | None:
    """Save the view in a project, unless it has the view already.

    Returns:
        The address of the view; None if the project had it already.

    Raises:
        Exception: of wandb; the server refuses the view or does not answer.
    """
    if view_exists(entity, project, NAME):
        return None
    view = overview(entity, project)
    view.save()
    return view.url


class SavingOverview:
    """Saves the view in a thread, because the server may be slow. A failure is one warning."""

    def __init__(self, entity: str, project: str) -> None:
        self._place = f"{entity}/{project}"
        self._thread: threading.Thread | None = None
        if find_spec(PACKAGE) is None:
            log.warning("tracking.overview=true: %s, or set tracking.overview=false", NEEDS)
            return
        self._thread = threading.Thread(target=self._save, args=(entity, project), daemon=True)
        self._thread.start()

    def wait(self, limit_s: float) -> None:
        """Wait until saving has ended, for at most `limit_s` seconds."""
        if self._thread is None:
            return
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._warn("the server does not answer")

    def _save(self, entity: str, project: str) -> None:
        try:
            save_overview(entity, project)
        except Exception as error:  # the clients have no common base class
            self._warn(described(error))

    def _warn(self, reason: str) -> None:
        log.warning(
            "W&B: the overview was not saved (%s), and the run goes on; `python -m %s %s` saves it "
            "later",
            reason,
            MODULE,
            self._place,
        )


def main(arguments: list[str]) -> None:
    entity, slash, project = arguments[0].partition("/") if len(arguments) == 1 else ("", "", "")
    if not (entity and slash and project):
        sys.exit(f"usage: python -m {MODULE} OWNER/PROJECT")
    if find_spec(PACKAGE) is None:
        sys.exit(f"{MODULE}: {NEEDS}")
    address = save_overview(entity, project)
    print(address or f"{entity}/{project} has the view already")


if __name__ == "__main__":
    main(sys.argv[1:])
