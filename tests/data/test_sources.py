"""Several sources of prompts: the share and order of each, and the cursor that a checkpoint
stores.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError, DataError, LedgerError
from hybridrl.data.mixture import PromptMixture, prompt_cursor
from hybridrl.data.problem import Problem, source_of
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.prompts import PromptSource
from hybridrl.data.route import takes
from hybridrl.data.turns import Turns
from hybridrl.launch.dry_run import source_lines, step_sizes
from hybridrl.run_dir.ledger import check_cursor, drawn_uids
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import DataConfig
from hybridrl.settings.sources import SourceConfig
from hybridrl.types import Prompt


def rows_file(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(**sizes: int) -> list[Prompt]:
    """A number of prompts of each source, e.g. a/0, a/1, b/0."""
    return [
        Prompt(uid=f"{name}/{i}", input_ids=(1,), text="", columns={})
        for name, size in sizes.items()
        for i in range(size)
    ]


def test_held_out_rows_that_are_training_rows_too_are_counted_by_the_settings_of_their_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = rows_file(tmp_path / "train.jsonl", {"prompt": "a"}, {"prompt": "b"})
    held_out = rows_file(tmp_path / "held_out.jsonl", {"prompt": "c"}, {"prompt": "b"})
    alone = DataConfig(task="records", path=train, heldout_path=held_out)
    load_problems(alone, 0)
    mixed = DataConfig(sources={"math": SourceConfig(path=train, heldout_path=held_out)})
    load_problems(mixed, 0)
    for section, warning in zip(("data", "data.sources.math"), caplog.messages, strict=True):
        assert warning.startswith(
            f"{section}.heldout_path={held_out}: 1 of 2 held-out prompts are in "
            f"{section}.path={train} too, {held_out}:2 the first; "
        )


def test_a_generator_that_has_fewer_than_half_of_the_problems_it_is_asked_for_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two numbers of 1 to 2 give few equations, and prime_factorization has 19 questions here."""
    config = DataConfig(num_train=500, num_heldout=2, options={"num_numbers": 2, "max_number": 2})
    train, _ = load_problems(config, 0)
    assert 0 < len(train) < 10
    source = SourceConfig(
        task="reasoning_gym",
        dataset="prime_factorization",
        options={"min_value": 2, "max_value": 20},
    )
    mixed = DataConfig(num_train=500, num_heldout=2, sources={"primes": source})
    primes, heldout = load_problems(mixed, 0)
    assert len(primes) == 19 - len(heldout) == 17
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"data.num_train=500: countdown gave only {len(train)} different problems",
        "data.num_train=500: prime_factorization gave only 17 different problems",
    ]
    caplog.clear()
    few, _ = load_problems(replace(mixed, num_train=10), 0)
    assert 5 <= len(few) < 10
    assert caplog.text == ""


def test_held_out_rows_that_are_training_rows_of_another_source_are_counted_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = rows_file(tmp_path / "first.jsonl", {"prompt": "a"}, {"prompt": "b"})
    second = rows_file(tmp_path / "second.jsonl", {"prompt": "c"})
    a = SourceConfig(path=first)
    b = SourceConfig(path=second, heldout_path=first)
    load_problems(DataConfig(sources={"a": a, "b": b}), 0)
    [warning] = caplog.messages
    assert warning.startswith(
        f"data.sources.b.heldout_path={first}: 2 of 2 held-out prompts are in "
        f"data.sources.a.path={first} too"
    )


# -- whose turn it is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ({"a": 3, "b": 1}, "aabaaaba"),
        ({"a": 1, "b": 1, "c": 1}, "abcabc"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, "abcaabca"),
        ({"a": 7}, "aaaa"),
    ],
)
def test_sources_take_turns_by_their_weights(weights: dict[str, float], turns: str) -> None:
    taken = Turns(weights)
    assert "".join(taken.next() for _ in turns) == turns


@pytest.mark.parametrize(
    "weights", [(3, 1), (1, 1, 1), (0.7, 0.2, 0.1), (50, 3, 2, 1), (1e-3, 1, 1, 1, 1), (5,)]
)
def test_each_source_has_its_share_of_any_number_of_turns_to_within_one(
    weights: tuple[float, ...],
) -> None:
    """With k sources the difference is at most 1 - 1 / (2 k - 2), half a turn for two of them."""
    taken = Turns({str(i): weight for i, weight in enumerate(weights)})
    k = len(weights)
    for turn in range(1, 300):
        taken.next()
        for i, weight in enumerate(weights):
            share = turn * weight / sum(weights)
            limit = 1 - 1 / (2 * k - 2) if k > 1 else 0
            assert abs(taken.taken[str(i)] - share) <= limit + 1e-9


def test_weights_count_as_they_are_written() -> None:
    """In binary, 0.1 is slightly more than a tenth, but ten turns have exactly one of its
    source.
    """
    taken = Turns({"a": 0.1, "b": 0.9})
    assert Counter(taken.next() for _ in range(1000)) == {"a": 100, "b": 900}


# -- the cursor ------------------------------------------------------------------------------------


def mixture(seed: int = 0, **weights: float) -> PromptMixture:
    return PromptMixture(prompts(a=3, b=4), seed, weights or {"a": 3, "b": 1})


def test_each_source_has_epochs_and_an_order_of_its_own() -> None:
    """Of 12 prompts, 9 are from a, which are three epochs of 3, and 3 are from b, less than one
    epoch of 4.
    """
    drawn = [p.uid for p in mixture().next_batch(12)]
    assert [source_of(uid) for uid in drawn] == list("aabaaabaaaba")
    of_a = [uid for uid in drawn if source_of(uid) == "a"]
    for epoch in range(3):
        names = {f"a/{i}@{epoch}" for i in range(3)}
        assert set(of_a[3 * epoch : 3 * epoch + 3]) == names
    assert [uid.partition("@")[2] for uid in drawn if source_of(uid) == "b"] == ["0", "0", "0"]
    alone = PromptMixture(prompts(a=3), 0, {"a": 1}).next_batch(9)
    assert [p.uid for p in alone] == of_a, "other sources do not change its order"


def test_sources_of_one_size_have_different_orders() -> None:
    drawn = PromptMixture(prompts(a=50, b=50), 0, {"a": 1, "b": 1}).next_batch(100)
    of_a, of_b = ([p.uid[2:] for p in drawn if source_of(p.uid) == name] for name in "ab")
    assert sorted(of_a) == sorted(of_b) and of_a != of_b


@pytest.mark.parametrize("batches", range(6))
def test_a_restored_mixture_continues_exactly_with_the_prompts_that_it_owes(batches: int) -> None:
    whole, stopped = mixture(seed=3), mixture(seed=3)
    for _ in range(batches):
        whole.next_batch(5)
        stopped.next_batch(5)
    in_flight = stopped.next_batch(5)
    whole.put_back(whole.next_batch(5))
    resumed = mixture(seed=3)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict(in_flight))))
    assert [resumed.next_batch(5) for _ in range(5)] == [whole.next_batch(5) for _ in range(5)]
    assert resumed.state_dict() == whole.state_dict()


def test_a_checkpoint_of_other_sources_is_refused() -> None:
    state = mixture().state_dict()
    with pytest.raises(DataError, match=r"is of the data sources a, b, and data\.sources has a, c"):
        PromptMixture(prompts(a=3, c=4), 0, {"a": 3, "c": 1}).load_state_dict(state)
    with pytest.raises(DataError, match=r"\(one without a name\), and data.sources has a, b"):
        mixture().load_state_dict(PromptSource(prompts(a=3), 0).state_dict())
    state["sources"]["b"]["position"] = 5
    with pytest.raises(DataError, match=r"at prompt 5 of an epoch; data\.sources\.b has only 4"):
        mixture().load_state_dict(state)


def test_with_other_weights_shares_are_counted_from_the_checkpoint_on() -> None:
    """After 8 prompts, 6 of them from a, the weights become equal; b does not catch up on the
    earlier difference.
    """
    before = mixture()
    before.next_batch(8)
    after = mixture(a=1, b=1)
    after.load_state_dict(before.state_dict())
    assert [source_of(p.uid) for p in after.next_batch(6)] == list("ababab")


def test_a_source_without_prompts_is_refused_by_its_name() -> None:
    with pytest.raises(DataError, match=r"no training prompts of data\.sources\.b"):
        prompt_cursor(prompts(a=2), 0, {"a": 1, "b": 1})
    assert isinstance(prompt_cursor(prompts(a=2), 0, {}), PromptSource)


def test_epochs_are_the_prompts_drawn_over_those_of_the_source() -> None:
    made = mixture()
    made.next_batch(8)
    assert made.epochs() == {"a": 2.0, "b": 0.5}
    assert PromptSource(prompts(a=2), 0).epochs() == {}


def test_the_prompts_before_the_cursors_of_all_sources_are_known(tmp_path: Path) -> None:
    made = mixture(seed=5)
    uids = [p.uid for p in made.next_batch(9)]
    state = made.state_dict(made.next_batch(2))
    assert sorted(drawn_uids(prompts(a=3, b=4), 5, state)) == sorted(uids)
    check_cursor(tmp_path, prompts(a=3, b=4), state)
    state["sources"]["b"]["epoch"] = 10**12
    with pytest.raises(LedgerError, match="records 0 prompts, but the checkpoint's cursor is at"):
        check_cursor(tmp_path, prompts(a=3, b=4), state)
    with pytest.raises(DataError, match=r"is of the data sources a, b, and data\.sources has a;"):
        drawn_uids(prompts(a=3), 5, state)


# -- the problems ----------------------------------------------------------------------------------


def test_problems_have_the_name_of_their_source_unless_the_file_has_one(tmp_path: Path) -> None:
    own = {"prompt": "1", "data_source": "gsm"}
    file = rows_file(tmp_path / "rows.jsonl", own, {"prompt": "2"})
    heldout = rows_file(tmp_path / "heldout.jsonl", {"prompt": "3"}, {"prompt": "4"})
    config = DataConfig(
        sources={
            "rows": SourceConfig(path=file, heldout_path=heldout),
            "sums": SourceConfig(task="countdown"),
        },
        num_train=5,
        num_heldout=3,
    )
    train, held = load_problems(config, seed=0)
    assert [p.uid for p in train[:3]] == [
        "rows/train-000001",
        "rows/train-000002",
        "sums/train-000000",
    ]
    assert [p.columns["data_source"] for p in train[:3]] == ["gsm", "rows", "sums"]
    assert len(train) == 7 and train[2].columns.keys() >= {"numbers", "target"}
    assert [p.uid.split("-")[0] for p in held] == [
        "rows/heldout",
        "sums/heldout",
        "rows/heldout",
        "sums/heldout",
        "sums/heldout",
    ], "in turn, as far as each has one"
    alone, _ = load_problems(DataConfig(num_train=5, num_heldout=3), seed=0)
    assert [p.prompt for p in train[2:]] == [p.prompt for p in alone]
    assert "data_source" not in alone[0].columns and source_of(alone[0].uid) is None


def test_a_column_that_a_file_lacks_is_named_with_the_file_and_its_columns(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "b.jsonl", {"prompt": "1", "target": 2})
    columns = {**SourceConfig().columns, "prompt": "question"}
    source = SourceConfig(path=file, heldout_path=file, columns=columns)
    with pytest.raises(
        DataError,
        match=r"b\.jsonl:1: data\.sources\.b\.columns\.prompt=question: the row has no `question`; "
        "it has `prompt`, `target`",
    ):
        load_problems(DataConfig(sources={"b": source}), seed=0)


def test_an_error_of_a_generator_names_the_setting_of_the_source() -> None:
    source = SourceConfig(task="countdown", options={"numbers": 3})
    with pytest.raises(ConfigError, match=r"^data\.sources\.sums\.options=\{'numbers': 3\}: "):
        load_problems(DataConfig(sources={"sums": source}), seed=0)


def problem(**columns: object) -> Problem:
    return Problem(uid="u", prompt="1", columns=columns, row="r")


def test_a_route_takes_the_rows_that_have_all_of_its_values() -> None:
    assert takes({"data_source": "a"}, problem(data_source="a", level=1).columns)
    assert not takes({"data_source": "a", "level": 2}, problem(data_source="a", level=1).columns)
    assert takes({}, {})


# -- the settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"path": "a", "weight": 0.0}, "weight=0.0: must be positive and finite"),
        ({"path": "a", "weight": -1.0}, "weight=-1.0: must be positive"),
        ({"path": "a", "weight": float("inf")}, "weight=inf: must be positive and finite"),
        ({"path": "a", "weight": float("nan")}, "weight=nan: must be positive and finite"),
        ({"path": "a", "task": "countdown"}, ": has task=countdown and path=a; .* leave one of"),
        ({}, ": has neither a path nor a task; write data.sources.s.path=FILE"),
        ({"task": "sudoku"}, "task=sudoku: must be countdown or reasoning_gym"),
        (
            {"task": "records"},
            "task=records: must be .*; to read rows, set only data.sources.s.path",
        ),
        ({"task": "reasoning_gym"}, "needs data.sources.s.dataset"),
        ({"path": "a", "options": {"x": 1}}, "options=.*: is not read with the rows of"),
        ({"task": "countdown", "heldout_path": "b"}, "heldout_path=b: is not read with .*task="),
        ({"task": "countdown", "columns": {"prompt": "q"}}, "columns=.*: is not read with"),
        ({"path": "a", "heldout_path": "b", "columns": {"prompt": 3}}, "columns.prompt=3: must be"),
        ({"path": "a"}, "none has held-out problems"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(source: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.sources.*{sentence}"):
        DataConfig(sources={"s": SourceConfig(**source)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "single",
    [{"path": "x"}, {"task": "records"}, {"dataset": "x"}, {"options": {"x": 1}}],
)
def test_settings_of_a_single_source_are_refused_beside_several(single: dict[str, object]) -> None:
    sources = {"s": SourceConfig(task="countdown")}
    [name] = single
    with pytest.raises(ConfigError, match=rf"^data\.{name}=.*: belongs to a single source, .* s;"):
        DataConfig(sources=sources, **single)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a/b", "a b", "a.b", "", "@"])
def test_the_name_of_a_source_is_a_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="must be a plain word"):
        DataConfig(sources={name: SourceConfig(task="countdown")})


# -- the dry run -----------------------------------------------------------------------------------


def test_a_dry_run_lists_share_prompts_passes_and_judges_of_each_source() -> None:
    """In 20 steps with 8 prompts, 120 prompts are from a, which has 6, and 40 from b, which has
    4.
    """
    settings = load_config(
        [
            "experiment=quickstart",
            "run.dir=here",
            "train.steps=20",
            "train.prompts_per_step=8",
            "+data.sources={a: {task: countdown, weight: 3}, b: {task: countdown}}",
            "+reward.functions.countdown.route={data_source: a}",
        ]
    )
    given = [
        replace(prompt, columns={"data_source": source_of(prompt.uid)})
        for prompt in prompts(a=6, b=4)
    ]
    assert list(source_lines(settings, given, given[:2])) == [
        "  a       75.0% of a step (weight 3): 6 training prompts, passed over 20 times, 2 held "
        "out; prompts of 1 to 1 tokens (median 1); judged by countdown",
        "  b       25.0% of a step (weight 1): 4 training prompts, passed over 10 times, 0 held "
        "out; prompts of 1 to 1 tokens (median 1); judged by no reward function",
    ]
    assert step_sizes(settings, 10) == "8 prompts x 4 responses = 32"
