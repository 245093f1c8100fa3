"""Every preset trains the Countdown student for two steps. All presets share one running graph of
real workers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from hybridrl.controller.controller import Controller
from hybridrl.controller.preemption import Preemption
from hybridrl.data.prompts import PromptSource
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.launch.set_prompts import held_out_sets
from hybridrl.models.loading import load_value_head
from hybridrl.objectives.advantages import generalised
from hybridrl.run_dir.checkpoint import Checkpointer
from hybridrl.run_dir.ledger import Ledger
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.workers import Workers, place_workers, start_workers
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.compose import conf_dir, load_config
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.sink import Sinks

pytestmark = pytest.mark.graph

PRESETS = sorted(path.stem for path in (conf_dir() / "algorithm").glob("*.yaml"))
RESPONSES = {"sft": "solution", "word_kd": "solution", "gkd": "solution"}
RESPONSES |= dict.fromkeys(
    ("dpo", "ipo", "slic", "simpo", "dil_lsif", "dil_ukl", "dil_bce", "reward_model"), "pair"
)
EVALUATED = {*RESPONSES, "hybrid"}
"""The methods that learn from responses of the data, for which an evaluation also computes a loss,
and one of the other methods, which an evaluation treats all alike.
"""
EVERYTHING = (
    "ppo",
    "algorithm.teacher_fraction=0.25",
    "algorithm.data_fraction=0.25",
    "algorithm.ratio.kind=none",
    "algorithm.gamma=0",
    "algorithm.reward_weight.value=0",
    # A built-in estimator is not called if nothing enters the returns, but a user's one is.
    f"algorithm.advantage={generalised.__file__}:GeneralisedAdvantage",
    "+teachers.initial.path=null",
    "algorithm.support=full",
    "+data.options.responses=pair",
)
"""Settings that start every worker that any method needs: a value head, a second scorer, an engine
of the teacher, and responses of the data.
"""


@dataclass
class Methods:
    """The running graph, and the settings of any method for it."""

    folder: Path
    workers: Workers | None = None

    def settings(self, preset: str, *overrides: str) -> RunSettings:
        return load_config(
            [
                f"run.dir={self.folder / 'run'}",
                "experiment=quickstart",
                f"algorithm={preset}",
                "train.prompts_per_step=16",
                "train.lr_warmup_steps=0",
                "train.lr_end=null",
                "data.num_train=64",
                "data.num_heldout=16",
                "eval.every=0",
                "tracking.wandb=disabled",
                "rollout.max_num_seqs=64",
                "cluster.threads_per_worker=1",
                "cluster.device=cpu",
                *([f"+data.options.responses={RESPONSES[preset]}"] if preset in RESPONSES else []),
                *overrides,
            ]
        )

    def controller(self, settings: RunSettings) -> Controller:
        """A controller with those workers that the settings need, configured with the settings."""
        by_name = {scorer.teacher: scorer for scorer in self.workers.scorers}
        used = replace(
            self.workers, scorers=[by_name[name] for name in settings.teachers_with_scorers]
        )
        for group in (used.learner, *used.scorers):
            group.configure(settings)
        prompts, heldout = prepare_prompts(settings)
        made = Controller(
            settings,
            workers=used,
            backend=WeightTransfer.object_store,
            prompts=PromptSource(prompts, settings.run.seed),
            heldout=heldout,
            inputs={},
            sinks=Sinks(required=[]),
            checkpointer=Checkpointer(self.folder, settings.checkpoint),
            ledger=Ledger(self.folder, 0),
            preemption=Preemption(),
        )
        made.publish_weights()
        return made


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Methods]:
    made = Methods(tmp_path_factory.mktemp("methods"))
    settings = made.settings(*EVERYTHING)
    with Cluster(settings) as cluster:
        slots, log_dir = place_workers(settings, cluster), str(made.folder / "logs")
        made.workers = start_workers(settings, cluster, slots, log_dir)
        yield made


OPTIONS = {
    "the sampler's top 4, the rest sampled": ("algorithm.support=topk", "algorithm.topk.k=4"),
    "the teacher's top 4 and a tail bucket": (
        "algorithm.support=topk",
        "algorithm.topk.k=4",
        "algorithm.topk.source=teacher",
        "algorithm.topk.correction=tail_bucket",
    ),
    "log-probs of the whole vocabulary": ("algorithm.teacher_signal=logits", "algorithm.gamma=0.5"),
    "ratios of whole sequences": (
        "algorithm.ratio.kind=truncate",
        "algorithm.ratio.level=sequence",
        "algorithm.ratio.high=2",
    ),
    "two teachers, one of which scores no prompt": (
        "+teachers.initial={path:null,weight:0.5,route:{domain:elsewhere}}",
    ),
    "one teacher by hidden states, another by its drawn tokens": (
        "+teachers.initial={path:null,weight:0.5,evidence:drawn}",
    ),
    "a weight held by feedback": (
        "algorithm.reward_weight={kind:feedback,value:1.0,end:null,metric:kl/token,"
        "target:0.1,gain:-0.5}",
        "diagnostics.every=1",
    ),
    "the student's own pairs": ("algorithm=dpo", "algorithm.data_fraction=0"),
}


def assert_steps(controller: Controller) -> list[dict[str, float]]:
    before = controller.learner.pack_weights(0)[0].digest
    rows = [controller.step() for _ in range(2)]
    for row in rows:
        assert np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
        assert row["controller/materialized_bytes"] == 0 and row["train/tokens"] > 0
    assert controller.learner.pack_weights(1)[0].digest != before
    return rows


@pytest.mark.parametrize("what", OPTIONS)
def test_each_option_steps_in_the_running_graph(methods: Methods, what: str):
    preset, *overrides = (
        ("dpo", *OPTIONS[what][1:])
        if OPTIONS[what][0] == "algorithm=dpo"
        else ("hybrid", *OPTIONS[what])
    )
    rows = assert_steps(methods.controller(methods.settings(preset, *overrides)))
    if what == "a weight held by feedback":
        # The KL is more than twice its target, so its error counts as 1: 1.0 * (1 + gain * 1).
        assert rows[0]["schedule/lambda"] == 1.0
        assert rows[1]["schedule/lambda"] == pytest.approx(0.5)
        assert -1 < rows[0]["grad/cosine"] < 1 and rows[0]["teacher/overlap"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_each_method_steps_in_the_running_graph(methods: Methods, preset: str):
    controller = methods.controller(methods.settings(preset))
    assert_steps(controller)
    if preset in EVALUATED:
        row = controller.evaluate()
        assert row["eval/accuracy"] >= 0 and math.isfinite(row.get("eval/loss", 0))
        assert ("eval/loss" in row) == (preset in RESPONSES)


@pytest.mark.parametrize(("preset", "loss"), [("sft", "train/loss"), ("dpo", "pair/loss")])
def test_the_loss_on_held_out_data_is_that_of_a_step_on_the_same_data(
    methods: Methods, preset: str, loss: str
):
    controller = methods.controller(methods.settings(preset, "data.num_train=16"))
    controller.evaluator.heldout_data = list(controller.prompts.prompts)  # those of the next step
    before = controller.learner.pack_weights(0)[0].digest
    evaluated = controller.evaluate()
    assert controller.learner.pack_weights(0)[0].digest == before, "nothing is learned from it"
    row = controller.step()
    assert evaluated["eval/loss"] == pytest.approx(row[loss], rel=1e-5)
    if preset == "dpo":
        assert evaluated["eval/pair_accuracy"] == row["pair/accuracy"]


def test_each_set_is_evaluated_by_its_rewards_and_by_the_pairs_of_its_rows(methods: Methods):
    """The held-out problems are used as a set too, so both have the same loss. The two problems
    that are answered greedily are the first two held-out ones.
    """
    controller = methods.controller(
        methods.settings(
            "dpo",
            "+eval.sets.same={task:countdown,num_problems:16,samples:4,options:{responses:pair}}",
            "+eval.sets.few={task:countdown,num_problems:2}",
        )
    )
    controller.evaluator.sets = held_out_sets(controller.settings)
    row = controller.evaluate()
    assert row["eval/same/loss"] == row["eval/loss"] > 0
    assert row["eval/same/pair_accuracy"] == row["eval/pair_accuracy"]
    assert row["eval/same/pass_at_1"] == pytest.approx(row["eval/same/accuracy"])
    assert row["eval/same/pass_at_1"] <= row["eval/same/pass_at_2"] <= row["eval/same/pass_at_4"]
    assert row["eval/few/accuracy"] in (0.0, 0.5, 1.0) and "eval/few/loss" not in row
    assert row["eval/same/error_rate"] == row["eval/few/error_rate"] == 0.0
    again = controller.evaluate()
    assert {key: again[key] for key in row if key.startswith("eval/")} == {
        key: value for key, value in row.items() if key.startswith("eval/")
    }, "the same weights give the same answers"


def test_the_running_learner_exports_its_value_head(methods: Methods):
    folder = methods.folder / "exported"
    methods.workers.learner.export(str(folder))
    head = load_value_head(str(folder), setting="path")
    assert head.shape == (1, 128) and (folder / "config.json").is_file()
