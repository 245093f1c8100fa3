"""An exported reward model gives the same scores as the learner that trained it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import collate, train_sequences, unlearned_sequences
from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.models.loading import VALUE_HEAD, load_model, load_value_head
from hybridrl.objectives import make_objective
from hybridrl.objectives.head_rule import head_rule
from hybridrl.objectives.pairs import last_tokens
from hybridrl.policy.student import Look, Student
from hybridrl.rewards.check import loaded_rewards
from hybridrl.rewards.load import load_reward
from hybridrl.rewards.reward_model import RewardModel, check_reward_models
from hybridrl.rewards.worker import RewardWorker
from hybridrl.settings.compose import load_config
from hybridrl.settings.rewards import RewardConfig, RewardFunctionConfig
from hybridrl.settings.run import RunSettings
from hybridrl.types import RolloutBatch, ScoredBatch
from hybridrl.weights.fragments import MASTER, Fragment, write_fragments
from hybridrl.weights.hugging_face import checkpoint_tensors, export
from tests.support.batches import make_batch, make_plan, make_rewards
from tests.support.graph import save_tiny

BOS = 1
EOS = 2
GROUPS = [
    ((BOS, 7, 20, 11, 21), [(7, 16, 11, EOS), (9, EOS)]),
    ((BOS, 6), [(5,), (5, 14, 8, 8, 19, EOS)]),  # one response is a single token, cut there
    ((BOS, 12, 20, 4), [(4, 4, EOS), (4, 4, 4, EOS)]),
]
COLUMNS = {
    "prompt_ids": [list(prompt) for prompt, responses in GROUPS for _ in responses],
    "completion_ids": [list(response) for _, responses in GROUPS for response in responses],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    """The settings of a run that trains a reward model, with random weights."""
    folder = save_tiny(tmp_path_factory.mktemp("source"), 0)
    pairs = ("algorithm=reward_model", "+data.options.responses=pair")
    return load_config(["run.dir=here", "experiment=quickstart", f"model.path={folder}", *pairs])


@pytest.fixture(scope="module")
def student(settings: RunSettings) -> Student:
    student = Student(load_model(settings.model.path), head_rule(settings), with_value=True)
    torch.manual_seed(3)
    torch.nn.init.normal_(student.value_head.weight)
    return student


@pytest.fixture(scope="module")
def exported(
    settings: RunSettings, student: Student, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that `hybridrl export` writes for the student's checkpoint."""
    base = tmp_path_factory.mktemp("run")
    weights = {f"model.{name}": p.detach() for name, p in student.body.named_parameters()}
    weights[VALUE_HEAD] = student.value_head.weight.detach()
    fragments = [
        Fragment(name=name, shape=tuple(weight.shape), offset=0, tensors={MASTER: weight.flatten()})
        for name, weight in weights.items()
    ]
    write_fragments(base, 0, 1, fragments)
    tensors = checkpoint_tensors(base, settings.model, "float32")
    export(tensors, Path(settings.model.path), base / "export")
    return base / "export"


def values_of(student: Student, batch: RolloutBatch) -> Tensor:
    """[R] the values that the learner computes before an update, in one padded micro-batch."""
    micro = collate(unlearned_sequences(batch))
    with torch.no_grad():
        _, values = student(
            micro.input_ids,
            micro.attention_mask,
            micro.position_ids,
            micro.hidden_rows,
            (),
            micro.columns,
            Look.view,
        )
    return values


def ranked_groups(student: Student) -> ScoredBatch:
    """A batch in which the first response of each group has the higher reward."""
    batch = make_batch(GROUPS)
    return ScoredBatch(
        rollout=batch,
        scores=(),
        rewards=make_rewards(batch, [1.0, 0.0] * len(GROUPS)),
        learner_values=values_of(student, batch).numpy(),
    )


# -- the score -------------------------------------------------------------------------------------


def test_the_exported_model_scores_as_the_learner_that_trained_it(student: Student, exported: Path):
    batch = make_batch(GROUPS)
    learned = values_of(student, batch)[last_tokens(batch)]
    assert RewardModel(str(exported))(**COLUMNS) == pytest.approx(learned.tolist(), abs=1e-5)
    assert float(learned.std()) > 0.1, "the scores differ between responses"


def test_in_bfloat16_the_scores_are_those_of_float32_within_its_rounding(exported: Path):
    """The bound is that of two layers with four roundings each to 8 bits."""
    whole = np.array(RewardModel(str(exported))(**COLUMNS))
    half = RewardModel(str(exported), dtype="bfloat16")
    assert half.body.dtype is torch.bfloat16 and half.value_head.dtype is torch.float32
    assert np.abs(np.array(half(**COLUMNS)) - whole).max() < 8 * 2**-8 * np.abs(whole).max()
    assert half(**COLUMNS) != whole.tolist()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("dtype=float16", r"options\.dtype=float16: must be float32 or bfloat16"),
        ("device=cuda", r"options\.device: is decided by the placement; set reward"),
    ],
)
def test_another_dtype_or_a_device_is_refused(option: str, sentence: str):
    judge = "+reward.functions.rm={function:reward_model,options:{path:x}}"
    with pytest.raises(ConfigError, match=rf"^reward\.functions\.rm\.{sentence}"):
        load_config(
            [
                "run.dir=here",
                "experiment=quickstart",
                judge,
                f"+reward.functions.rm.options.{option}",
            ]
        )


def test_a_score_depends_neither_on_the_other_sequences_nor_on_the_last_token(exported: Path):
    model = RewardModel(str(exported))
    prompts = COLUMNS["prompt_ids"]
    completions = COLUMNS["completion_ids"]
    separate = [model([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert separate == pytest.approx(model(**COLUMNS), abs=1e-5)
    assert model([[BOS, 6]], [[5, 14, EOS]]) == model([[BOS, 6]], [[5, 14, 9]])
    assert model([[BOS, 6]], [[5, 14, EOS]]) != model([[BOS, 6]], [[5, 15, EOS]])


def test_bradley_terry_of_the_scores_is_the_loss_of_the_pairs(
    settings: RunSettings, student: Student, exported: Path
):
    chosen = torch.tensor([0, 2, 4])
    rejected = torch.tensor([1, 3, 5])
    gradient = make_objective(settings).pair_gradient(ranked_groups(student), chosen, rejected)
    scores = torch.tensor(RewardModel(str(exported))(**COLUMNS), dtype=torch.float64)
    losses = torch.nn.functional.softplus(scores[rejected] - scores[chosen])
    assert gradient.loss.tolist() == pytest.approx(losses.tolist(), abs=1e-5)


def test_one_step_along_the_gradient_of_the_pairs_raises_chosen_scores_over_rejected_ones(
    settings: RunSettings, tmp_path: Path
):
    learner = Student(load_model(settings.model.path), head_rule(settings), with_value=True)
    scored = ranked_groups(learner)
    plan = make_plan(scored.rollout, num_groups=3, teacher_weights=())
    credit = make_objective(settings).credit(scored, plan)
    micro = collate(train_sequences(scored.rollout, credit.learned(torch.float32)))
    learner(
        micro.input_ids,
        micro.attention_mask,
        micro.position_ids,
        micro.hidden_rows,
        (),
        micro.columns,
    )[0].backward()
    state = {f"model.{name}": p.detach() for name, p in learner.body.named_parameters()}
    stepped = -0.1 * learner.value_head.weight.grad  # a gradient step from 0
    export({**state, VALUE_HEAD: stepped}, Path(settings.model.path), tmp_path / "export")
    scores = RewardModel(str(tmp_path / "export"))(**COLUMNS)
    gradient_norm = float(learner.value_head.weight.grad.norm())
    # At 0 each of the three pairs has slope 1/2 * 1/3, so the step's summed margin is
    # 6 * 0.1 * |gradient|^2.
    assert sum(scores[i] - scores[i + 1] for i in (0, 2, 4)) == pytest.approx(
        0.6 * gradient_norm**2, rel=1e-4
    )
    assert gradient_norm > 0.01


def test_a_response_without_tokens_fails(exported: Path):
    with pytest.raises(ValueError, match="a response without tokens has no score"):
        RewardModel(str(exported))([[BOS, 6], [BOS, 6]], [[5, EOS], []])


# -- the folder ------------------------------------------------------------------------------------


def test_a_bfloat16_value_head_is_exported_as_it_was_trained(settings: RunSettings, tmp_path: Path):
    state = load_model(settings.model.path, "bfloat16").state_dict()
    export(
        {**state, VALUE_HEAD: torch.full((1, 128), 0.1).bfloat16()},
        Path(settings.model.path),
        tmp_path / "export",
    )
    head = load_value_head(str(tmp_path / "export"), setting="path")
    assert head.dtype == torch.float32
    assert torch.equal(head, torch.full((1, 128), 0.1).bfloat16().float())


def test_an_engine_sees_only_the_language_model_in_the_folder(exported: Path):
    assert [path.name for path in exported.glob("*.safetensors")] == ["model.safetensors"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in exported.rglob("*"))


def test_a_value_head_of_another_width_is_refused(settings: RunSettings, tmp_path: Path):
    state = load_model(settings.model.path).state_dict()
    with pytest.raises(
        CheckpointError, match=r"value_head\.weight is \[1, 3\], the model needs \[1, 128\]"
    ):
        export(
            {**state, VALUE_HEAD: torch.zeros(1, 3)}, Path(settings.model.path), tmp_path / "export"
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"path": "{new}/none"},
            r"options\.path=.*none: there is no such folder; give the export/step_NNNNNN of a run "
            r"with algorithm=rew",
        ),
        (
            {"path": "{plain}"},
            r"options\.path=.*: holds no value head, value_head/model\.safetensors; give the "
            r"export/",
        ),
        (
            {"path": "{bare}"},
            r"options\.path=.*: exists but holds no config\.json; give a Hugging Face model folder",
        ),
        ({}, r"building it raised TypeError: .*missing .* 'path'; correct its options"),
    ],
)
def test_a_folder_without_a_reward_model_is_refused_in_one_sentence(
    options: dict[str, str], sentence: str, settings: RunSettings, exported: Path, tmp_path: Path
):
    (tmp_path / "value_head").mkdir()
    (tmp_path / "value_head" / "model.safetensors").write_bytes(
        (exported / "value_head" / "model.safetensors").read_bytes()
    )
    options = {
        key: value.format(new=tmp_path, plain=settings.model.path, bare=tmp_path)
        for key, value in options.items()
    }
    with pytest.raises(
        ConfigError, match=rf"reward\.functions\.rm\.function=reward_model: {sentence}"
    ) as raised:
        load_reward("rm", "reward_model", options)
    assert "\n" not in str(raised.value)


def test_a_reward_model_with_another_vocabulary_is_refused_before_any_worker_starts(exported: Path):
    rm = (
        "+reward.functions.rm.function=reward_model",
        f"+reward.functions.rm.options.path={exported}",
    )
    settings = load_config(
        ["run.dir=here", "experiment=quickstart", "data.num_train=1", "data.num_heldout=1", *rm]
    )
    assert prepare_prompts(settings)
    with pytest.raises(
        ConfigError,
        match=r"reward\.functions\.rm\.options\.path=.*: its vocabulary differs from that of "
        r"model\.path",
    ):
        check_reward_models(settings.reward, {"a": 0})
    tokenizer = (exported / "tokenizer.json").read_text()
    (exported / "tokenizer.json").write_text(tokenizer.replace('"+": ', '"&": '))
    try:
        with pytest.raises(ConfigError, match="its vocabulary differs"):
            prepare_prompts(settings)
    finally:
        (exported / "tokenizer.json").write_text(tokenizer)


# -- as a reward -----------------------------------------------------------------------------------


class Digits:
    """A tokenizer that decodes ids to their numbers, which the verifier below reads."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in token_ids if i > EOS or not skip_special_tokens)


@pytest.fixture(scope="module")
def worker(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardWorker]:
    """A worker with a verifier of weight 0 and then a reward model, as in RL with a reward
    model.
    """
    file = tmp_path_factory.mktemp("verifier") / "verifier.py"
    file.write_text(
        "def short(completions):\n    return [float(len(c) < 4) for c in completions]\n"
    )
    base = ["run.dir=here", "experiment=quickstart", "reward.timeout_s=60"]
    first = [
        f"reward.functions.countdown.function={file}:short",
        "+reward.functions.countdown.weight=0",
    ]
    second = [
        "+reward.functions.rm.function=reward_model",
        f"+reward.functions.rm.options.path={exported}",
    ]
    worker = RewardWorker(
        load_config([*base, *first, *second]).reward,
        "digits",
        watch_only=False,
        load=lambda path, revision, eos: Digits(),
    )
    yield worker
    worker.close()


def test_the_first_function_measures_accuracy_and_the_reward_model_is_trained_on(
    worker: RewardWorker, exported: Path
):
    rewards = worker.score(make_batch(GROUPS), [0.0, 1.0])
    assert rewards.part_names == ("countdown", "rm")
    assert rewards.parts[0].tolist() == [0.0, 1.0, 1.0, 0.0, 1.0, 0.0], (
        "the row that evaluation uses for accuracy"
    )
    assert rewards.values.tolist() == pytest.approx(RewardModel(str(exported))(**COLUMNS), abs=1e-5)
    assert np.array_equal(rewards.values, rewards.parts[1])
    assert rewards.keep.all() and not rewards.errors.any()


def test_a_folder_without_a_reward_model_is_refused_before_any_worker_starts(tmp_path: Path):
    config = RewardConfig(
        functions={
            "rm": RewardFunctionConfig(function="reward_model", options={"path": str(tmp_path)})
        }
    )
    with (
        pytest.raises(
            ConfigError,
            match=r"reward\.functions\.rm\.function=reward_model: options\.path=.*: holds no value "
            r"head",
        ),
        loaded_rewards(config),
    ):
        pass
