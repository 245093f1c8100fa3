"""Folders that appear with all their files at once, and may replace other folders."""

from pathlib import Path

import pytest

from hybridrl.core.folders import new_folder

FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "[]"}


def write(folder: Path) -> None:
    with new_folder(folder) as unfinished:
        for name, text in FILES.items():
            (unfinished / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_folder_and_the_one_that_it_replaces_have_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "export"
    write(folder)
    assert texts(folder) == FILES and folder.stat().st_mode & 0o777 == 0o755
    (folder / "more.txt").write_text("of before")
    write(folder)
    assert texts(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "export")
    (tmp_path / "empty").mkdir()
    for name in ("export", "empty", "new"):
        with pytest.raises(OSError, match="full"), new_folder(tmp_path / name) as unfinished:
            (unfinished / "model.safetensors").write_text("half")
            raise OSError("the disk is full")
    assert texts(tmp_path / "export") == FILES
    assert list((tmp_path / "empty").iterdir()) == []
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 2


def test_an_empty_folder_is_filled_and_stays_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted volume cannot be replaced by renaming, and may be a shell's working directory."""
    folder = tmp_path / "volume"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    number = folder.stat().st_ino
    write(tmp_path / "link")
    assert texts(folder) == FILES and (tmp_path / "link").is_symlink()
    assert folder.stat().st_ino == number
    for path in folder.iterdir():
        path.unlink()
    monkeypatch.chdir(folder)
    write(Path("."))
    assert texts(folder) == FILES and folder.stat().st_ino == number
    assert {path.name for path in tmp_path.iterdir()} == {"volume", "link"}
