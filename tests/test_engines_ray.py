"""Ray actors, on a cluster of this machine that each test module starts on loopback and ends."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from fedtorch import FedAvg, FedProx, Local, Scaffold, Server
from fedtorch.engines import Ray
from fedtorch.types import ClientError, ConfigError
from test_engines_processes import (
    PRIVATE,
    Broken,
    chain,
    clients,
    equal,
    mlp,
    recipe,
    slow_clients,
    state,
    worst,
)

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(300),
    # Ray's own code leaves files open and uses what Python is about to drop
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    from fedtorch.engines.workers.ray import connect

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert connect("", 2)
    yield
    ray.shutdown()
    torch.set_num_threads(before)


def trained(engine, strategy, rounds=3, disturb=None):
    server = Server(mlp(), clients(), recipe(strategy), engine=engine, seed=3)
    try:
        for _ in range(rounds):
            if disturb:
                disturb(server)
            server.round()
        return state(server.model), server.session.memory()
    finally:
        server.close()


def test_actors_give_the_very_weights_of_one_process_even_when_one_is_killed():
    here, kept = trained(Local(chunk=1), Scaffold())

    def kill(server):
        if server.round_number == 1:
            actor = server.session.actors[0]
            pid = ray.get(actor.handle.__ray_call__.remote(lambda _: os.getpid()))
            os.kill(pid, signal.SIGKILL)

    there, remembered = trained(Ray(workers=2, chunk=1), Scaffold(), disturb=kill)
    assert equal(here, there)
    assert all(equal(kept[i]["c"], remembered[i]["c"]) for i in kept)


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.1)], ids=str)
def test_every_strategy_gives_the_very_weights_of_one_process(strategy):
    here, _ = trained(Local(chunk=1), strategy)
    there, _ = trained(Ray(workers=1, chunk=1), strategy)
    assert equal(here, there)


def test_the_fast_path_in_actors_gives_the_weights_of_the_general_one():
    here, _ = chain(Local(chunk=1, solver="general"), PRIVATE)
    there, notes = chain(Ray(workers=1, solver="fast"), PRIVATE)
    assert worst(here, there) <= 1e-6 and "fast path" in notes


def test_an_error_in_an_actor_names_the_client():
    engine = Ray(workers=1, chunk=1)
    server = Server(mlp(), slow_clients(BrokenAnywhere()), recipe(FedAvg()), engine=engine)
    with pytest.raises(ClientError, match="client last, round 0: ValueError: row 5 is bad"):
        server.round()
    server.close()


class BrokenAnywhere(Broken):
    def __getitem__(self, i):
        if i == 5 and ray.get_runtime_context().get_actor_id():
            raise ValueError("row 5 is bad")
        return super().__getitem__(i)


def test_what_cannot_be_sent_or_reached_is_said():
    with pytest.raises(ConfigError, match="device"):
        Ray(device="tpu")
    with pytest.raises(ConfigError, match="workers"):
        Ray(workers=0)
    with pytest.raises(ConfigError, match=r"engine.solver fast cannot train this"):
        Server(mlp(), clients(), recipe(FedAvg()), engine=Ray(workers=1, solver="fast"))
    with pytest.raises(ConfigError, match=r"no Ray cluster at '127.0.0.1:1'"):
        connect_elsewhere()


def connect_elsewhere():
    # one process can be in one cluster only, so ask in another
    code = "from fedtorch.engines.workers.ray import connect; connect('127.0.0.1:1', None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    raise ConfigError(done.stderr.splitlines()[-1])


SCRIPT = """
    import torch
    from fedtorch import Client, Recipe, Server
    from fedtorch.engines import Ray
    class Net(torch.nn.Linear):
        pass
    data = torch.randn(8, 6), torch.arange(8) % 4
    loss = lambda output, y: torch.nn.functional.cross_entropy(output, y)
    server = Server(Net(6, 4), [Client("a", data)], Recipe(loss=loss), engine=Ray(workers=1))
    print(server.round()["clients"])
    server.close()
"""


def test_a_script_with_classes_of_its_own_starts_a_cluster_and_leaves_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["1"], done.stderr
