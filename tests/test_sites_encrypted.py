"""Sums under homomorphic encryption over TLS on loopback: the plain mean, and a server that cannot read."""

import shutil
import time

import numpy as np
import pytest
import torch

from fedtorch import HE, ConfigError, FedAvg
from fedtorch import __main__ as program
from fedtorch.data import Npz
from fedtorch.engines import wire
from fedtorch.engines.wire import Message
from fedtorch.secure import he
from fedtorch.secure.refused import Refused as Unfit
from fedtorch.sites import sealed
from fedtorch.sites.engine import SitesSession
from fedtorch.sites.sealed import Sealing
from fedtorch.sites.site import Site
from tests.test_sites import here, offer, server, site_config, sites

pytestmark = pytest.mark.timeout(120)
NAMES = ["east", "north", "west"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("federation")
    argv = [str(folder / "keys"), "--server", "localhost,127.0.0.1", "--sites", ",".join(NAMES)]
    assert program.main(["keys", *argv, "--he"]) == 0
    g = torch.Generator().manual_seed(0)
    for name, n in zip(NAMES, (40, 30, 20), strict=True):
        x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    return folder


@pytest.fixture(autouse=True)
def own_key(monkeypatch, folder):
    """Each site reads its own file, and no process of a federation makes a key."""
    monkeypatch.setattr(he, "_keys", None)


def test_the_secret_is_for_sites_alone_and_for_later_ones_the_same(folder, tmp_path):
    for name in (*NAMES, "ca"):
        assert (folder / "keys" / name / "he.secret").stat().st_mode & 0o777 == 0o600
    assert not (folder / "keys/server/he.secret").exists()
    data = {(folder / "keys" / n / "he.secret").read_bytes() for n in NAMES}
    assert len(data) == 1
    assert sealed.make(folder / "keys", NAMES) == []
    with pytest.raises(ConfigError, match="must never have"):
        sealed.read_public(folder / "keys/east/he.secret")
    with pytest.raises(ConfigError, match="--he-public FILE"):
        sealed.read_public(None)


def federation(folder, state, offered, **options):
    public = folder / "keys/server/he.public"
    return server(folder, offered, names=NAMES, public=public, **options)


def crowd(folder, there, state):
    return sites(folder, there.session.port, state, NAMES)


def test_the_model_is_that_of_the_plain_mean_and_nothing_arrives_that_the_server_can_read(
    folder, tmp_path, monkeypatch
):
    came, real = [], SitesSession.handle

    def handle(self, method, site, data):
        came.append((method, wire.decode(data)))
        return real(self, method, site, data)

    monkeypatch.setattr(SitesSession, "handle", handle)
    offered = offer(aggregator=HE())
    with federation(folder, tmp_path, offered) as there, crowd(folder, there, tmp_path):
        figures = [*there.rounds(2)]
        told = there.session.figures()
        adder = there.session.adder
        there.close()
    wanted = here(folder, offer(FedAvg(weighting="uniform")), 2, NAMES)
    for k, v in there.model.state_dict().items():
        assert (wanted[k].double() - v.double()).abs().max() <= 1e-6, k
    trained = sum(len(Npz(str(folder / f"{n}.npz")).load(0).train) for n in NAMES)
    assert figures[-1]["cohort"] == NAMES and figures[-1]["examples"] == trained
    assert told["site_north_bytes_received"] > 60_000
    assert not any(v.is_private() for v in vars(adder).values())
    phases = [m.facts.get("phase") for method, m in came if method == "report"]
    assert sorted(phases) == ["open"] * 2 + ["sealed"] * 6
    for _, message in came:
        assert "metrics" not in message.groups and all(g == "secure" for g in message.groups)


def lies(reply):
    reply.groups["secure"]["values"][-4] += 1  # as with another key
    return reply


def declines(reply):
    raise Unfit("few", "too few")


def stalls(reply):
    time.sleep(1.2)  # as good as dead
    return reply


@pytest.mark.parametrize("fails", [lies, declines, stalls])
def test_another_site_opens_where_the_first_does_not(folder, tmp_path, monkeypatch, caplog, fails):
    real, failed = Sealing.go_on, []

    def go_on(self, message):
        if failed:
            return real(self, message)
        failed.append(self.visit)
        return fails(real(self, message))

    monkeypatch.setattr(Sealing, "go_on", go_on)
    plan = offer(aggregator=HE(phase_seconds=1.0 if fails is stalls else 30.0))
    monkeypatch.setattr("fedtorch.sites.site.accept", lambda table, config: plan)
    with federation(folder, tmp_path, plan) as there, crowd(folder, there, tmp_path):
        (figures,) = there.rounds(1)
        there.close()
    assert figures["cohort"] == NAMES and "another site is asked" in caplog.text


def test_a_site_without_a_key_says_so(folder, tmp_path):
    offered = offer(aggregator=HE())
    with federation(folder, tmp_path, offered) as there:
        bare = tmp_path / "keys"
        shutil.copytree(folder / "keys/east", bare, ignore=shutil.ignore_patterns("he.*"))
        own = {"credentials": str(bare)}
        made = Site(site_config(folder, there.session.port, "east", tmp_path / "east", **own))
        with pytest.raises(ConfigError, match="this site has no key: --he-secret FILE"):
            made.run()
        made.close()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"asked": 3, "key": "00"}, "not of the pair"),
        ({"asked": 2, "key": "00"}, "least_peers is 2"),
    ],
    ids=["another pair", "two sites"],
)
def test_a_site_has_no_part_in_sums_that_it_could_not_open(folder, tmp_path, said, why):
    task = Message("task", {"visit": "0" * 32, "he": said})
    with pytest.raises(ConfigError, match=why):
        Sealing(site_config(folder, 1, "east", tmp_path), None, task, "test", None)


def test_a_ciphertext_that_cannot_be_added_is_refused_before_it_is(folder):
    adder, _ = sealed.read_public(folder / "keys/server/he.public")
    code = adder.encrypt(np.ones(9))
    adder.look(code, 9)
    for bad, size in ((code, 8), ([b"x" * 100], 9), ([code[0][:-5]], 9), ([b""], 9)):
        with pytest.raises(ConfigError, match="no ciphertext"):
            adder.look(bad, size)
