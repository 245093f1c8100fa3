"""A teacher with its own end token or its own prompts scores the student's tokens."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridrl.core.errors import ConfigError
from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.models.loading import load_model
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.teachers.context import Context, EndTokens, end_tokens
from hybridrl.teachers.evidence import Drawn, Evidence, Hidden, States, Vocabulary
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import RolloutBatch, TokenScores
from tests.support.batches import make_batch, token_columns
from tests.support.pairs import END, EOS, TURN, pair_overrides, save_pair

OWN = (TURN, 5, 6, END, TURN)
"""The first prompt in the form of the teacher's chat template."""

PROMPTS = [
    ((1, END, 5, EOS, 6), [(7, EOS, 8, EOS), (9, END, EOS)]),
    ((1, 10), [(11, EOS), (12, 13, 14, EOS)]),
]
R = 13  # number of response tokens in the batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder)
    return folder


def scorer(folder: Path, *overrides: str) -> Scorer:
    settings = load_config([*pair_overrides(folder), *overrides])
    evidence, rule = scoring(settings, "main")
    return Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def exchanged(ids: np.ndarray) -> np.ndarray:
    """The ids with both end tokens exchanged, by a table instead of the code that is tested."""
    table = np.arange(25)
    table[[EOS, END]] = END, EOS
    return table[ids]


def expected(folder: Path, batch: RolloutBatch, own: dict[int, tuple[int, ...]]) -> torch.Tensor:
    """[R, V] the teacher's log-probs of the student's tokens, one sequence at a time.

    Args:
        own: the prompts that the teacher reads instead of the student's, by group.
    """
    model = load_model(str(folder / "teacher"))
    rows = []
    for i in range(batch.num_sequences):
        part = batch.trajectory(i)
        prompt = own.get(i // batch.group_size, tuple(part.prompt_ids.tolist()))
        ids = np.array([*prompt, *exchanged(part.response_ids)])
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0]
        logq = torch.log_softmax(logits, -1)[len(prompt) - 1 : len(ids) - 1]
        rows.append(logq[:, exchanged(np.arange(25))])
    return torch.cat(rows)


def with_prompts(batch: RolloutBatch, own: tuple[int, ...]) -> RolloutBatch:
    """The batch with an own prompt of the teacher for the first group."""
    return replace(batch, teacher_prompts=({"main": own}, {}))


def drawn(batch: RolloutBatch) -> torch.Tensor:
    return torch.from_numpy(batch.input_ids[batch.response_mask].astype(np.int64))


# -- by hand ---------------------------------------------------------------------------------------


def test_ids_are_exchanged_and_exchanged_back():
    ids = np.array([7, 5, 2], np.int32)
    ends = EndTokens(student=2, teacher=5)
    assert ends.exchanged(ids).tolist() == [7, 2, 5]
    assert ends.exchanged(ends.exchanged(ids)).tolist() == [7, 5, 2] == ids.tolist()


ENDS = EndTokens(student=2, teacher=1)
Q = [1 / 2, 1 / 3, 1 / 6]
"""The teacher's distribution. It ends a response with token 1, in 1 of 3 cases; the student ends
one with token 2.
"""


def answer(evidence: Evidence) -> TokenScores:
    """The teacher's scores of one response that is only the end token 2, after a prompt of one
    token.
    """
    batch = make_batch([((0,), [(2,)])])
    context = Context(teacher="main", ends=ENDS)
    read = context.read(batch)
    assert read.input_ids.tolist() == [0, 1]
    reading = evidence.read(
        States(
            hidden=torch.tensor([Q]).log(),
            head=torch.eye(3),
            rule=HeadRule(),
            token_ids=torch.from_numpy(read.input_ids[1:]).long(),
            sampler_support=torch.zeros(1, 0, dtype=torch.int64),
        )
    )
    scores = TokenScores(
        teacher="main",
        logprobs=np.array([0.0, reading.logprobs[0]], np.float32),
        rows=reading.rows.numpy(),
        support_ids=reading.support_ids.numpy().astype(np.int32),
    )
    return context.answer(scores, read, batch, evidence)


@pytest.mark.parametrize("evidence", [Hidden(drawn=False), Vocabulary(drawn=False)])
def test_the_dense_gradient_of_three_tokens_is_the_one_by_hand(evidence: Evidence):
    """With p = (1/3, 1/3, 1/3), and q = (1/2, 1/6, 1/3) in the student's tokens, c = log p/q is
    (log 2/3, log 2, 0), KL = log(4/3) / 3, and the gradient is p (c - KL).
    """
    head = torch.eye(3)
    ENDS.exchange_rows(head)
    teacher = evidence.head_input(answer(evidence), torch.ones(1), head)
    assert teacher is not None
    logits = torch.zeros(1, 3, requires_grad=True)
    columns = token_columns(
        token_ids=torch.tensor([2]),
        token_weight=torch.ones(1),
        sparse=torch.zeros(1),
        sampler_logprobs=torch.zeros(1),
    )
    loss, _ = hybrid_head_loss(logits, torch.eye(3), (teacher,), columns, HeadRule())
    loss.backward()
    kl = 0.0958940
    assert float(loss.detach()) == pytest.approx(kl, abs=1e-6)
    by_hand = [(-0.4054651 - kl) / 3, (0.6931472 - kl) / 3, (0.0 - kl) / 3]
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_drawn_end_token_has_the_log_prob_of_the_teachers():
    assert answer(Drawn()).logprobs.tolist() == pytest.approx([0.0, -1.0986123])


# -- against the model -----------------------------------------------------------------------------

ALIGNED = (f"+teachers.main.eos={END}", "train.head_chunk=3", "algorithm.gamma=1")


@pytest.mark.parametrize("own", [{}, {0: OWN}])
@pytest.mark.parametrize("evidence", ["hidden", "vocabulary", "support", "drawn"])
def test_every_kind_of_evidence_is_about_the_students_tokens(
    folder: Path, evidence: str, own: dict[int, tuple[int, ...]]
):
    batch = make_batch(PROMPTS)
    logq = expected(folder, batch, own)
    if own:
        batch = with_prompts(batch, OWN)
    kind = (f"+teachers.main.evidence={evidence}", "algorithm.topk.source=teacher")
    one = scorer(folder, *ALIGNED, *kind, "algorithm.topk.k=4")
    _, scores = one.score(batch)
    chosen = logq.gather(1, drawn(batch)[:, None])[:, 0]
    logprobs = torch.from_numpy(scores.logprobs)
    assert torch.allclose(logprobs[batch.response_mask], chosen, atol=1e-5)
    assert not logprobs[~batch.response_mask].any()
    rows = torch.from_numpy(scores.rows)
    match evidence:
        case "hidden":
            settings = load_config([*pair_overrides(folder), *ALIGNED, *kind])
            inbox = TeacherInbox.load(settings, [one.evidence], torch.device("cpu"))
            rows = torch.log_softmax(rows @ inbox.heads[0].T, -1)
            assert torch.allclose(rows, logq, atol=1e-5)
        case "vocabulary":
            assert torch.allclose(rows, logq, atol=1e-5)
        case "support":
            assert scores.support_ids.tolist() == logq.topk(4).indices.tolist()
            assert torch.allclose(rows, logq.topk(4).values, atol=1e-5)
        case "drawn":
            assert rows.shape == (R, 0)


def test_the_samplers_tokens_are_looked_up_in_the_teachers_ids(folder: Path):
    support = np.tile(np.array([END, 7, EOS], np.int32), (R, 1))
    batch = replace(make_batch(PROMPTS), support_ids=support)
    _, scores = scorer(folder, *ALIGNED, "algorithm.support=topk", "algorithm.topk.k=3").score(
        batch
    )
    logq = expected(folder, batch, {})
    assert scores.support_ids.tolist() == support.tolist()
    assert torch.allclose(torch.from_numpy(scores.rows), logq[:, [END, 7, EOS]], atol=1e-5)


def test_a_teacher_with_the_students_end_token_and_prompts_reads_the_batch_itself(folder: Path):
    settings = load_config([*pair_overrides(folder), f"+teachers.main.eos={EOS}"])
    batch = make_batch(PROMPTS)
    assert end_tokens(settings, "main") is None
    assert Context.of(settings, "main").read(batch) is batch


@pytest.mark.parametrize(
    ("eos", "model_eos", "ends"),
    [
        ("<end>", "null", EndTokens(student=EOS, teacher=END)),
        (str(END), "null", EndTokens(student=EOS, teacher=END)),
        ("<eos>", str(END), EndTokens(student=END, teacher=EOS)),
        ("<end>", str(END), None),
    ],
)
def test_an_end_token_is_named_by_its_text_or_its_id(
    folder: Path, eos: str, model_eos: str, ends: EndTokens | None
):
    named = [f"+teachers.main.eos='{eos}'", f"model.eos={model_eos}"]
    assert end_tokens(load_config([*pair_overrides(folder), *named]), "main") == ends


@pytest.mark.parametrize("eos", ["25", "=", "<endd>"])
def test_a_token_that_text_may_contain_ends_no_response(folder: Path, eos: str):
    settings = load_config([*pair_overrides(folder), f"+teachers.main.eos='{eos}'"])
    with pytest.raises(ConfigError) as caught:
        end_tokens(settings, "main")
    assert str(caught.value) == (
        f"teachers.main.eos={eos}: is not one of the tokenizer's special tokens, which no text "
        "contains; give the text or the id of one: '<pad>', '<bos>', '<eos>', '<unk>', '<end>', "
        "'<turn>'"
    )
