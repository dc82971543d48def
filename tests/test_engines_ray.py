"""Ray actors on one cluster of this machine, which a session of ours starts on loopback and ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedtorch import Client, FedAvg, Local, Scaffold, Server
from fedtorch.engines import Ray
from fedtorch.types import ClientError, ConfigError
from test_engines_processes import (
    PRIVATE,
    Rows,
    alive,
    chain,
    clients,
    equal,
    mlp,
    recipe,
    state,
    worst,
)

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(300),
    # Ray's own code leaves files open and uses what Python is about to drop
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]


class Breaks(Rows):
    """Has a bad row for actors, from the moment that a file is there."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __getitem__(self, i):
        if i == 5 and self.flag.exists() and ray.get_runtime_context().get_actor_id():
            raise ValueError("row 5 is bad")
        return super().__getitem__(i)


def federation(engine, flag):
    many = [*clients(), Client("last", Breaks(flag))]
    return Server(mlp(), many, recipe(Scaffold()), engine=engine, seed=3)


def below(pid: int) -> set[int]:
    """All processes that it has started, and those that they have."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = {int(k) for t in tasks for k in t.read_text().split()}
    return children.union(*map(below, children))


@pytest.fixture(scope="module", autouse=True)
def first(tmp_path_factory):
    """A session that starts the cluster: an actor is killed after a round, and the fourth has a bad row."""
    threads, before = torch.get_num_threads(), below(os.getpid())
    torch.set_num_threads(1)
    flag = tmp_path_factory.mktemp("ray") / "bad"
    server = federation(Ray(workers=2, chunk=1), flag)
    try:
        server.round()
        killed = server.session.actors[0]
        pid = ray.get(killed.handle.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        server.round()
        server.round()
        assert killed not in server.session.actors
        weights, memory = state(server.model), server.session.memory()
        flag.touch()
        with pytest.raises(ClientError) as error:
            server.round()
        for actor in server.session.actors:
            ray.kill(actor.handle)  # the cluster has two cores, which other tests need
        started = below(os.getpid()) - before
        yield SimpleNamespace(
            server=server, weights=weights, memory=memory, error=error, started=started
        )
    finally:
        server.close()
        torch.set_num_threads(threads)


def test_actors_give_the_very_weights_of_one_process_even_when_one_is_killed(first, tmp_path):
    here = federation(Local(chunk=1), tmp_path / "none")
    for _ in here.rounds(3):
        pass
    kept = here.session.memory()
    assert equal(state(here.model), first.weights) and kept.keys() == first.memory.keys()
    assert all(equal(kept[i]["c"], first.memory[i]["c"]) for i in kept)


def test_an_error_in_an_actor_names_the_client(first):
    assert "client last, round 3: ValueError: row 5 is bad" in str(first.error.value)


def test_the_fast_path_in_actors_gives_the_weights_of_the_general_one():
    here, _ = chain(Local(chunk=1, solver="general"), PRIVATE)
    there, notes = chain(Ray(workers=1, solver="fast"), PRIVATE)
    assert worst(here, there) <= 1e-6 and "fast path" in notes


def test_what_cannot_be_sent_is_said():
    with pytest.raises(ConfigError, match="device"):
        Ray(device="tpu")
    with pytest.raises(ConfigError, match="workers"):
        Ray(workers=0)
    with pytest.raises(ConfigError, match=r"engine.solver fast cannot train this"):
        Server(mlp(), clients(), recipe(FedAvg()), engine=Ray(workers=1, solver="fast"))


SCRIPT = """
    import sys
    import torch
    from torch import nn
    from fedtorch import Client, ConfigError, FedProx, Local, Recipe, Server
    from fedtorch.engines import Ray

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))

    loss = lambda output, y: nn.functional.cross_entropy(output, y)
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    many = [
        Client(f"c/{n}", (torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g)))
        for n in (37, 5, 18)
    ]
    asked = Recipe(FedProx(mu=0.1), lr=0.1, epochs=2, batch_size=4, drop_last=True, loss=loss)

    def trained(engine):
        torch.manual_seed(1)
        server = Server(Net(), many, asked, engine=engine, seed=3)
        for _ in server.rounds(3):
            pass
        server.close()
        return server.model.state_dict()

    try:
        trained(Ray(address="127.0.0.1:1"))
    except ConfigError as e:
        print(e)
    here, there = (trained(e) for e in (Local(chunk=1), Ray(address=sys.argv[1], workers=1, chunk=1)))
    print(len(here), [k for k, v in here.items() if not torch.equal(v, there[k])])
"""


def test_a_script_trains_classes_of_its_own_on_a_cluster_that_is_there(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(script), ray.get_runtime_context().gcs_address],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout, done.stderr
    nowhere, alike = done.stdout.splitlines()
    assert "no Ray cluster at '127.0.0.1:1'" in nowhere
    assert alike == "9 []", "the very weights of one process"


def test_a_session_ends_the_cluster_that_it_started_and_leaves_nothing(first):
    assert first.server.session.own and len(first.started) > 3
    first.server.close()
    assert not ray.is_initialized()
    end = time.monotonic() + 60
    while left := [p for p in first.started if alive(p)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)
