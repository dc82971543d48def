"""Worker processes: the same weights as in one process, whatever happens to the workers."""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # here once, and in what workers are forked from: each would import it for a second
from torch import nn
from torch.utils.data import Dataset

from fedtorch import Client, FedAvg, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.engines import Processes
from fedtorch.engines.workers.board import DEATHS, Board, Job
from fedtorch.engines.workers.forks import own_folder
from fedtorch.engines.workers.processes import ProcessesSession
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.run import checkpoint
from fedtorch.types import ClientError, ConfigError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def one_thread():
    # workers have one thread, and a sum's last bit depends on how many threads shared it
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SIZES = [37, 5, 18, 64, 2, 23, 50, 8]


def clients() -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(f"c/{k}", (torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g)))
        for k, n in enumerate(SIZES)
    ]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def trained(engine, strategy, rounds=3, many=None, disturb=None):
    server = Server(mlp(), many or clients(), recipe(strategy), engine=engine, seed=3)
    try:
        for _ in range(rounds):
            if disturb:
                disturb(server.session)
            server.round()
        return state(server.model), server.session.memory()
    finally:
        server.close()


def recipe(strategy) -> Recipe:
    return Recipe(strategy, lr=0.1, epochs=2, batch_size=4, drop_last=True)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_workers_give_the_very_weights_of_one_process():
    # chunks of one client, so also the sums are the same; memory is looked at where a worker is killed
    here, _ = trained(Local(chunk=1), FedProx(mu=0.1))
    there, _ = trained(Processes(workers=2, chunk=1), FedProx(mu=0.1))
    assert equal(here, there)


def test_chunks_are_shared_out_and_agree():
    here, _ = trained(Local(chunk=1), FedAvg())
    there, _ = trained(Processes(workers=2), FedAvg())
    assert worst(here, there) <= 1e-6


PRIVATE = SampleLevel(noise_multiplier=1.0, rounds=3, insecure_seed=3, steps=3)


def chain(engine, privacy):
    """Weights after three rounds of a model that the fast path knows, and the run's notes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    made = Recipe(lr=0.1, batch_size=4, privacy=privacy)
    server = Server(model, clients(), made, engine=engine, seed=3)
    try:
        for _ in server.rounds(3):
            pass
        return state(model), " ".join(server.notes)
    finally:
        server.close()


def worst(a, b) -> float:
    return max((a[k].double() - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])
def test_the_fast_path_in_workers_gives_the_weights_of_the_general_one(privacy):
    here, _ = chain(Local(chunk=1, solver="general"), privacy)
    there, notes = chain(Processes(workers=2, solver="fast"), privacy)
    assert worst(here, there) <= 1e-6 and "fast path" in notes


@pytest.mark.parametrize(
    "privacy",
    [
        ClientLevel(
            noise_multiplier=0.1, rounds=3, insecure_seed=3, adaptive=AdaptiveClip(start=0.5)
        ),
        LocalDP(noise_multiplier=1.0, rounds=3, insecure_seed=3),
    ],
    ids=["client", "local"],
)
def test_private_plans_give_the_weights_of_one_process(privacy):
    here, _ = chain(Local(chunk=1, solver="general"), privacy)
    there, _ = chain(Processes(workers=2), privacy)
    assert worst(here, there) <= 1e-6


def test_a_killed_worker_is_replaced_and_nothing_is_lost():
    here, kept = trained(Local(chunk=1), Scaffold())

    def kill(session):
        if session.board.handed:  # not before the first round: there is memory to lose
            os.kill(session.workers[0].process.pid, signal.SIGKILL)

    there, remembered = trained(Processes(workers=2, chunk=1), Scaffold(), disturb=kill)
    assert equal(here, there) and kept.keys() == remembered.keys()
    assert all(equal(kept[i]["c"], remembered[i]["c"]) for i in kept)


class Rows(Dataset):
    """Rows that are asked for one by one, so that a test can strike in the middle of a round."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((6,), float(i)), torch.tensor(i % 4)


class Struck(Rows):
    """Kills its worker, once or always."""

    def __init__(self, flag: str):
        self.flag = flag

    def __getitem__(self, i):
        if self.flag and os.getppid() and not os.path.exists(self.flag) and i == 5 and in_worker():
            if not self.flag.endswith("always"):
                open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


class Broken(Rows):
    def __getitem__(self, i):
        if i == 5 and in_worker():
            raise ValueError("row 5 is bad")
        return super().__getitem__(i)


def in_worker() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None


def one_by_one(last: Dataset) -> list[Client]:
    return [Client(f"s{k}", Rows()) for k in range(3)] + [Client("last", last)]


class Stillborn:
    """A worker that dies as it starts, the first ``deaths`` times."""

    deaths, made = 0, 0

    def __init__(self, forks, device, body, block):
        Stillborn.made += 1
        self.process = SimpleNamespace(exitcode=-9)

    def wait_ready(self):
        if Stillborn.made <= Stillborn.deaths:
            raise ConfigError("a worker process could not start")


def short_of_a_worker(pipe=None) -> ProcessesSession:
    """A session at work on one job, whose worker is gone."""
    session = ProcessesSession.__new__(ProcessesSession)
    session.kit, session.board, session.forks = (b"", torch.empty(0)), Board(1), None
    job = session.board.running[0] = Job(0, [], None)
    gone = SimpleNamespace(device="cpu", job=job, end=lambda: -9, pipe=pipe, grow=len, box=None)
    session.workers = [gone]
    return session


@pytest.mark.parametrize("deaths", [0, 2, DEATHS])
def test_workers_that_die_as_they_start_are_started_again_a_few_times(monkeypatch, deaths):
    monkeypatch.setattr("fedtorch.engines.workers.processes.Worker", Stillborn)
    monkeypatch.setattr(Stillborn, "deaths", deaths)
    monkeypatch.setattr(Stillborn, "made", 0)
    session = short_of_a_worker()
    (gone,) = session.workers
    if deaths == DEATHS:
        with pytest.raises(
            ClientError, match=r"die as they start, 3 in a row, .* exit code -9: out of"
        ):
            session._replace(gone)
        return
    session._replace(gone)
    assert Stillborn.made == deaths + 1 and session.workers != [gone]
    assert [job.deaths for job in session.board.waiting] == [1], "its work is done again"


def test_a_worker_that_dies_between_asking_for_room_and_hearing_is_replaced(monkeypatch):
    def send(_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("fedtorch.engines.workers.processes.Worker", Stillborn)
    session = short_of_a_worker(SimpleNamespace(recv=lambda: ("need", b"10"), send=send))
    (gone,) = session.workers
    session._hear(gone)
    assert session.workers != [gone] and session.board.waiting[0].deaths == 1


def test_kill_9_in_the_middle_of_a_round_changes_nothing(tmp_path):
    here, _ = trained(Local(chunk=1), Scaffold(), 2, one_by_one(Rows()))
    struck = one_by_one(Struck(str(tmp_path / "struck")))
    there, _ = trained(Processes(workers=2, chunk=1), Scaffold(), 2, struck)
    assert (tmp_path / "struck").exists()
    assert equal(here, there)


def test_a_client_that_keeps_killing_workers_is_named(tmp_path):
    many = one_by_one(Struck(str(tmp_path / "always")))
    with pytest.raises(ClientError, match=r"client last, round 0: 3 workers died .* code -9"):
        trained(Processes(workers=1, chunk=1), FedAvg(), 1, many)


def test_an_error_in_a_worker_names_the_client_and_the_session_goes_on():
    many = one_by_one(Broken())
    server = Server(mlp(), many, recipe(FedAvg()), engine=Processes(workers=2, chunk=1))
    try:
        with pytest.raises(ClientError, match="client last, round 0: ValueError: row 5 is bad"):
            server.round()
        server.session.submit(["s0", "s1"], task(server))
        assert [u.ids for u in server.session.collect()] == [("s0",), ("s1",)]
    finally:
        server.close()


def task(server):
    from fedtorch.training.module import snapshot
    from fedtorch.types import Task

    return Task(snapshot(server.model), server.extras, 1, 0, 0.1)


def test_what_cannot_be_sent_is_said_before_training():
    class Local_(nn.Linear):
        pass

    for model, loss in ((Local_(6, 4), nn.functional.cross_entropy), (mlp(), lambda o, y: o.sum())):
        with pytest.raises(ConfigError, match=r"cannot be sent to a worker process.*engine local"):
            Server(model, clients(), Recipe(loss=loss), engine=Processes(workers=1))
    with pytest.raises(ConfigError, match="workers"):
        Processes(workers=0)


def test_resume_is_bit_for_bit(tmp_path):
    whole, _ = trained(Local(chunk=3), Scaffold(), 4)
    server = Server(
        mlp(), clients(), recipe(Scaffold()), engine=Processes(workers=1, chunk=3), seed=3
    )
    for _ in server.rounds(2):
        pass
    checkpoint.save(tmp_path, server.state_dict())
    server.close()
    server = Server(
        mlp(), clients(), recipe(Scaffold()), engine=Processes(workers=1, chunk=3), seed=3
    )
    server.load_state_dict(checkpoint.load(tmp_path))
    for _ in server.rounds(2):
        pass
    server.close()
    assert equal(whole, state(server.model))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


COPIED = """
    import fcntl, os, signal, sys, threading, time
    import torch
    from torch import nn
    from fedtorch import Client, Local, Recipe, Scaffold, Server
    from fedtorch.engines import Processes

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
        def forward(self, x):
            return self.linear(x).tanh()

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    many = lambda: [
        Client(str(k), (torch.randn(8 + k, 6, generator=g.manual_seed(k)), torch.arange(8 + k) % 4))
        for k in range(4)
    ]
    # a process with workers, which is killed
    reads, writes = os.pipe()
    if (parent := os.fork()) == 0:
        server = Server(Own(), many(), engine=Processes(workers=2, chunk=1))
        server.round()  # what is handed over later has a socket of its own
        session = server.session
        pids = [session.forks.pid, *(w.process.pid for w in session.workers)]
        os.write(writes, " ".join(map(str, pids)).encode())
        time.sleep(60)
    os.close(writes)
    told = os.read(reads, 99).decode()
    print(told, flush=True)
    os.kill(int(told.split()[0]), signal.SIGTERM)  # as to all of a group: it waits for the others
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # another, and what its workers do
    file = open(sys.argv[1], "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    made = []
    for engine in (Local(chunk=1), *[Processes(workers=2, chunk=1)] * 2):  # copied the second time too
        torch.manual_seed(1)
        server = Server(Own(), many(), Recipe(Scaffold(), epochs=1), engine=engine, seed=2)
        server.round()
        if made:
            session, copy = server.session, server.session.forks.pid
            assert copy
            pids = [copy, *(w.process.pid for w in session.workers)]
            for pid in pids:
                held = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
                assert sys.argv[1] not in held
            os.kill(pids[1], signal.SIGKILL)
        server.round()
        made.append({k: v.clone() for k, v in server.model.state_dict().items()})
        server.close()
    assert pids[1] not in [w.process.pid for w in session.workers]
    assert all(torch.equal(v, made[1][k]) and torch.equal(v, made[2][k]) for k, v in made[0].items())
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")
    # with another thread there is no copy: it could hold what nobody in the copy would let go
    from fedtorch.engines.workers.forks import Forks
    torch.set_num_threads(2)
    torch.ones(1 << 20).sum()
    assert not Forks().pid
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    from fedtorch.engines.workers import forks
    assert not forks.safe()
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process is copied")
def test_workers_copied_from_a_process_give_the_same_hold_nothing_of_it_and_end_with_it(tmp_path):
    script = tmp_path / "copied.py"
    script.write_text(textwrap.dedent(COPIED))  # without a main guard: it is not run again
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path has to be short
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "held")],
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert not done.stderr, done.stderr
    orphans, said = done.stdout.splitlines()
    assert said == "done"
    pids = [int(p) for p in orphans.split()]
    assert len(pids) == 3 and all(pids)
    end = time.monotonic() + 20
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(alive(p) for p in pids)
    temporary.rmdir()  # nothing is left in it


def test_sockets_lie_in_tmp_where_the_usual_folder_has_too_long_a_name(tmp_path, monkeypatch):
    (usual := tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    folder = Path(own_folder())
    assert folder.parent == Path("/tmp") and tempfile.gettempdir() == str(usual)
    Listener(family="AF_UNIX").close()  # it is short enough


OTHER = (
    "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
)
"""A thread, for which no process is copied."""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A file that this process seems to have been started with, for a worker that is no copy of it."""
    made = types.ModuleType("__main__")
    made.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "__main__", made)
    monkeypatch.setattr("fedtorch.engines.workers.forks.safe", lambda: False)
    return Path(made.__file__)


def test_a_script_without_a_main_guard_is_told_what_to_do(script):
    script.write_text(textwrap.dedent(UNGUARDED))
    with pytest.raises(ConfigError, match="its work under `if __name__ == '__main__':`"):
        exec(script.read_text(), sys.modules["__main__"].__dict__)


UNGUARDED = """
    import torch
    from fedtorch import Client, Server
    from fedtorch.engines import Processes
    data = torch.randn(8, 6), torch.arange(8) % 4
    Server(torch.nn.Linear(6, 4), [Client("a", data)], engine=Processes(workers=1))
"""


def faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others keep pages as they like")
def test_workers_keep_the_pages_of_large_tensors():
    g = torch.Generator().manual_seed(0)
    data = torch.randn(64, 1, 32, 32, generator=g), torch.arange(64) % 4
    wide = nn.Sequential(nn.Conv2d(1, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 32 * 32, 4))
    engine = Processes(workers=1, solver="general")
    server = Server(wide, [Client("a", data)], Recipe(batch_size=16, epochs=1), engine=engine)
    try:
        server.round()
        pid = server.session.workers[0].process.pid
        before = faults(pid)
        for _ in range(3):
            server.round()
        # of twelve steps, each of which makes and drops tensors of 4 MB, 1,024 pages each
        assert faults(pid) - before < 6000
    finally:
        server.close()


def test_closing_leaves_no_process():
    server = Server(mlp(), clients(), recipe(FedAvg()), engine=Processes(workers=2))
    pids = [w.process.pid for w in server.session.workers]
    server.close()
    server.close()
    assert not any(alive(p) for p in pids)


class Phases(nn.Linear):
    """Buffers of many kinds."""

    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("phase", torch.ones(6, dtype=torch.complex64))
        self.register_buffer("wide", torch.ones(3, dtype=torch.complex128))
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("brain", torch.ones(6, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x * self.phase).real * self.mask)


def test_buffers_of_many_kinds_cross_over_and_others_are_refused_by_name():
    model = Phases()
    server = Server(model, clients()[:2], engine=Processes(workers=1))
    try:
        assert server.round()["clients"] == 2
    finally:
        server.close()
    assert bool((model.phase == 1).all())
    model.register_buffer("odd", torch.ones(2).to(torch.float8_e5m2))
    with pytest.raises(ConfigError, match=r"odd .* is torch\.float8_e5m2, which cannot be sent"):
        Server(model, clients()[:2], engine=Processes(workers=1))


@pytest.mark.parametrize("begun", ["", OTHER], ids=["copied", "started anew"])
def test_a_script_from_standard_input_may_use_workers(begun):
    script = """
        import torch
        from torch import nn
        from fedtorch import Client, Server
        from fedtorch.engines import Processes
        torch.set_num_threads(1)  # threads of torch's would stand in the way of a copy
        x = torch.randn(8, 4)
        client = Client("a", (x, (x.sum(1) > 0).long()))
        server = Server(nn.Linear(4, 2), [client], engine=Processes(workers=1))
        print(server.round()["clients"])
        server.close()
        class Own(nn.Linear): pass
        try:
            server = Server(Own(4, 2), [client], engine=Processes(workers=1))
            print(server.round()["clients"])
            server.close()
        except ValueError as e:
            print(e)
    """
    done = subprocess.run(
        [sys.executable, "-"],
        input=begun + textwrap.dedent(script),
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == "1"
    if begun:
        assert "'Own'" in second
        assert "of standard input they cannot" in second
    else:  # a copy has what this process has
        assert second == "1"
