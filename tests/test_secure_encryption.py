"""Sums that the server adds and cannot read, by CKKS; the real thing throughout."""

import sys

import numpy as np
import pytest
import torch

from conftest import make_clients, mlp
from fedtorch import HE, ConfigError, FedAvg, Mean, Observer, Recipe, Server, TopK
from fedtorch.privacy import ClientLevel, DistributedDP, Nothing
from fedtorch.secure.encryption import FLOOD, LARGEST_SUM, SLOTS, STEP, Adder, Holder, make_keys
from fedtorch.secure.he import EncryptedSum


@pytest.fixture(scope="module")
def keys():
    return make_keys()


def rows(count, size, largest):
    rng = np.random.default_rng(0)
    found = rng.uniform(-largest, largest, (count, size))
    found[:, 0] = largest  # the sum is as large as it may be
    return found


def test_a_sum_is_that_of_plain_numbers_to_a_millionth(keys):
    secret, public = keys
    values = rows(3, SLOTS + 700, LARGEST_SUM / 3)
    client, server = Holder(secret), Adder(public)
    code = server.add([client.encrypt(v) for v in values])
    assert len(code) == 2
    found = client.opened(code, SLOTS + 700)
    assert np.abs(found - values.sum(0)).max() < 1e-6
    assert (found / STEP == np.rint(found / STEP)).all()
    again = client.opened(
        code, SLOTS + 700
    )  # noise is fresh: no two openings give the same low bits
    assert 0 < np.abs(again - found).max() < 2e-6
    assert np.std(again - found) == pytest.approx((2 * (FLOOD**2 + STEP**2 / 12)) ** 0.5, rel=0.15)


def test_a_server_has_no_secret_key_and_can_open_nothing(keys):
    secret, public = keys
    server = Adder(public)
    code = server.encrypt(np.ones(3))
    held = [v for v in vars(server).values() if hasattr(v, "is_private")]
    assert held and not any(v.is_private() or v.has_secret_key() for v in held)
    import tenseal

    with pytest.raises(ValueError, match="secret_key"):
        tenseal.ckks_vector_from(held[0], code[0]).decrypt()
    with pytest.raises(ConfigError, match="must never have"):
        Adder(secret)
    with pytest.raises(ConfigError, match="opens nothing"):
        Holder(public)
    with pytest.raises(ConfigError, match="no key"):
        Adder(b"nonsense")
    assert secret != public and len(make_keys()[0]) != 0 and make_keys()[0] != secret


def test_numbers_that_would_wrap_are_refused(keys):
    with pytest.raises(ConfigError, match="beyond 256"):
        Adder(keys[1]).encrypt(np.array([LARGEST_SUM + 1]))
    with pytest.raises(ConfigError, match="beyond 256"):
        Adder(keys[1]).encrypt(np.array([np.nan]))


def federation(aggregator, **options):
    recipe = {"strategy": FedAvg(weighting="uniform"), "epochs": 1} | options
    return Server(mlp(), make_clients([9, 7, 8]), Recipe(aggregator=aggregator, **recipe))


def test_a_run_gives_the_model_of_the_plain_mean():
    made, plain = federation(HE()), federation(Mean())
    figures = [*made.rounds(2)][-1]
    plain.fit(2, progress=False)
    for one, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert (one - other).abs().max() < 2e-6
    assert figures["bytes_up"] > 100_000 and figures["he_seconds"] > 0
    assert "update_norm" not in figures


def test_buffers_are_in_the_sum_and_long_numbers_are_clamped_and_counted():
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    server = Server(
        net, make_clients([9, 7, 8]), Recipe(aggregator=HE(), batch_size=None, epochs=1)
    )
    before = net[1].running_mean.clone()
    server.round()
    assert not torch.equal(net[1].running_mean, before)
    total = EncryptedSum()
    total.expect(3, Nothing(), 0.0)
    wild = Server(mlp(), make_clients([9, 7, 8]), Recipe(aggregator=HE(), lr=1e7, epochs=1))
    assert wild.round()["clamped"] > 0


class Curious(Observer):
    def sent(self, update):
        raise AssertionError("seen")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"channel": (TopK(),)}, "cannot be added"),
        ({"strategy": FedAvg(weighting="examples")}, "weighs all clients alike"),
        ({"privacy": ClientLevel(rounds=1)}, "would see it before the server adds"),
        ({"privacy": DistributedDP(rounds=1)}, "use --aggregator secure"),
    ],
    ids=["channel", "examples", "client level", "distributed"],
)
def test_what_does_not_go_with_it(options, why):
    with pytest.raises(ConfigError, match=why):
        federation(HE(), **options)


def test_an_observer_that_would_see_single_updates_is_refused():
    recipe = Recipe(aggregator=HE())
    with pytest.raises(ConfigError, match="shows to nobody"):
        Server(mlp(), make_clients([9, 7, 8]), recipe, observers=[Curious()])
    with pytest.raises(ConfigError, match="needs 3 clients"):
        Server(mlp(), make_clients([9, 7]), recipe)


def test_without_tenseal_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtorch\[he\]'"):
        make_keys()
