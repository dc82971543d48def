import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedtorch import ConfigError, disk
from fedtorch.commands import given
from fedtorch.data import Npz, frames, idx, labelled, pictures, separated, text
from fedtorch.data.base import Preparation
from fedtorch.data.prepared import Prepared
from fedtorch.privacy.accounting.journal import Journal
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.rounds.clock import Trace
from fedtorch.run import checkpoint, cli
from fedtorch.sites import keys, sealed, serve
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.sites.openings import Openings
from fedtorch.sites.rpc import read_keys
from fedtorch.sites.state import Answered, VisitMemory
from fedtorch.sites.statistics import Told


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


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_that_takes_no_new_name_is_not_held_though_its_lock_can_be_opened(
    tmp_path, monkeypatch, locks
):
    def closed(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / disk.LOCK).touch()
    monkeypatch.setattr(Path, "write_text", closed)
    if not locks:
        monkeypatch.setattr(disk, "_take", lambda _: (_ for _ in ()).throw(OSError(37, "none")))
    with (
        pytest.raises(ConfigError, match="cannot be written: Permission denied"),
        disk.locked(tmp_path),
    ):
        pass


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"), disk.locked(Path(tmp_path / "no")):
        pass


def test_a_full_disk_says_which_file_it_could_not_take(tmp_path):
    with pytest.raises(OSError) as e, disk.whole(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "no room")
    assert disk.reason(e.value) == f"{tmp_path / 'a'}: no room"


def test_a_pipe_a_socket_and_a_device_are_no_files_and_nothing_waits_for_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("heard")
    Path("link").symlink_to("pipe")
    for name, kind in (
        ("pipe", "pipe"),
        ("heard", "socket"),
        ("link", "pipe"),
        (os.devnull, "device"),
    ):
        with pytest.raises(OSError, match=f"{Path(name).name} is a {kind}, not a file"):
            disk.regular(Path(name))
    listening.close()
    for path in (tmp_path, tmp_path / "gone"):
        assert disk.regular(path) == path


PREPARED = Prepared("d", "classification", 2, {"input_shape": [4]}, Preparation())

READERS = {
    "config.toml": cli.read,
    ".lock": lambda path: disk.locked(path.parent).__enter__(),
    ".writable": lambda path: disk.try_out(path.parent),
    "ledger.jsonl": Journal.read,
    "new.jsonl": lambda path: Journal.create(path, {}),
    "shown.jsonl": Ledger.look,
    "round-000001.pt": lambda path: checkpoint.load(path.parent),
    "memory.pt": lambda path: VisitMemory(path.parent),
    "runs.json": lambda path: Answered(path.parent),
    "statistics.json": lambda path: Told(path.parent),
    "openings.jsonl": lambda path: Openings(path.parent),
    "ledger-example.json": lambda path: SiteLedgers(path.parent, "a", 1.0, 1e-5),
    "ledger-example.jsonl": lambda path: SiteLedgers(path.parent, "a", 1.0, 1e-5),
    "sites.json": lambda path: serve.known(path.parent, True),
    "key.pem": lambda path: read_keys(path.parent),
    "ca/key.pem": lambda path: keys.make(path.parent.parent, ["localhost"], ["a"], 2),
    "he.public": sealed.read_public,
    "table.csv": separated.read,
    "table.parquet": frames.parquet,
    "text.txt": text.read,
    "words.txt": lambda path: labelled.words_of(str(path)),
    "train-images-idx3-ubyte": idx.read_idx,
    "data.npz": lambda path: Npz(str(path)).load(0),
    "picture.png": lambda path: pictures.looks([str(path)]),
    "trace.csv": lambda path: Trace(path=str(path)),
    "new.npy": lambda path: given.examples(PREPARED, path),
}


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_read_may_turn_out_to_be_a_device(tmp_path, name):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(os.devnull)
    with pytest.raises((ConfigError, OSError), match="is a device, not a file"):
        READERS[name](path)
