"""Files of the usual forms are read; any other file is refused in one sentence."""

import bz2
import datetime
import gzip
import json
import logging
import lzma
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.records import load
from hybridrl.data.records import rows as rows_of
from hybridrl.data.row_files import file_rows
from hybridrl.settings.run import DataConfig

LINES = '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "\u00fc"}\n'
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "\u00fc"}]
UTF8 = LINES.encode()


def write(folder: Path, name: str, content: bytes | str) -> str:
    """Write a file; returns its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refusal(folder: Path, name: str, content: bytes | str, **columns: str | None) -> str:
    """The error message about a file with this content, without the folder's name."""
    with pytest.raises(DataError) as caught:
        load(write(folder, name, content), "train", None, columns)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(folder / name)), message
    return message.removeprefix(f"{folder}/")


def chat(*contents: str) -> list[dict[str, str]]:
    """The messages of a conversation between user and assistant, which the user begins."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", UTF8),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.ndjson", b"\xef\xbb\xbf" + UTF8),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-32")),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("a.csv", "prompt,answer\n1+1=,2\n2+2=,\u00fc\n"),
        ("a.csv", "\ufeffprompt, answer\r\n\r\n1+1=,2\r\n2+2=,\u00fc".encode()),
        ("a.tsv", "prompt\tanswer\n1+1=\t2\n2+2=\t\u00fc\n"),
        ("a.jsonl.gz", gzip.compress(UTF8, mtime=0)),
        ("a.JSONL.GZ", gzip.compress(UTF8, mtime=0)),
        ("a.jsonl", gzip.compress(UTF8, mtime=0)),  # recognised by its first bytes
        ("a.csv.gz", gzip.compress("prompt,answer\n1+1=,2\n2+2=,\u00fc\n".encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(UTF8)),
        ("a.jsonl.xz", lzma.compress(UTF8)),
    ],
)
def test_a_file_is_read_whatever_its_format_encoding_and_compression(
    tmp_path: Path, name: str, content: bytes | str
) -> None:
    assert [row for _, row in file_rows(write(tmp_path, name, content))] == ROWS


def test_rows_of_csv_are_numbered_by_the_line_that_they_begin_on(tmp_path: Path) -> None:
    text = 'prompt,answer\n"1\n+1=",2\n\n"say ""2""",2\n'
    first, second = load(write(tmp_path, "a.csv", text), "train")
    assert (first.uid, first.prompt) == ("train-000002", "1\n+1=")
    assert (second.uid, second.prompt) == ("train-000005", 'say "2"')


def test_a_csv_cell_may_be_longer_than_the_modules_own_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "prompt\n" + "1" * 200_000 + "\n")
    assert [len(row["prompt"]) for _, row in file_rows(path)] == [200_000]


GOOD = '{"prompt": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"prompt": "1"', "a.jsonl:2: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", GOOD + "{'prompt': '1'}", "at column 2, before \"'prompt': '1'}\"; write one"),
        ("a.jsonl", GOOD + '"1"', "a.jsonl:2: is of type str; needs an object"),
        (
            "a.json",
            '{\n "data": [\n  {"prompt": "1"}]}',
            "a.json: is one JSON object, with `data`;",
        ),
        ("a.json", '[{"prompt": "1"},\n 7]', "a.json:2: is of type int; needs an object"),
        ("a.json", '[{"prompt": "1"},\n {"prompt": }]', "a.json:2: not JSON: Expecting value at c"),
        ("a.json", "[1]\n" + GOOD, "a.json:1: is of type list; needs an object"),
        (
            "a.jsonl",
            b'{"prompt": "1"}\n{"prompt": "\xfc"}',
            "a.jsonl:2: the byte 0xfc is not valid UTF-8",
        ),
        (
            "a.jsonl",
            LINES.encode("utf-16-le"),
            "a.jsonl:1: holds a NUL byte, so it is not UTF-8 text",
        ),
        ("a.csv", "prompt,answer\n1,2\n3,4,5\n", "a.csv:3: has 3 cells, the header has 2; put"),
        ("a.csv", 'prompt\n"1"1\n', "a.csv:2: not CSV: "),
        ("a.csv", 'prompt\n"1\n', "a.csv:2: not CSV: "),
        ("a.csv", "prompt,prompt\n1,2\n", "a.csv:1: the header names `prompt` twice; give"),
        ("a.csv", "prompt,\n1,2\n", "a.csv:1: the header has a column without a name; give"),
        ("a.csv", "prompt\n", "a.csv: holds no rows"),
        ("a.json", "[]", "a.json: holds no rows"),
        ("a.jsonl.gz", gzip.compress(UTF8, mtime=0)[:-9], "a.jsonl.gz: cannot be unpacked: "),
        ("a.jsonl.gz", b"\x1f\x8bnot gzip at all", "a.jsonl.gz: cannot be unpacked: "),
        ("a.jsonl.xz", lzma.compress(UTF8)[:-9], "a.jsonl.xz: cannot be unpacked: "),
        ("a.xlsx", b"PK\x03\x04...", "a.xlsx: is a zip archive or a spreadsheet; unpack it"),
        ("a.pkl", b"\x80\x04\x95", "a.pkl: is a pickle, which could run any code; save"),
        ("a.jsonl", '{"prompt": ' + "[" * 100_000, "a.jsonl:1: is nested too deep; flatten it"),
        ("a.jsonl", '{"prompt": %s}' % ("[" * 900 + "]" * 900), "nested more than 100 deep; store"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line_and_a_remedy(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    assert message in refusal(tmp_path, name, content)


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path: Path) -> None:
    for name in ("missing.csv.gz", "missing.pq", "missing"):
        with pytest.raises(DataError, match=rf"{name}: there is no such file; correct the path"):
            load(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "1+1=", "answer": "2"},
            "the row has `question`, `answer` and no prompt; set 'data.columns={prompt: "
            "question}', and completion: answer too where the answer is to be imitated",
        ),
        (
            {"Prompt ": "1+1="},
            "the row has `Prompt ` and no prompt; set \"data.columns={prompt: 'Prompt '}\"",
        ),
        (
            {"instruction": "Add.", "input": "1+1=", "output": "2"},
            "as in Alpaca's data: join `instruction` and `input` into one `prompt` and name the "
            "answer by 'data.columns={completion: output}'",
        ),
        (
            {"conversations": [{"from": "human", "value": "1+1="}]},
            "its turns are ShareGPT's: set 'data.columns={messages: conversations}'",
        ),
        ({"dialog": chat("1+1=", "2")}, "set 'data.columns={messages: dialog}', or prompt: dialog"),
        (
            {
                "chosen": "\n\nHuman: 1+1=\n\nAssistant: 2",
                "rejected": "\n\nHuman: 1+1=\n\nAssistant: 3",
            },
            "`chosen` and `rejected` are whole texts without a `prompt`, as in HH-RLHF; cut both "
            "after",
        ),
        (
            {"messages": chat("1+1=")},
            "for a prompt that the model is to answer set 'data.columns={prompt: messages}'",
        ),
        ({"messages": '[{"role": "user"}]'}, "`messages` must be a list of messages"),
        (
            {"x": 1, "y": None},
            "the row has `x` and no prompt; rename the key that holds it to `prompt`",
        ),
        ({}, "the row has no key and no prompt; rename"),
        ({f"k{i}": 1 for i in range(10)}, "`k7` and 2 more and no prompt"),
    ],
)
def test_a_row_of_another_layout_is_refused_with_its_keys_and_a_remedy(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, "a.jsonl", json.dumps(row))


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "responses", "remaining"),
    [
        (
            {"question": "1+1=", "answer": "2"},
            {"prompt": "question"},
            "1+1=",
            (),
            {"question": "1+1=", "answer": "2"},
        ),
        (
            {"question": "1+1=", "answer": "2"},
            {"prompt": "question", "completion": "answer"},
            "1+1=",
            ("2",),
            {"question": "1+1=", "answer": "2"},
        ),
        (
            {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
            {"messages": "conversations"},
            chat("1"),
            ("2",),
            {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]},
        ),
        ({"messages": chat("1+1=")}, {"prompt": "messages"}, chat("1+1="), (), {}),
        (
            {"prompt": "1", "completion": "2", "image": "x"},
            {"completion": None, "image": None},
            "1",
            (),
            {},
        ),
        ({"prompt": "a", "text": "b"}, {"prompt": "text"}, "b", (), {"text": "b"}),
        (
            {"prompt": "1", "solution": "2"},
            {"answer": "solution"},
            "1",
            (),
            {"solution": "2", "answer": "2"},
        ),
        ({"p": "1", "messages": [chat("1", "2")[1]]}, {"prompt": "p"}, "1", ("2",), {"p": "1"}),
    ],
)
def test_data_columns_names_the_key_behind_each_name(
    tmp_path: Path,
    row: dict[str, object],
    columns: dict[str, str | None],
    prompt: object,
    responses: tuple[str, ...],
    remaining: dict[str, object],
) -> None:
    (problem,) = load(write(tmp_path, "a.jsonl", json.dumps(row)), "train", None, columns)
    assert (problem.prompt, problem.responses) == (prompt, responses)
    assert problem.columns == remaining


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"query": "1"},
            {"prompt": "question"},
            "a.jsonl:1: data.columns.prompt=question: the row has no `question`; it has `query`",
        ),
        (
            {"prompt": "1", "answer": "2", "messages": chat("1", "3")},
            {"completion": "answer"},
            "data.columns.completion=answer: is not read, since the row holds `messages` too, "
            "which comes first; leave that out by data.columns.messages=null",
        ),
        (
            {"question": "1", "messages": chat("2", "3")},
            {"prompt": "question"},
            "leave that out by data.columns.messages=null",
        ),
    ],
)
def test_data_columns_that_are_not_in_the_row_or_would_not_be_read_are_refused(
    tmp_path: Path, row: dict[str, object], columns: dict[str, str], message: str
) -> None:
    assert message in refusal(tmp_path, "a.jsonl", json.dumps(row), **columns)


@pytest.mark.parametrize("key", ["messages", "completion"])
def test_a_conversation_that_the_assistant_begins_continues_a_renamed_prompt(
    tmp_path: Path, key: str
) -> None:
    first, second, third = chat("?", "2", "and 2+2=?", "4")[1:]
    sharegpt = [
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "and 2+2=?"},
        {"from": "gpt", "value": "4"},
    ]
    for turns in ([first, second, third], sharegpt):
        row = json.dumps({"question": "1+1=", key: turns})
        path = write(tmp_path, "a.jsonl", row)
        [problem] = load(path, "train", None, {"prompt": "question"})
        assert problem.prompt == [{"role": "user", "content": "1+1="}, first, second]
        assert problem.responses == ("4",)


def test_data_columns_are_refused_where_no_rows_are_read_or_a_key_is_not_text() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns=.*data\.task=countdown reads no rows"):
        DataConfig(columns={"prompt": "question"})
    with pytest.raises(ConfigError, match=r"data\.columns\.prompt=3: must be the name of a key"):
        DataConfig(task="records", path="a", heldout_path="b", columns={"prompt": 3})


def test_a_column_that_is_not_json_is_dropped_from_all_rows_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deep = "[" * 900 + "]" * 900
    text = (
        '{"prompt": "1", "n": 1, "deep": 0, "half": "a"}\n{"prompt": "2", "n": 2, "deep": %s, '
        '"half": "\\ud800"}\n'
    )
    with caplog.at_level(logging.WARNING):
        problems = load(write(tmp_path, "a.jsonl", text % deep), "train")
    assert [p.columns for p in problems] == [{"n": 1}, {"n": 2}]
    assert [r.getMessage().split("left out")[0] for r in caplog.records] == [
        "the column `deep` is ",
        "the column `half` is ",
    ]
    assert "a.jsonl:2: it is nested more than 100 deep" in caplog.text


def test_parquet_cells_that_python_cannot_represent_affect_no_other_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    year_300000 = pyarrow.array([9_404_260_761_600, 0], pyarrow.timestamp("s"))
    table = pyarrow.table(
        {
            "prompt": ["1", "2"],
            "n": [1, 2],
            "far": year_300000,
            "zone": pyarrow.array([0, 1], pyarrow.timestamp("s", tz="Mars/Olympus")),
            "day": [datetime.date(2024, 1, 1)] * 2,
            "image": [b"\xff", b""],
        }
    )
    for name in ("a.pq", "a.parquet", "no_ending"):
        parquet.write_table(table, tmp_path / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            problems = load(str(tmp_path / name), "train")
        assert [(p.prompt, p.columns) for p in problems] == [("1", {"n": 1}), ("2", {"n": 2})]
        assert all(f"`{key}` is left out" in caplog.text for key in ("far", "zone", "day", "image"))
    with pytest.raises(DataError, match=r"a\.pq:1: `prompt` cannot be read: OverflowError"):
        load(str(tmp_path / "a.pq"), "train", None, {"prompt": "far"})
    (tmp_path / "b.pq.gz").write_bytes(gzip.compress((tmp_path / "a.pq").read_bytes()))
    assert len(load(str(tmp_path / "b.pq.gz"), "train")) == 2


def test_a_folder_with_one_bad_file_names_that_file(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    write(tmp_path, "rows/a.jsonl", GOOD)
    write(tmp_path, "rows/b.jsonl", GOOD + '{"prompt": \n')
    with pytest.raises(DataError, match=r"rows/b\.jsonl:2: not JSON"):
        load(str(tmp_path / "rows"), "train")


def test_a_datasets_row_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    far = pyarrow.array([0, 9_404_260_761_600], pyarrow.timestamp("s"))
    datasets.Dataset(pyarrow.table({"prompt": ["1", "2"], "far": far})).save_to_disk(tmp_path / "d")
    with pytest.raises(
        DataError, match=r"d:2: cannot be read: OverflowError: .*; remove the column"
    ):
        load(str(tmp_path / "d"), "train")


def test_columns_of_mixed_types_are_values_and_not_their_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This is about a folder of data files. The library stores such columns as JSON text, in which
    it does not distinguish "2" from 2.
    """
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    text = '{"prompt": "1+1=", "answer": "two"}'
    messages = '{"prompt": [{"role": "user", "content": "2+2="}], "answer": {"value": 4}}'
    write(tmp_path, "rows/a.jsonl", f"{text}\n{messages}\n")
    first, second = load(str(tmp_path / "rows"), "train")
    assert (first.prompt, first.columns) == ("1+1=", {"answer": "two"})
    assert second.prompt == [{"role": "user", "content": "2+2="}]
    assert second.columns == {"answer": {"value": 4}}
    assert "rows: the values of `prompt`, `answer` differ in type between rows" in caplog.text
    caplog.clear()
    first, _ = load(str(tmp_path / "rows" / "a.jsonl"), "train")
    assert first.prompt == "1+1=" and caplog.text == ""


def test_a_saved_dataset_has_no_split_but_its_own(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "1"}]
    whole, part = tmp_path / "whole", tmp_path / "part"
    datasets.Dataset.from_list(rows).save_to_disk(whole)
    datasets.Dataset.from_list(rows, split="test").save_to_disk(part)
    for path in (f"{whole}", f"{part}", f"{part}:test"):
        assert list(rows_of(path)) == [(1, {"prompt": "1"})]
    with pytest.raises(DataError, match=rf"^{whole}:test: the dataset was .*; write {whole}$"):
        rows_of(f"{whole}:test")
    with pytest.raises(
        DataError, match=rf"name one of its splits, e\.g\. {part}:test; it has test"
    ):
        rows_of(f"{part}:train")


def test_a_dataset_with_a_loading_script_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "squad").mkdir()
    write(tmp_path, "squad/squad.py", "import datasets\n")
    with pytest.raises(
        DataError, match=r"squad: no dataset can be read there: Dataset scripts are no longer supp"
    ):
        load(str(tmp_path / "squad"), "train")


def test_messages_and_tools_of_a_table_have_no_keys_of_other_rows(tmp_path: Path) -> None:
    """This holds for a table that `save_to_disk` wrote as for one in Parquet."""
    datasets = pytest.importorskip("datasets")

    def called(name: str, arguments: dict[str, int]) -> list[dict]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]

    rows = [{"messages": called("add", {"a": 1, "b": 2})}, {"messages": called("double", {"x": 3})}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    _, second = rows_of(str(tmp_path / "d"))
    assert second == (2, rows[1])


def test_an_image_column_is_dropped_without_being_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"prompt": ["1"], "image": [{"bytes": b"no image", "path": None}]},
        features=datasets.Features(prompt=datasets.Value("string"), image=datasets.Image()),
    )
    rows.save_to_disk(tmp_path / "d")
    (problem,) = load(str(tmp_path / "d"), "train")
    assert (problem.prompt, problem.columns) == ("1", {})


def test_held_out_prompts_that_are_training_prompts_too_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path, "a.jsonl", '{"prompt": "1"}\n{"prompt": "2"}\n')
    for heldout, warning in (
        (train, "2 of 2 held-out prompts"),
        (write(tmp_path, "b.csv", "prompt\n3\n2\n"), "1 of 2 held-out prompts"),
        (write(tmp_path, "c.csv", "prompt\n3\n"), ""),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_problems(DataConfig(task="records", path=train, heldout_path=heldout), seed=0)
        assert warning in caplog.text and bool(warning) == bool(caplog.text)
