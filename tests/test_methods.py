"""Every preset trains the Countdown student for two steps, all of them in one running graph with real workers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from hybridrl.choices import WeightTransfer
from hybridrl.compose import conf_dir, load_config
from hybridrl.config import RunSettings
from hybridrl.controller.checkpoint import Checkpointer
from hybridrl.controller.controller import Controller
from hybridrl.controller.run import prepare_prompts
from hybridrl.data.prompts import PromptSource
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.workers import Workers, place_workers, start_rewards, start_workers
from hybridrl.tracking.sink import Sinks

pytestmark = pytest.mark.graph

PRESETS = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
RESPONSES = {"sft": "solution", "word_kd": "solution", "gkd": "solution"}
RESPONSES |= dict.fromkeys(("dpo", "ipo", "slic", "simpo", "dil_lsif", "dil_ukl", "dil_bce", "reward_model"), "pair")
EVERYTHING = (
    "ppo", "algorithm.teacher_fraction=0.25", "algorithm.data_fraction=0.25", "algorithm.ratio.kind=none", "+teachers.initial.path=null",
    "algorithm.support=full", "+data.options.responses=pair",
)  # fmt: skip
"""What the graph is started for: a value head, a second scorer, the teacher's engine, responses of the data."""


@dataclass
class Methods:
    """The running graph, and settings of any method on it."""

    folder: Path
    workers: Workers | None = None

    def settings(self, preset: str, *overrides: str) -> RunSettings:
        return load_config(
            [
                f"run.dir={self.folder / 'run'}", "experiment=quickstart", f"algorithm={preset}", "train.prompts_per_step=16",
                "train.lr_warmup_steps=0", "train.lr_end=null", "data.num_train=64", "data.num_heldout=16", "eval.every=0",
                "tracking.wandb=disabled", "rollout.max_num_seqs=64", "cluster.threads_per_worker=1", "cluster.device=cpu",
                *([f"+data.options.responses={RESPONSES[preset]}"] if preset in RESPONSES else []), *overrides,
            ]
        )  # fmt: skip

    def controller(self, settings: RunSettings) -> Controller:
        """Those workers that the settings ask for, told of the settings."""
        by_name = {scorer.teacher: scorer for scorer in self.workers.scorers}
        used = replace(self.workers, scorers=[by_name[name] for name in settings.scored_teachers])
        for group in (used.learner, *used.scorers):
            group.configure(settings)
        prompts, heldout = prepare_prompts(settings)
        made = Controller(
            settings,
            workers=used,
            backend=WeightTransfer.object_store,
            prompts=PromptSource(prompts, settings.run.seed),
            heldout=heldout,
            sinks=Sinks(required=[]),
            checkpointer=Checkpointer(self.folder, 2),
        )
        made.publish_weights()
        return made


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Methods]:
    made = Methods(tmp_path_factory.mktemp("methods"))
    everything = (
        "+teachers.initial.path=null",
        "algorithm.data_fraction=0.25",
        "algorithm.topk.source=teacher",
        "algorithm.ratio.kind=none",
    )
    settings = made.settings(*EVERYTHING, *everything, "+data.options.responses=pair")
    with Cluster(settings) as cluster:
        slots, log_dir = place_workers(settings, cluster), str(made.folder / "logs")
        made.workers = start_workers(settings, cluster, slots, start_rewards(settings, slots, log_dir), log_dir)
        yield made


@pytest.mark.parametrize("preset", PRESETS)
def test_each_method_steps_in_the_running_graph(methods: Methods, preset: str):
    controller = methods.controller(methods.settings(preset))
    before = controller.learner.pack_weights(0)[0].digest
    rows = [controller.step() for _ in range(2)]
    for row in rows:
        assert np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0, preset
        assert row["controller/materialized_bytes"] == 0 and row["train/tokens"] > 0
        assert (
            row["policy/logprob_gap"] < 1e-4
            or controller.settings.algorithm.data_fraction
            or controller.settings.algorithm.teacher_fraction
        )
    assert controller.learner.pack_weights(1)[0].digest != before
    assert controller.evaluate()["eval/accuracy"] >= 0
