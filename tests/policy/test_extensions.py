"""A process that was killed while it compiled an extension does not stop later runs."""

from pathlib import Path

import pytest
from filelock import FileLock

from hybridrl.policy import extensions
from hybridrl.policy.extensions import ExtensionError, build_extension


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is in the folder whenever the extension is built there."""
    seen: list[str] = []

    def build() -> None:
        seen.append(", ".join(sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*"))))

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "build_shm_op", build)
    return seen


def test_the_mark_of_a_killed_build_is_removed_before_the_next_one(
    tmp_path: Path, events: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "shm_comm").mkdir()
    (tmp_path / "shm_comm" / "lock").touch()
    (tmp_path / "shm_comm" / "shm.so").touch()
    build_extension()
    assert events == ["shm_comm/shm.so"]
    assert "left by a process that ended while it compiled" in caplog.text


def test_a_build_that_is_under_way_is_waited_for_and_its_mark_remains(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "BUILD_S", 0.0)
    (tmp_path / "shm_comm").mkdir()
    (tmp_path / "shm_comm" / "lock").touch()
    with (
        FileLock(tmp_path / ".hybridrl.lock"),
        pytest.raises(ExtensionError, match="another process has held it for 0 s"),
    ):
        build_extension()
    assert events == [] and (tmp_path / "shm_comm" / "lock").exists()
