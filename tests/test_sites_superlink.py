"""Sites behind SuperNodes and a server on a SuperLink, over TLS on loopback: what our own line gives."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtorch import Client, FedAvg, Local, Scaffold, Server, seeds
from fedtorch.data import Npz
from fedtorch.data.base import facts_of
from fedtorch.sites import keys
from fedtorch.sites import offer as offers
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.flower import Flower
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.site import Site

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore:.*Click 9:DeprecationWarning"),
]
NAMES = ["north", "south", "west"]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Federation:
    """A SuperLink and its SuperNodes, each a process of Flower's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.link, self.nodes = free_port(), {n: free_port() for n in NAMES}
        self.running: dict[str, subprocess.Popen] = {}
        self.ca, self.secret = str(folder / "keys/server/ca.pem"), folder / "secret"

    def start(self, name: str) -> None:
        keys, common = self.folder / "keys/server", ["--isolation", "process"]
        common += ["--superexec-auth-secret-file", str(self.secret), "--host", "127.0.0.1"]
        if name == "link":
            command = ["flower-superlink", "--port", str(self.link), "--ssl-ca-certfile", self.ca]
            command += ["--ssl-certfile", str(keys / "cert.pem")]
            command += ["--ssl-keyfile", str(keys / "key.pem")]
        else:
            command = ["flower-supernode", "--root-certificates", self.ca]
            command += ["--superlink", f"127.0.0.1:{self.link}", "--port", str(self.nodes[name])]
        home = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        home["FLWR_HOME"] = str(self.folder / f"home-{name}")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                ["timeout", "-s", "KILL", "170", str(BIN / command[0]), *command[1:], *common],
                env=os.environ | home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)

    def flower(self, name: str = "", **options) -> Flower:
        if not name:
            options = {"address": f"127.0.0.1:{self.link}", "ca": self.ca} | options
        else:
            options = {"address": f"127.0.0.1:{self.nodes[name]}"} | options
        return Flower(secret=str(self.secret), **options)


def up(port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    keys.make(folder / "keys", ["localhost", "127.0.0.1"], NAMES, 2)
    (folder / "secret").write_bytes(os.urandom(32))
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 30, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    made = Federation(folder)
    try:
        made.start("link")
        up(made.link)
        for name in NAMES:
            made.start(name)
        for name in NAMES:
            up(made.nodes[name])
        yield made
    finally:
        for name in [*made.running]:
            made.kill(name)


def offer(strategy=FedAvg(), **changes) -> offers.Plan:
    facts = facts_of((6,), 3, "classification")
    options = {"model_args": {"hidden": 8}, "batch_size": 8, "epochs": 2} | changes
    return offers.Plan(run="test", model="mlp", facts=facts, strategy=strategy, **options)


@contextmanager
def server(federation, offered, **options):
    with seeds.seeded(1):
        model, recipe = offered.build()
    engine = Sites(plan=offered, flower=federation.flower(), deadline=60.0, minimum=3)
    made = Server(model, remotes(NAMES), recipe, engine=engine, seed=3)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def sites(federation, state):
    made = []
    for name in NAMES:
        made.append(
            Site(
                SiteConfig(
                    engine=federation.flower(name),
                    name=name,
                    dataset=Npz(str(federation.folder / f"{name}.npz")),
                    state=str(state / name),
                    patience=20.0,
                )
            )
        )
    threads = [threading.Thread(target=s.run) for s in made]
    for t, s in zip(threads, made, strict=True):
        t.start()
        while s.plan is None and t.is_alive():
            time.sleep(0.01)
    yield made
    for t, s in zip(threads, made, strict=True):
        t.join()
        s.close()


def here(federation, offered, rounds):
    """The same federation in one process."""
    with seeds.seeded(1):
        model, recipe = offered.build()
    data = [Npz(str(federation.folder / f"{n}.npz")).load(0).train for n in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    made = Server(model, clients, recipe, engine=Local(chunk=1), seed=3)
    for _ in made.rounds(rounds):
        pass
    return model.state_dict()


def test_weights_are_those_of_one_process(federation, tmp_path):
    began = time.monotonic()
    offered = offer(Scaffold())
    with server(federation, offered) as made, sites(federation, tmp_path):
        for _ in range(4):
            made.session.wait_for_sites(60)
            figures = made.round()
            print(time.monotonic() - began, figures["seconds_train"])
        made.close()
    expected = here(federation, offered, 4)
    for name, value in made.model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6, rtol=0), name
    print(time.monotonic() - began)
