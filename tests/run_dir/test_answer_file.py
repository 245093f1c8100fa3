"""A file of answers is continued after its last row, and refused if other rows would follow."""

import errno
import json
import os
from pathlib import Path

import pytest

from hybridrl.core import json_lines
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.run_dir.answer_file import opened, read_rows, state_folder

CONDITIONS = {"the seed": 3, "the temperature": 1.0}


def row(uid: str, text: str = "x") -> dict[str, str]:
    return {"uid": uid, "text": text}


def uids(path: Path) -> list[str]:
    return [row["uid"] for row in read_rows(path)]


def test_a_continued_file_knows_its_rows_and_ends_in_the_order_of_the_prompts(tmp_path: Path):
    path = tmp_path / "new" / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("c"), row("a", "zwei Zeilen:\n ä")])
    with opened(path, CONDITIONS) as file:
        assert file.done == {"a", "c"}
        file.append([row("b")])
        file.put_in_order(["a", "b", "c"])
    assert list(read_rows(path)) == [row("a", "zwei Zeilen:\n ä"), row("b"), row("c")]
    with opened(path, CONDITIONS) as file:
        assert list(file.spans) == ["a", "b", "c"]


def test_a_row_that_a_kill_cut_short_is_removed(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("a")])
    with path.open("a") as torn:
        torn.write('{"uid": "b", "te')
    with opened(path, CONDITIONS) as file:
        assert file.done == {"a"}
        file.append([row("b")])
    assert uids(path) == ["a", "b"]


def test_other_settings_are_refused_and_each_difference_is_named(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("a")])
    with (
        pytest.raises(ConfigError) as caught,
        opened(path, {"the seed": 4, "the temperature": 1.0, "model.eos": None}),
    ):
        pass
    assert "(the seed: 3 -> 4, model.eos: (not set) -> None)" in str(caught.value)
    assert uids(path) == ["a"]


def test_a_file_without_rows_is_begun_anew_with_other_settings(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS):
        pass
    with opened(path, {"the seed": 4}):
        pass
    saved = json.loads((state_folder(path) / "settings.json").read_text())
    assert saved == {"the seed": 4}


def test_a_users_own_file_is_not_written_to(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"uid": "a"}\n')
    with pytest.raises(ConfigError, match="was not begun by"), opened(path, CONDITIONS):
        pass


def test_a_file_is_written_by_one_command_at_a_time(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with (
        opened(path, CONDITIONS),
        pytest.raises(ConfigError, match="another command is writing it"),
        opened(path, CONDITIONS),
    ):
        pass


@pytest.mark.parametrize("line", ["[]", "{}", '{"uid": []}', "[" * 100_000])
def test_a_damaged_row_is_named(tmp_path: Path, line: str):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("a")])
    with path.open("a") as damaged:
        damaged.write(f"{line}\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, line 2"), opened(path, CONDITIONS):
        pass


def test_a_row_that_stands_twice_is_named(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("a"), row("b")])
    with path.open("a") as edited:
        edited.write('{"uid": "a"}\n')
    message = r"answers\.jsonl, line 3: another row with the uid 'a'; remove one"
    with pytest.raises(DataError, match=message), opened(path, CONDITIONS):
        pass
    assert uids(path) == ["a", "b", "a"]


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_conditions_are_one_sentence(tmp_path: Path, text: str):
    path = tmp_path / "answers.jsonl"
    with opened(path, CONDITIONS) as file:
        file.append([row("a")])
    (state_folder(path) / "settings.json").write_text(text)
    message = r"settings\.json: is damaged, .*; choose another --out"
    with pytest.raises(ConfigError, match=message), opened(path, CONDITIONS):
        pass


def test_rows_that_a_full_disk_cut_short_are_made_anew_and_the_whole_ones_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two rows of 26 bytes each are appended, and the disk is full after 40 bytes."""
    path = tmp_path / "answers.jsonl"
    write = os.write
    room = [40]

    def fill(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, data[: room[0]])
        room[0] -= taken
        return taken

    with opened(path, CONDITIONS) as file:
        monkeypatch.setattr(json_lines.os, "write", fill)
        with pytest.raises(OSError, match="No space left"):
            file.append([row("a"), row("b")])
        monkeypatch.undo()
    assert path.stat().st_size == 40
    with opened(path, CONDITIONS) as file:
        assert file.done == {"a"}
        file.append([row("b")])
    assert list(read_rows(path)) == [row("a"), row("b")]
