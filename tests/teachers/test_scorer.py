"""The scores of response tokens that a teacher sends, compared with a plain forward pass."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.models.loading import head_rows, load_model
from hybridrl.objectives import make_objective
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import load_config
from hybridrl.teachers.evidence import Hidden
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.teachers.scorer import Scorer, data_key
from hybridrl.teachers.teacher_model import check_own_models
from hybridrl.types import RolloutBatch, ScoredBatch
from tests.support.batches import make_batch, make_rewards
from tests.support.graph import save_tiny

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    for seed, name in enumerate(("student", "teacher")):
        save_tiny(folder / name, seed)
    return folder


def base_of(folder: Path) -> list[str]:
    return [
        f"run.dir={folder}",
        "experiment=quickstart",
        f"model.path={folder}/student",
        f"teachers.main.path={folder}/teacher",
    ]


def scorer(folder: Path, *overrides: str) -> Scorer:
    settings = load_config([*base_of(folder), "train.head_chunk=3", *overrides])
    evidence, rule = scoring(settings, "main")
    return Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def expected(folder: Path, batch: RolloutBatch, temperature: float = 1.0) -> torch.Tensor:
    """[R, V] the teacher's log-probs before each response token, one sequence at a time."""
    model, rows = load_model(str(folder / "teacher")), []
    for i in range(batch.num_sequences):
        part = batch.trajectory(i)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(part.input_ids).long()[None]).logits[0]
        rows.append(
            torch.log_softmax(logits / temperature, -1)[np.flatnonzero(part.response_mask) - 1]
        )
    return torch.cat(rows)


def drawn(batch: RolloutBatch) -> torch.Tensor:
    return torch.from_numpy(batch.input_ids[batch.response_mask].astype(np.int64))


def test_a_report_counts_all_tokens_of_the_sequences_and_the_peak_of_its_own_call(folder: Path):
    """PROMPTS have sequences of 6, 5, 4 and 6 tokens."""
    one = scorer(folder)
    readings = iter([1, 70, 2, 1, 60, 2])  # each call reads before it, at its end, for the report
    one.peaks = PeakMemory(lambda: next(readings))
    works = [one.score(make_batch(PROMPTS))[0].work for _ in range(2)]
    assert [work.tokens for work in works] == [21, 21]
    assert [work.peak_bytes for work in works] == [{"score": 70}, {"score": 60}]
    assert all(work.busy_s > 0 for work in works)


def test_hidden_states_times_the_head_are_the_teachers_logits(folder: Path):
    batch, one = make_batch(PROMPTS), scorer(folder)
    header, scores = one.score(batch)
    logq = torch.log_softmax(torch.from_numpy(scores.rows) @ one.head.detach().T, -1)
    assert torch.allclose(logq, expected(folder, batch), atol=1e-5)
    assert not scores.logprobs.any() and scores.support_ids.shape == (11, 0), (
        "they were not requested"
    )
    assert header.nbytes == {
        "teacher_hidden": scores.rows.nbytes,
        "teacher_logprobs": scores.logprobs.nbytes,
    }


def test_the_drawn_tokens_log_prob_is_sent_where_returns_need_it_at_the_runs_temperature(
    folder: Path,
):
    batch = make_batch(PROMPTS)
    _, scores = scorer(folder, "algorithm.support=sampled", "algorithm.temperature=0.7").score(
        batch
    )
    chosen = expected(folder, batch, 0.7).gather(1, drawn(batch)[:, None])[:, 0]
    assert torch.allclose(torch.from_numpy(scores.logprobs[batch.response_mask]), chosen, atol=1e-5)
    assert not scores.logprobs[~batch.response_mask].any() and scores.rows.shape == (11, 0)


def test_the_teachers_top_tokens_and_the_samplers_come_with_their_log_probs(folder: Path):
    plain = make_batch(PROMPTS)
    support = np.tile(np.array([3, 0, 7], np.int32), (11, 1))
    batch = RolloutBatch(
        **{f: getattr(plain, f) for f in plain.__dataclass_fields__} | {"support_ids": support}
    )
    logq = expected(folder, plain)
    topk = ("algorithm.support=topk", "algorithm.topk.k=3")
    _, theirs = scorer(folder, *topk, "algorithm.topk.source=teacher").score(plain)
    assert theirs.support_ids.tolist() == logq.topk(3).indices.tolist()
    assert torch.allclose(torch.from_numpy(theirs.rows), logq.topk(3).values, atol=1e-5)
    _, samplers = scorer(folder, *topk).score(batch)
    assert samplers.support_ids.tolist() == support.tolist()
    assert torch.allclose(torch.from_numpy(samplers.rows), logq[:, [3, 0, 7]], atol=1e-5)
    chosen = logq.gather(1, drawn(batch)[:, None])[:, 0]
    assert torch.allclose(
        torch.from_numpy(samplers.logprobs[batch.response_mask]), chosen, atol=1e-5
    )


def test_the_whole_vocabulary_can_travel_instead_of_hidden_states(folder: Path):
    batch = make_batch(PROMPTS)
    _, scores = scorer(folder, "algorithm.teacher_signal=logits").score(batch)
    assert torch.allclose(torch.from_numpy(scores.rows), expected(folder, batch), atol=1e-5)


TABLE = """
import torch

V = VOCABULARY

class Table:
    # The next token depends on the last one alone: log q(b | a) is row a of a table.

    def __init__(self):
        self.head = torch.eye(V)
        self.table = torch.log_softmax(torch.arange(V * V).reshape(V, V) % 7 / 2.0, -1)

    def states(self, input_ids, attention_mask, position_ids):
        return self.table[input_ids]
"""


@pytest.mark.parametrize("evidence", ["hidden", "vocabulary", "support", "drawn"])
def test_a_teacher_that_answers_from_a_table_is_one_file_of_the_users(
    folder: Path, tmp_path: Path, evidence: str
):
    v = head_rows(f"{folder}/student")
    (tmp_path / "table.py").write_text(TABLE.replace("VOCABULARY", str(v)))
    batch = make_batch(PROMPTS)
    own = (
        "teachers.main.path=null",
        f"+teachers.main.model={tmp_path}/table.py:Table",
        f"+teachers.main.evidence={evidence}",
        "algorithm.topk.source=teacher",
        "algorithm.topk.k=3",
        "algorithm.gamma=1",
    )
    _, scores = scorer(folder, *own).score(batch)
    table = torch.log_softmax(torch.arange(v * v).reshape(v, v) % 7 / 2.0, -1)
    before = torch.from_numpy(batch.input_ids[np.flatnonzero(batch.response_mask) - 1]).long()
    logq = table[before].gather(1, drawn(batch)[:, None])[:, 0]
    assert torch.allclose(torch.from_numpy(scores.logprobs[batch.response_mask]), logq, atol=1e-6)
    # The learner's side: if hidden states are sent, it loads the head from the table's own file.
    settings = load_config([*base_of(folder), *own])
    inbox = TeacherInbox.load(
        settings, make_objective(settings).needs.evidence, torch.device("cpu")
    )
    rewards = make_rewards(batch, [0.0] * batch.num_sequences)
    scored = ScoredBatch(rollout=batch, scores=(scores,), rewards=rewards)
    teachers = inbox.head_inputs(scored, [torch.ones(batch.num_sequences)])
    assert len(teachers) == (0 if evidence == "drawn" else 1)
    if evidence == "hidden":
        assert torch.equal(teachers[0].hidden @ teachers[0].lm_head.T, table[before])


def test_the_learners_own_output_embedding_is_not_copied_for_a_teacher_that_shares_it(
    folder: Path,
):
    own = torch.arange(24.0).reshape(head_rows(f"{folder}/student") + 1, -1)
    shared = ("teachers.main.path=null", "+teachers.main.share_base=true", "lora.rank=2")
    device = torch.device("cpu")
    evidence = [Hidden(drawn=False)]
    inbox = TeacherInbox.load(load_config([*base_of(folder), *shared]), evidence, device, own)
    assert inbox.heads[0].data_ptr() == own.data_ptr() and len(inbox.heads[0]) == len(own) - 1
    # With another end token the head is a copy in which two rows are exchanged.
    other = load_config([*base_of(folder), *shared, "+teachers.main.eos=1"])
    (head,) = TeacherInbox.load(other, evidence, device, own).heads
    assert head[1].tolist() == own[2].tolist() == [2.0] and own[1].tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Table:\n    head = 1", "its class has no states"),
        (TABLE.replace("torch.eye(V)", "torch.eye(3)"), "its head is (3, 3), must be a tensor"),
        ("class Table:\n    def __init__(self):\n        1 / 0", "raised ZeroDivisionError"),
        (TABLE.replace("self.table[input_ids]", "input_ids"), "returned (1, 1) for one token"),
        (TABLE.replace("self.table[input_ids]", "self.absent"), "states raised AttributeError"),
        ("", "has no Table; name a class"),
    ],
)
def test_a_class_that_is_no_teacher_is_refused_before_a_worker_starts(
    folder: Path, tmp_path: Path, text: str, message: str
):
    rows = str(head_rows(f"{folder}/student"))
    (tmp_path / "bad.py").write_text(text.replace("VOCABULARY", rows))
    own = ("teachers.main.path=null", f"+teachers.main.model={tmp_path}/bad.py:Table")
    settings = load_config([*base_of(folder), *own])
    with pytest.raises(ConfigError) as caught:
        check_own_models(settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_that_is_routed_elsewhere_costs_no_forward_pass(folder: Path):
    plain = make_batch(PROMPTS)
    columns = ({"domain": "math"}, {"domain": "code"})
    batch = RolloutBatch(
        **{f: getattr(plain, f) for f in plain.__dataclass_fields__} | {"columns": columns}
    )
    one, seen = scorer(folder, "+teachers.main.route={domain:code}"), []
    one.model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    _, scores = one.score(batch)
    assert not scores.rows[:5].any() and scores.rows[5:].any(axis=1).all()
    assert seen == [(2, 6)]  # the two padded sequences of the second prompt


def test_log_probs_of_data_are_computed_once_and_those_of_samples_every_time(folder: Path):
    plain = make_batch(PROMPTS)
    given = RolloutBatch(
        **{f: getattr(plain, f) for f in plain.__dataclass_fields__}
        | {"source": Source.data, "uids": ("a@0", "b@0")}
    )
    again = RolloutBatch(
        **{f: getattr(given, f) for f in given.__dataclass_fields__} | {"uids": ("a@1", "b@1")}
    )
    one, passes = scorer(folder, "algorithm=dpo", "algorithm.pair.against=main"), []
    one.model.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    first, second = one.score(given)[1].logprobs, one.score(again)[1].logprobs
    assert first.tolist() == second.tolist() and len(passes) == 1 and first.any()
    one.score(plain)
    one.score(plain)
    assert len(passes) == 3


DPO = ("algorithm=dpo", "algorithm.pair.against=main")
OTHERS = [((1, 5, 6), [(8, 7, 2), (2,)]), ((1, 10), [(11, 11, 2), (12, 2)])]


def remembering(folder: Path, prompts: list) -> tuple[Scorer, RolloutBatch]:
    """A scorer that has seen responses of the data."""
    plain = make_batch(prompts)
    given = RolloutBatch(
        **{f: getattr(plain, f) for f in plain.__dataclass_fields__}
        | {"source": Source.data, "uids": ("a@0", "b@0")}
    )
    one = scorer(folder, *DPO)
    one.score(given)
    return one, given


def test_what_a_scorer_remembers_is_in_its_checkpoint(folder: Path, tmp_path: Path):
    one, given = remembering(folder, PROMPTS)
    (saved,) = one.save_state(str(tmp_path), 0, 2)
    assert saved.name == "scorer-main-00000-of-00002.safetensors" and one.state_bytes() == 4 * 11
    again, passes = scorer(folder, *DPO), []
    again.model.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert again.save_state(str(tmp_path), 1, 2) == [], "nothing to remember, no file"
    again.load_state(str(tmp_path), 0, 2)
    assert (
        again.score(given)[1].logprobs.tolist() == one.score(given)[1].logprobs.tolist()
        and passes == []
    )


@pytest.mark.parametrize(
    "changed",
    [
        ("teachers.main.path=null",),
        ("algorithm.temperature=0.5",),
        ("+teachers.main.dtype=bfloat16",),
        ("algorithm=word_kd",),
    ],
)
def test_what_was_remembered_of_another_teacher_or_temperature_is_computed_anew(
    folder: Path, tmp_path: Path, changed: tuple[str, ...]
):
    one, given = remembering(folder, PROMPTS)
    one.save_state(str(tmp_path), 0, 1)
    other = scorer(folder, *(changed if changed == ("algorithm=word_kd",) else (*DPO, *changed)))
    fresh = other.score(given)[1]
    other.load_state(str(tmp_path), 0, 1)
    again = other.score(given)[1]
    assert (
        again.logprobs.tolist() == fresh.logprobs.tolist()
        and again.rows.tolist() == fresh.rows.tolist()
    )


def test_a_replica_remembers_its_own_and_other_numbers_of_replicas_share_it_all(
    folder: Path, tmp_path: Path
):
    keys = []
    for replica, prompts in enumerate((PROMPTS, OTHERS)):
        saved, given = remembering(folder, prompts)
        saved.save_state(str(tmp_path), replica, 2)
        keys.append([data_key(given, i) for i in range(4)])
    one = scorer(folder, *DPO)

    def loaded(replica: int, replicas: int) -> set[str]:
        one.load_state(str(tmp_path), replica, replicas)
        return set(one.cached)

    assert loaded(0, 2) == set(keys[0]) and loaded(1, 2) == set(keys[1])
    assert loaded(0, 1) == loaded(2, 3) == {*keys[0], *keys[1]} and len(one.cached) == 8


def test_a_pickle_in_place_of_what_a_scorer_remembers_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "scorer-main-00000-of-00001.safetensors").write_bytes(
        b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os"
    )
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        scorer(folder).load_state(str(tmp_path), 0, 1)
