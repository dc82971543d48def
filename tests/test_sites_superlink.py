"""Sites behind SuperNodes and a server on a SuperLink, over TLS on loopback: what our own line gives."""

import os
import signal
import subprocess
import sys
import threading
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

LONG = 400
"""Seconds: a limit, for a machine that has much else to do."""
pytestmark = pytest.mark.timeout(2 * LONG)
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
    engine = Sites(plan=offered, flower=flower(federation), deadline=float(LONG), minimum=3)
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
        own = {"engine": flower(federation, name), "state": str(state / name)}
        made.append(Apart(SiteConfig(name=name, dataset=data, patience=float(LONG), **own)))
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


def test_a_node_is_killed_in_mid_round_and_weights_are_those_of_one_process(
    federation, tmp_path, monkeypatch
):
    killed, train = [], Joined.train

    def struck(self, client, task):
        if client.id == "west" and task.round == 1 and not killed:
            killed.append(federation.kill("west"))
            federation.start("west")
        return train(self, client, task)

    monkeypatch.setattr(Joined, "train", struck)
    # weights too large to go with the words, which joins and reports go with
    offered = offer(Scaffold(), model_args={"hidden": 300}, epochs=1)
    with sites(federation, tmp_path), server(federation, offered) as made:
        for _ in range(2):
            assert len(made.session.wait_for_sites(LONG)) == 3
            assert made.round()["clients"] == 3
        assert made.session.figures()["site_west_bytes_received"] > superlink.SMALL
    assert killed
    same(made.model, here(federation, offered, 2))


def test_the_server_is_killed_in_mid_round_and_no_charge_is_lost(federation, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    words = ["serve", "--run-dir", str(folder)]
    link = flower(federation)
    first = ["--engine", "flower", "--engine.address", link.address, "--engine.ca", link.ca]
    first += ["--engine.secret", link.secret, "--sites", ",".join(NAMES), "--minimum", "3"]
    first += ["--input-shape", "6", "--outputs", "3", "--model", "logistic", "--rounds", "2"]
    first += ["--privacy", "sample", "--privacy.epsilon", "8", "--privacy.rounds", "5"]
    first += ["--privacy.sample-rate", "0.2", "--privacy.steps", "2", "--privacy.batch-size", "8"]
    log, killed, train = tmp_path / "serve.log", [], Joined.train

    def serve(more):
        with log.open("ab") as file:
            command = ["timeout", str(LONG), sys.executable, "-m", "fedtorch", *words, *more]
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def struck(self, client, task):
        if client.id == "west" and task.round == 1 and not killed:
            killed.append(os.killpg(process.pid, signal.SIGKILL))
            process.wait()
        return train(self, client, task)

    def rounds():
        return len((folder / "metrics.jsonl").read_text().splitlines())

    monkeypatch.setattr(Joined, "train", struck)
    process = serve(first)
    with sites(federation, tmp_path) as at_work:
        assert process.wait(LONG) == -signal.SIGKILL, log.read_text()[-2000:]
        assert rounds() == 1
        resumed = serve(["--resume"])
        assert resumed.wait(LONG) == 0, log.read_text()[-2000:]
    assert rounds() == 2
    for site in at_work:
        charged = sum(map(len, site.budget.ledgers.values()))
        assert 2 <= charged <= 3  # a round done again is paid for again
