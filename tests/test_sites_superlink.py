"""Sites behind SuperNodes and a server on a SuperLink, over TLS on loopback: what our own line gives."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch

from benchmarks.flower_sites import Federation
from fedtorch import Client, FedAvg, Local, Scaffold, Server, seeds
from fedtorch.data import Npz
from fedtorch.data.base import facts_of
from fedtorch.sites import keys
from fedtorch.sites import offer as offers
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.flower import Flower
from fedtorch.sites.joined import Joined
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.site import Site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Flower imports warns of itself
    pytest.importorskip("flwr.app", reason="the extra flower is not installed")
    from fedtorch.sites import superlink

pytestmark = pytest.mark.timeout(300)
NAMES = ("north", "south", "west")


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    keys.make(folder / "keys", ["localhost", "127.0.0.1"], NAMES, 2)
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 30, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    with closing(Federation(folder, NAMES)) as made:
        made.begin()
        yield made


def flower(federation, name="") -> Flower:
    """How a site reaches its SuperNode, or the server its SuperLink."""
    if name:
        port, ca = federation.nodes[name], ""
    else:
        port, ca = federation.link, federation.ca
    return Flower(address=f"127.0.0.1:{port}", ca=ca, secret=str(federation.secret))


def offer(strategy=FedAvg(), **changes) -> offers.Plan:
    facts = facts_of((6,), 3, "classification")
    options = {"model_args": {"hidden": 8}, "batch_size": 8, "epochs": 2} | changes
    return offers.Plan(run="test", model="mlp", facts=facts, strategy=strategy, **options)


@contextmanager
def server(federation, offered):
    with seeds.seeded(1):
        model, recipe = offered.build()
    engine = Sites(plan=offered, flower=flower(federation), deadline=120.0, minimum=3)
    made = Server(model, remotes(NAMES), recipe, engine=engine, seed=3)
    try:
        yield made
    finally:
        made.close()


class Apart(Site):
    """A site in a thread: torch.fx, which looks at the model, is not for two threads at once."""

    one = threading.Lock()

    def _join(self):
        try:
            return super()._join()
        finally:
            self.one.release()

    def _ask(self, method, message, seconds):
        try:
            return super()._ask(method, message, seconds)
        finally:
            if method == "join":
                self.one.acquire()


@contextmanager
def sites(federation, state):
    """Sites at work in threads of this process, until their run is over."""
    made = []
    for name in NAMES:
        data = Npz(str(federation.folder / f"{name}.npz"))
        own = {"engine": flower(federation, name), "state": str(state / name), "patience": 150.0}
        made.append(Apart(SiteConfig(name=name, dataset=data, **own)))
    ends: list[int] = []

    def work(site):
        with closing(site):
            ends.append(site.run())

    threads = [threading.Thread(target=work, args=(s,), daemon=True) for s in made]
    for t in threads:
        t.start()
    yield made
    for t in threads:
        t.join()
    assert ends == [0, 0, 0]


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


def same(model, expected):
    for name, value in model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6, rtol=0), name


def test_weights_are_those_of_one_process(federation, tmp_path):
    offered = offer(FedAvg())
    with sites(federation, tmp_path), server(federation, offered) as made:
        assert len(made.session.wait_for_sites(150)) == 3
        assert made.round()["clients"] == 3
    same(made.model, here(federation, offered, 1))


def test_a_node_is_killed_in_mid_round_and_large_weights_are_those_of_one_process(
    federation, tmp_path, monkeypatch
):
    began, go_on = threading.Event(), threading.Event()
    train = Joined.train

    def held(self, client, task):
        if client.id == "west" and task.round == 1:
            began.set()
            go_on.wait(150)
        return train(self, client, task)

    def kill():
        began.wait(150)
        federation.kill("west")
        federation.start("west")
        go_on.set()

    monkeypatch.setattr(Joined, "train", held)
    killer = threading.Thread(target=kill)
    killer.start()
    offered = offer(Scaffold(), model_args={"hidden": 300}, epochs=1)
    with sites(federation, tmp_path), server(federation, offered) as made:
        for _ in range(3):
            assert len(made.session.wait_for_sites(150)) == 3
            assert made.round()["clients"] == 3
        assert made.session.figures()["site_west_bytes_received"] > superlink.SMALL
    killer.join()
    same(made.model, here(federation, offered, 3))


def test_the_server_is_killed_in_mid_round_and_no_charge_is_lost(federation, tmp_path):
    folder = tmp_path / "run"
    words = ["serve", "--run-dir", str(folder)]
    link = flower(federation)
    first = ["--engine", "flower", "--engine.address", link.address, "--engine.ca", link.ca]
    first += ["--engine.secret", link.secret, "--sites", ",".join(NAMES), "--minimum", "3"]
    first += ["--input-shape", "6", "--outputs", "3", "--model", "logistic", "--rounds", "3"]
    first += ["--privacy", "sample", "--privacy.epsilon", "8", "--privacy.rounds", "5"]
    first += ["--privacy.sample-rate", "0.2", "--privacy.steps", "2", "--privacy.batch-size", "8"]

    def serve(more):
        with (tmp_path / "serve.log").open("ab") as log:
            command = ["timeout", "250", sys.executable, "-m", "fedtorch", *words, *more]
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def rounds():
        path = folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    with sites(federation, tmp_path) as at_work:
        process = serve(first)
        while max(s.visits for s in at_work) < 2 and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, (tmp_path / "serve.log").read_text()[-2000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert rounds() == 1
        process = serve(["--resume"])
        assert process.wait(200) == 0, (tmp_path / "serve.log").read_text()[-2000:]
    assert rounds() == 3
    for site in at_work:
        charged = sum(map(len, site.budget.ledgers.values()))
        assert 3 <= charged <= 4  # a round done again is paid for again
