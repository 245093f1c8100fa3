"""The scorer of a teacher that a server runs, tested with servers that give scripted answers."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, ServerError
from hybridrl.data.problem import Problem
from hybridrl.launch.notices import start_notice
from hybridrl.launch.served_teachers import check_served_teachers
from hybridrl.launch.session import run_info
from hybridrl.models.loading import head_rows
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.planning.plan import make_plan, plan_lines
from hybridrl.run_dir.setting_changes import changes
from hybridrl.runtime.scorer_group import scoring
from hybridrl.runtime.workers import teams
from hybridrl.settings.choices import Source
from hybridrl.settings.compose import from_yaml, load_config, to_yaml
from hybridrl.teachers.served import ServedScorer
from hybridrl.types import Prompt, RolloutBatch
from tests.support.batches import make_batch
from tests.support.graph import save_tiny
from tests.support.scoring_server import ScoringServer, prompt_logprobs, scores, scoring_server

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]
TOPK = ("algorithm.topk.source=teacher", "algorithm.topk.k=3", "teachers.main.evidence=support")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("served") / "student", 0)


def overrides(student: Path, url: str, *more: str) -> list[str]:
    of_teacher = [f"url={url}", "evidence=drawn", "served.retry_s=0"]
    return [
        f"run.dir={student.parent}/run",
        "experiment=quickstart",
        f"model.path={student}",
        "teachers.main.path=null",
        *(f"++teachers.main.{override}" for override in of_teacher),
        *(f"++{o}" if o.startswith("teachers.") else o for o in more),
    ]


def scorer(student: Path, url: str, *more: str) -> ServedScorer:
    settings = load_config(overrides(student, url, *more))
    evidence, rule = scoring(settings, "main")
    return ServedScorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def of_table(sequence: np.ndarray) -> list[float]:
    """The scripted server's log-probs of all tokens of a sequence except for the first."""
    return [-(int(token) + t / 10) for t, token in enumerate(sequence[1:], 1)]


def test_the_drawn_tokens_log_probs_stand_in_the_places_of_the_response_tokens(student: Path):
    batch = make_batch(PROMPTS)
    with scoring_server() as server:
        header, sent = scorer(student, server.url).score(batch)
    for i in range(4):
        part = batch.trajectory(i)
        column = sent.logprobs[batch.offsets[i] : batch.offsets[i + 1]]
        expected = [0.0, *of_table(part.input_ids)] * part.response_mask
        assert column.tolist() == pytest.approx(expected.tolist())
    assert sent.rows.shape == sent.support_ids.shape == (11, 0)
    assert header.nbytes == {"teacher_logprobs": sent.logprobs.nbytes}
    prompts = [body["prompt"] for body in server.bodies]
    assert sorted(prompts) == sorted(batch.trajectory(i).input_ids.tolist() for i in range(4))


def test_a_teacher_on_a_server_is_not_measured_and_a_notice_names_it(student: Path):
    settings = load_config(overrides(student, "http://host:1/v1"))
    assert start_notice(settings, None).endswith(
        "(teacher main is on a server, and is not measured)"
    )
    settings = load_config(overrides(student, "http://host:1/v1", "eval.teacher=false"))
    assert start_notice(settings, None) == "starting workers ..."


def test_the_teachers_most_likely_tokens_are_one_row_for_each_response_token(student: Path):
    batch = make_batch(PROMPTS)
    with scoring_server() as server:
        header, sent = scorer(student, server.url, *TOPK).score(batch)
    places = np.concatenate([np.flatnonzero(batch.trajectory(i).response_mask) for i in range(4)])
    expected = [[-t / 10, -(1 + t / 10), -(2 + t / 10)] for t in places]
    assert sent.support_ids.tolist() == [[0, 1, 2]] * 11
    assert sent.rows.tolist() == [pytest.approx(row) for row in expected]
    assert sent.logprobs[batch.response_mask].all()
    assert header.nbytes["teacher_support"] == 11 * 3 * 8


def test_a_prompt_that_is_routed_elsewhere_costs_no_request(student: Path):
    plain = make_batch(PROMPTS)
    columns = ({"domain": "math"}, {"domain": "code"})
    batch = changed(plain, columns=columns)
    with scoring_server() as server:
        _, sent = scorer(student, server.url, "teachers.main.route={domain:code}").score(batch)
        assert len(server.bodies) == 2
        none = changed(plain, columns=(columns[0],) * 2)
        scorer(student, server.url, "teachers.main.route={domain:code}").score(none)
    assert len(server.bodies) == 2
    assert not sent.logprobs[: batch.offsets[2]].any() and sent.logprobs[batch.offsets[2] :].any()


def test_log_probs_of_the_datas_responses_are_requested_once(student: Path):
    batch = changed(make_batch(PROMPTS), source=Source.data)
    with scoring_server() as server:
        one = scorer(student, server.url, "algorithm=dpo", "algorithm.pair.against=main")
        first = one.score(batch)[1].logprobs
        again = one.score(batch)[1].logprobs
    assert first.tolist() == again.tolist() and first.any()
    assert len(server.bodies) == 4


def changed(batch: RolloutBatch, **fields: object) -> RolloutBatch:
    return RolloutBatch(**{f: getattr(batch, f) for f in batch.__dataclass_fields__} | fields)


def test_the_next_server_scores_a_chunk_whose_server_is_lost_and_those_after_it(student: Path):
    batch = make_batch(PROMPTS)
    with scoring_server() as second:
        fallbacks = f"teachers.main.served.fallbacks=[{second.url}]"
        with scoring_server([scores, (503, {"error": "gone"})]) as first:
            one = scorer(student, first.url, fallbacks, "teachers.main.served.concurrency=1")
            _, sent = one.score(batch)
            one.score(batch)
        assert len(second.bodies) == 8, "the whole chunk, and the next one"
        assert sent.logprobs[batch.response_mask].all()
        # Now the second server is lost too, while the first one is still away.
        second.script[:] = [(500, {"error": "out of memory"})] * 4
        with pytest.raises(ServerError) as caught:
            one.score(batch)
    message = str(caught.value)
    assert f"teachers.main.served.fallbacks={second.url}: did not answer" in message
    assert f"teachers.main.url={first.url}: did not answer" in message
    assert "HTTP 500 (out of memory)" in message and "\n" not in message


def test_a_token_that_the_student_does_not_have_is_refused(student: Path):
    rows = head_rows(str(student))
    entries = prompt_logprobs([1, 5, 6, 7, 8, 2], 3)
    entries[4][str(rows)] = entries[4].pop("0")
    answer = (200, {"choices": [{"prompt_logprobs": entries}]})
    with scoring_server([answer]) as server, pytest.raises(ServerError) as caught:
        scorer(student, server.url, *TOPK).score(make_batch([((1, 5, 6), [(7, 8, 2)])]))
    assert f"token {rows} is among the teacher's most likely tokens" in str(caught.value)


# -- before a worker starts ------------------------------------------------------------------------


def checked(student: Path, server: ScoringServer, *more: str) -> None:
    prompts = [Prompt(uid="a", input_ids=(1, 5, 6), text="", columns={})]
    settings = load_config(overrides(student, server.url, *more))
    check_served_teachers(settings, tiny_tokenizer(), [], prompts)


def texts(ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(ids))


def test_a_server_with_the_students_tokens_passes(student: Path):
    with scoring_server(texts=texts) as one, scoring_server(texts=texts) as other:
        checked(student, one, *TOPK, f"teachers.main.served.fallbacks=[{other.url}]")
    requests = ["GET /v1/models 200", "POST /detokenize 200", *["POST /v1/completions 200"] * 3]
    assert one.events == other.events == requests
    assert one.bodies[1]["prompt"] == [0, head_rows(str(student)) - 1]


REFUSED = (400, {"error": {"message": "Requested prompt logprobs of 3, max allowed: 2"}})


@pytest.mark.parametrize(
    ("server", "more", "message"),
    [
        ({"texts": str}, (), "its tokens 0 to"),
        ({"max_model_len": 24}, (), "reads at most 24 tokens, and rollout.max_model_len="),
        ({}, ("teachers.main.served.model=small",), "has the models big, but served.model=small"),
        ({"script": [REFUSED]}, TOPK, "start it with --max-logprobs 3 or more, or lower"),
        ({"script": [scores, (400, b"Token id 22 is out")]}, (), "could draw tokens that this"),
        (
            {"script": [lambda body: (200, {"choices": [{"prompt_logprobs": None}]})]},
            (),
            "it reports no prompt_logprobs",
        ),
        (
            {"script": [scores, scores, lambda b: scores(b | {"prompt": [1, 6, 6]})]},
            (),
            "KeyError: 5",
        ),
    ],
)
def test_a_server_that_cannot_score_for_the_run_is_refused_in_one_sentence(
    student: Path, server: dict, more: tuple[str, ...], message: str
):
    with scoring_server(**{"texts": texts} | server) as running:
        with pytest.raises(ConfigError) as caught:
            checked(student, running, *more)
        assert f"teachers.main.url={running.url}: " in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_answers_about_one_sequence_may_differ_by_rounding_alone(student: Path):
    def shifted(by: float):
        def answer(body: dict):
            status, value = scores(body)
            for entry in value["choices"][0]["prompt_logprobs"][1:]:
                for part in entry.values():
                    part["logprob"] -= by
            return status, value

        return answer

    for by, refused in ((0.04, False), (0.06, True)):
        with scoring_server([scores, scores, shifted(by)], texts=texts) as server:
            if not refused:
                checked(student, server)
                continue
            with pytest.raises(ConfigError, match=r"differ by 0\.06 nats a token in the mean betw"):
                checked(student, server)
    with scoring_server(texts=texts) as one, scoring_server([shifted(1)] * 3, texts=texts) as two:
        with pytest.raises(ConfigError) as caught:
            checked(student, one, f"teachers.main.served.fallbacks=[{two.url}]")
        assert f"teachers.main.served.fallbacks={two.url}: its log-probs" in str(caught.value)
        assert f"differ from those of teachers.main.url={one.url} by 1 nats" in str(caught.value)


def test_a_server_that_is_not_there_is_refused_before_a_worker_starts(student: Path):
    with scoring_server() as server:
        pass
    with pytest.raises(ConfigError) as caught:
        checked(student, server)
    assert f"teachers.main.url={server.url}: did not answer /v1/models" in str(caught.value)
    assert str(caught.value).endswith("or start vLLM's server there")


def test_a_folder_with_the_tokenizer_takes_the_place_of_the_servers_texts(
    student: Path, tmp_path: Path
):
    with scoring_server(texts=str) as server:
        checked(student, server, f"teachers.main.served.tokenizer={student}")
    other = tiny_tokenizer()
    other.add_tokens(["added"])
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((student / "config.json").read_text())
    with scoring_server() as server, pytest.raises(ConfigError) as caught:
        checked(student, server, f"teachers.main.served.tokenizer={tmp_path}")
    assert "'added' has id" in str(caught.value)
    ends = tiny_tokenizer()
    ends.eos_token = "<pad>"
    ends.save_pretrained(tmp_path)
    more = f"teachers.main.served.tokenizer={tmp_path}"
    with scoring_server() as server, pytest.raises(ConfigError, match="its end token is '<pad>'"):
        checked(student, server, more)
    with scoring_server() as server:
        checked(student, server, more, "teachers.main.eos='<pad>'")


def test_the_chat_template_in_that_folder_must_write_the_datas_conversations_as_the_students(
    student: Path, tmp_path: Path
):
    def templated(text: str) -> PreTrainedTokenizerBase:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + text + "{% endfor %}"
        return tokenizer

    templated("=").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((student / "config.json").read_text())
    row = Problem(uid="a", prompt=[{"role": "user", "content": "1"}], columns={}, row="rows:1")
    with scoring_server() as server:
        more = f"teachers.main.served.tokenizer={tmp_path}"
        settings = load_config(overrides(student, server.url, more))
        prompts = [Prompt(uid="a", input_ids=(1, 5, 6), text="", columns={})]
        check_served_teachers(settings, templated("="), [row], prompts)
        with pytest.raises(ConfigError) as caught:
            check_served_teachers(settings, templated("+"), [row], prompts)
    assert "its chat template formats rows:1 differently: '='" in str(caught.value)


URL = "http://host:8000/v1"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("teachers.main.url=host:8000",), "teachers.main.url=host:8000: must be an address"),
        (
            ("teachers.main.served.fallbacks=[ftp://a]",),
            "fallbacks=ftp://a: must be an addr",
        ),
        (("teachers.main.url='http://a/v1?x=1'",), "must end with the path"),
        (("teachers.main.path=x",), "cannot be combined with teachers.main.path=x"),
        (("teachers.main.model=a.py:A",), "cannot be combined with teachers.main.model=a.py:A"),
        (("teachers.main.devices=2",), "divides a model that is loaded here"),
        (("teachers.main.chat_template=own",), "needs teachers.main.path, whose template"),
        (("teachers.main.dtype=bfloat16",), "has chosen its dtype; leave it out"),
        (("algorithm.teacher_fraction=0.5",), "scores responses and writes none"),
        (("teachers.main.evidence=null",), "and the run needs its hidden states; set teachers.mai"),
        (("teachers.main.evidence=vocabulary",), "and the run needs its whole vocabulary"),
        (("teachers.main.evidence=support",), "and the run needs tokens that the sampler chose"),
        (("algorithm.temperature=0.7",), "reports log-probs at temperature 1"),
        (("teachers.main.served.retry_s=560",), "1 servers of teachers.main may take 620 s"),
        (("teachers.main.served.concurrency=0",), "served.concurrency=0: must be at least 1"),
        (("teachers.main.served.request_s=0",), "served.request_s=0.0: must be positive"),
        (("teachers.main.served.max_gap=-1",), "neither may be negative"),
        (("teachers.main.url=null", "teachers.main.api_key=a"), "teachers.main.url is not set"),
        (("teachers.main.url=null",), "teachers.main.served: describes a server"),
    ],
)
def test_settings_that_no_server_can_serve_are_refused_before_anything_is_contacted(
    student: Path, more: tuple[str, ...], message: str
):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides(student, URL, *more))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_key_of_a_server_comes_from_the_environment_and_is_written_nowhere(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key = "canary-7f3a91d2c4"
    monkeypatch.setenv("OF_SERVER", key)
    with scoring_server([(401, {"error": f"no {key}"})]) as server:
        more = "teachers.main.api_key=${oc.env:OF_SERVER}"
        settings = load_config(overrides(student, server.url, more))
        evidence, rule = scoring(settings, "main")
        one = ServedScorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
        with pytest.raises(ServerError) as caught:
            one.score(make_batch(PROMPTS))
    assert server.keys == {f"Bearer {key}"}
    assert "(no ***)" in redact.text(str(caught.value))
    assert key not in to_yaml(settings)
    assert from_yaml(to_yaml(settings)).teachers["main"].api_key == redact.MASK
    assert key not in repr(run_info(settings, tmp_path, None).config)
    with pytest.raises(ConfigError, match=r"teachers\.main\.api_key: a secret must not be written"):
        load_config(overrides(student, server.url, f"teachers.main.api_key={key}"))


def test_a_run_may_continue_with_the_server_at_another_place_and_not_with_another_teacher(
    student: Path,
):
    moved = ("teachers.main.url=http://b:1/v1", "teachers.main.served.concurrency=2")
    before = load_config(overrides(student, URL))
    assert changes(before, load_config(overrides(student, URL, *moved))) == {}
    other = load_config(overrides(student, URL, "teachers.main.served.model=small"))
    assert list(changes(before, other)) == ["teachers.main.served.model"]
    here = load_config(
        ["experiment=quickstart", f"run.dir={student.parent}/run", f"model.path={student}"]
    )
    assert "teachers.main.url" in changes(before, here)


def test_a_served_teacher_takes_no_device_and_its_answers_are_in_the_plan(student: Path):
    settings = load_config(overrides(student, URL, *TOPK))
    (team,) = [team for team in teams(settings) if team.name == "scorer-main"]
    assert (team.gpus, team.heavy) == (0, False)
    plan = make_plan(settings, device="cuda", device_bytes=2**36)
    assert [seat.workers for seat in plan.seats] == [("learner",), ("rollout",)]
    sent = {(edge.source, edge.target): edge.nbytes for edge in plan.edges}
    tokens = plan.sizes.sequences * plan.sizes.tokens
    assert sent["server of main", "scorer-main"] == tokens * 4 * 70
    responses = plan.sizes.sequences * plan.sizes.response
    assert sent["scorer-main", "learner"] == tokens * 4 + responses * 3 * 8
    assert any("server of main" in line for line in plan_lines(plan))
