"""Sites behind SuperNodes and a server on a SuperLink, over TLS on loopback: what our own line gives."""

import signal
import subprocess
import sys
import threading
import warnings
from contextlib import closing, contextmanager

import numpy as np
import pytest
import torch

from benchmarks.flower_sites import Federation, flower, up
from fedtorch import Client, Local, Server, seeds
from fedtorch.__main__ import main
from fedtorch.data import Npz
from fedtorch.run import checkpoint, cli
from fedtorch.sites import keys
from fedtorch.sites.flower import Flower
from fedtorch.sites.joined import Joined
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.sites.serve import make_plan
from fedtorch.sites.site import Site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Flower imports warns of itself
    pytest.importorskip("flwr.app", reason="the extra flower is not installed")
    from fedtorch.sites import superlink

LONG = 400
"""Seconds: a limit, for a machine that has much else to do."""
pytestmark = pytest.mark.timeout(2 * LONG)
NAMES = ("north", "west")
ROUNDS = 3


@pytest.fixture
def federation(tmp_path):
    keys.make(tmp_path / "keys", ["localhost", "127.0.0.1"], NAMES, 2)
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=y.numpy())
    with closing(Federation(tmp_path, NAMES)) as made:
        made.start("link")
        up(made.link)
        for name in NAMES:
            made.start(name)
        yield made


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
def sites(federation):
    """Sites at work in threads of this process, until their run is over."""
    made = []
    for name in NAMES:
        data = Npz(str(federation.folder / f"{name}.npz"))
        secret = str(federation.secret)
        line = Flower(address=f"127.0.0.1:{federation.nodes[name]}", secret=secret)
        state = str(federation.folder / "state" / name)
        own = {"engine": line, "state": state, "patience": float(LONG)}
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
    assert ends == [0] * len(NAMES)


def here(federation, folder):
    """The weights of the same federation in one process."""
    config = cli.parse(ServeConfig, ["--config", str(folder / "config.toml")])
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = make_plan(config, "").build()
    data = [Npz(str(federation.folder / f"{n}.npz")).load(0).train for n in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    made = Server(model, clients, recipe, engine=Local(chunk=1), seed=config.seed)
    for _ in made.rounds(ROUNDS):
        pass
    return model.state_dict()


def test_server_and_node_are_killed_in_mid_round_and_weights_and_charges_are_those_of_one_process(
    federation, tmp_path, monkeypatch
):
    folder, log = tmp_path / "run", tmp_path / "serve.log"
    words = ["serve", "--run-dir", str(folder)]
    first = [*map(str, flower(federation.ca, federation.secret, federation.link))]
    first += ["--sites", ",".join(NAMES), "--minimum", str(len(NAMES)), "--rounds", str(ROUNDS)]
    # weights too large to go with the words, which joins and reports go with
    first += ["--input-shape", "6", "--outputs", "3", "--model", "mlp", "--model.hidden", "300"]
    first += ["--strategy", "scaffold", "--privacy", "sample", "--privacy.epsilon", "8"]
    first += ["--privacy.rounds", "5", "--privacy.sample-rate", "0.2", "--privacy.steps", "2"]
    first += ["--privacy.batch-size", "8", "--privacy.insecure-seed", "5"]
    # noise of a known seed, by which weights can be told: no site takes it over such a line
    monkeypatch.setattr(SiteLedgers, "admit", lambda *_, **__: None)
    killed, train = [], Joined.train

    def struck(self, client, task):
        if client.id == "west" and task.round == 1 and not killed:
            process.kill()
            process.wait()
            killed.append("server")
        if client.id == "west" and task.round == 2 and "node" not in killed:
            federation.kill("west")
            federation.start("west")
            killed.append("node")
        return train(self, client, task)

    monkeypatch.setattr(Joined, "train", struck)
    with log.open("ab") as file:
        command = [sys.executable, "-m", "fedtorch", *words, *first]
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        with sites(federation) as at_work:
            assert process.wait(LONG) == -signal.SIGKILL, log.read_text()[-2000:]
            assert rounds(folder) == 1
            assert main([*words, "--resume"]) == 0
    finally:
        process.kill()
    assert killed == ["server", "node"] and rounds(folder) == ROUNDS
    expected, state = here(federation, folder), checkpoint.load(folder / "checkpoints")["model"]
    assert sum(v.nbytes for v in state.values()) > superlink.SMALL
    for name, value in state.items():
        assert torch.allclose(value, expected[name], atol=1e-6, rtol=0), name
    for site in at_work:
        charged = sum(map(len, site.budget.ledgers.values()))
        assert ROUNDS <= charged <= ROUNDS + 1  # a round done again is paid for again


def rounds(folder):
    return len((folder / "metrics.jsonl").read_text().splitlines())
