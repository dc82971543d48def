"""A Python whose server of forks is another one gets workers that are no copies, and is told so."""

import multiprocessing.forkserver as server
import os
import sys
from types import SimpleNamespace

import pytest

from conftest import make_clients, mlp
from fedtorch import Recipe, Server
from fedtorch.engines import Processes
from fedtorch.engines.workers import forks, worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only there a process is copied")


def keyed(listener_fd, alive_r, preload, main_path=None, sys_path=None, *, authkey_r=None):
    """As it is from Python 3.14 on."""


CHANGES = {
    "attribute": lambda m: m.setattr(
        server._forkserver, "_forkserver_authkey", None, raising=False
    ),
    "argument": lambda m: m.setattr(server, "main", keyed),
    "name": lambda m: m.delattr("multiprocessing.connection.arbitrary_address"),
    "version": lambda m: m.setattr(sys, "version_info", (3, 14, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_known_is_not_copied_and_said(change, monkeypatch):
    assert forks.strange() is None
    CHANGES[change](monkeypatch)
    assert not forks.safe()
    made = forks.Forks()
    assert not made.pid and "copies is not known" in made.notes[0]


class Ready:
    """A worker in name."""

    def __init__(self, forks, device, body, block) -> None:
        self.started = forks

    def wait_ready(self) -> None:
        """It is."""

    def end(self) -> None:
        """It does."""


def test_a_session_with_workers_says_it(monkeypatch):
    monkeypatch.setattr("fedtorch.engines.workers.processes.Worker", Ready)
    CHANGES["attribute"](monkeypatch)
    server = Server(mlp(), make_clients([4, 4]), Recipe(), engine=Processes(workers=1, chunk=1))
    assert [n for n in server.notes if "an interpreter of its own" in n]


def test_a_folder_of_sockets_is_taken_away_by_whoever_made_it(monkeypatch):
    assert os.path.isdir(folder := forks.own_folder())
    # a copy by os.fork knows the folder too
    monkeypatch.setattr(os, "getpid", lambda pid=os.getpid(): pid + 1)
    assert forks.own_folder() == "" != folder


def test_a_worker_takes_away_what_its_killed_parent_left(monkeypatch, tmp_path):
    (left := tmp_path / "left").mkdir()
    reads, writes = os.pipe()
    os.close(writes)
    monkeypatch.setattr(worker, "parent_process", lambda: SimpleNamespace(sentinel=reads))
    monkeypatch.setattr(os, "_exit", lambda code: None)
    worker._end_with_parent(str(left))
    os.close(reads)
    assert not left.exists()
