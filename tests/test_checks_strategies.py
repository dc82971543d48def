"""Strategies of a user's own that mix clients, or take a group's name that is taken, are refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fedtorch import Client, ConfigError, FedAvg, Recipe, Server, Strategy
from fedtorch.privacy import ClientLevel
from fedtorch.strategies.base import Correction
from fedtorch.tree import tmap


def minus_mean(tree):
    return tmap(lambda v: v - v.mean(0), tree)


@dataclass(frozen=True, kw_only=True)
class Sends(Strategy):
    """Sends and remembers under names of choice; what it draws is the client's own."""

    sends: str = "own"
    remembers: str = "own"
    mixes: str = ""

    def remember(self, params):
        return {self.remembers: tmap(torch.zeros_like, params)}

    def correction(self, ctx):
        kept = ctx.memory[self.remembers]
        return Correction(0.1, minus_mean(kept) if self.mixes == "correction" else kept)

    def correct(self, grads, params, ctx):
        return minus_mean(grads) if self.mixes == "correct" else tmap(torch.add, grads, params)

    def upload(self, params, ctx):
        delta = tmap(torch.sub, params, ctx.anchor)
        drawn = tmap(lambda v: v + torch.rand(v.shape), delta)
        sent = minus_mean(delta) if self.mixes == "upload" else delta
        return {"delta": sent, self.sends: drawn}, {self.remembers: delta}


def server(**options):
    data = [Client(str(k), (torch.randn(6, 3), torch.arange(6) % 2)) for k in range(3)]
    return Server(nn.Linear(3, 2), data, Recipe(Sends(**options), lr=0.1, batch_size=3))


def test_a_strategy_that_keeps_to_its_rows_trains_whatever_it_draws():
    assert server().round()["clients"] == 3


@pytest.mark.parametrize("half", ["upload", "correction", "correct"])
def test_a_strategy_that_mixes_clients_is_refused_by_the_name_of_the_method(half):
    with pytest.raises(ConfigError, match=rf"Sends\.{half} makes .* depend on others"):
        server(mixes=half)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"sends": "below"}, "sends a group 'below'"),
        ({"sends": "buffers"}, "sends a group 'buffers'"),
        ({"remembers": "personal"}, "remembers a group 'personal'"),
        ({"remembers": "unsent/delta"}, "remembers a group 'unsent/delta'"),
    ],
)
def test_names_that_mean_something_else_are_refused(options, why):
    with pytest.raises(ConfigError, match=why):
        server(**options)


@dataclass(frozen=True)
class Follows(Strategy):
    """Sends its change once more, as often as it has steps, and one."""

    mixes: bool = False

    def following(self, ctx):
        times = ctx.steps.double()
        ones = tmap(torch.ones_like, ctx.anchor)
        return {"more": (times.mean().expand(len(times)) if self.mixes else times, ones)}

    def step(self, mean, extras, share):
        return tmap(torch.add, mean["delta"], mean["more"]), extras


def test_groups_that_follow_from_the_change_are_sums_of_each_clients_own():
    """One and three times the mean change, of clients of two steps each."""
    ends = []
    for strategy in (Follows(), FedAvg(weighting="uniform")):
        data = [Client(str(k), (torch.ones(6, 3) * k, torch.arange(6) % 2)) for k in range(3)]
        torch.manual_seed(0)
        run = Server(nn.Linear(3, 2), data, Recipe(strategy, lr=0.1, batch_size=3, epochs=1))
        start = {k: v.detach().clone() for k, v in run.model.named_parameters()}
        run.round()
        ends.append({k: v.detach() - start[k] for k, v in run.model.named_parameters()})
    assert all(torch.allclose(v, 1 + 3 * ends[1][k], atol=1e-5) for k, v in ends[0].items())
    plan = ClientLevel(noise_multiplier=1.0, rounds=1, rate=1.0)
    assert Recipe(Follows(), privacy=plan).needs_rows, "a plan clips all groups together"
    with pytest.raises(ConfigError, match=r"Follows\.following makes .* depend on others"):
        Server(nn.Linear(3, 2), data, Recipe(Follows(mixes=True), lr=0.1, batch_size=3))
