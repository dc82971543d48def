import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtorch import ConfigError, disk


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    disk.replace(path, "one")
    with pytest.raises(KeyboardInterrupt), disk.whole(path) as file:
        file.write(b"half of t")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"], "nothing half written stays"


def test_a_file_gets_its_name_only_once_it_is_on_disk(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (order.append(n), r(*a)))
    disk.replace(tmp_path / "a.txt", "one")
    assert order == ["fsync", "replace", "fsync"], "the file, its name, the folder"


def test_a_private_file_is_for_its_owner(tmp_path):
    (tmp_path / "a.pt.part").write_text("left by a kill, for everybody to read")
    with disk.whole(tmp_path / "a.pt", private=True) as file:
        file.write(b"x")
    assert (tmp_path / "a.pt").stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    disk.sync_folder(tmp_path)


def test_a_folder_has_one_holder_and_a_killed_one_lets_go(tmp_path):
    hold = (
        "import sys\nfrom pathlib import Path\nfrom fedtorch.disk import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError, match="is in use by another process"), disk.locked(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    with disk.locked(tmp_path) as note:
        assert note is None
        with pytest.raises(ConfigError, match="in use"), disk.locked(tmp_path):
            pass


def test_a_folder_that_cannot_be_locked_is_said(tmp_path, monkeypatch):
    def none(_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk, "_take", none)
    with disk.locked(tmp_path) as note:
        assert note is not None and "cannot be locked (No locks available)" in note


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"), disk.locked(Path(tmp_path / "no")):
        pass


def test_a_full_disk_says_which_file_it_could_not_take(tmp_path):
    with pytest.raises(OSError) as e, disk.whole(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "no room")
    assert disk.reason(e.value) == f"{tmp_path / 'a'}: no room"
