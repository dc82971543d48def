"""Gradient inversion through the real server: who is not trusted sees what the plan says, and no more."""

import pytest
import torch
from torch import nn

from fedtorch import Client, FedAvg, FedPer, Recipe, Secure, ServerAdam
from fedtorch.attacks import gradient
from fedtorch.attacks.gradient import GradientAttack, invert
from fedtorch.attacks.seen import seen
from fedtorch.privacy import ClientLevel, DistributedDP, LocalDP, SampleLevel
from fedtorch.types import ConfigError


def clients(count=4, examples=3):
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}",
            (torch.rand(examples, 1, 6, 6, generator=g), torch.arange(k, k + examples) % 4),
        )
        for k in range(count)
    ]


def net(hidden=40):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, hidden), nn.ReLU(), nn.Linear(hidden, 4))


PLANS = {
    "none": (Recipe(), "plain", "each client's noised update"),
    "sample": (
        Recipe(privacy=SampleLevel(rounds=9, noise_multiplier=2.0)),
        "private",
        "each client's noised update",
    ),
    "client": (
        Recipe(privacy=ClientLevel(rounds=9, rate=1.0, noise_multiplier=2.0)),
        "private",
        "their noised mean",
    ),
    "local": (Recipe(privacy=LocalDP(rounds=9)), "private", "each client's noised update"),
    "masks": (Recipe(aggregator=Secure()), "message mean", "each client's noised update"),
    "distributed": (
        Recipe(privacy=DistributedDP(rounds=9), aggregator=Secure()),
        "private",
        "the noised sum alone",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plain_is_exact_and_private_is_not(name):
    recipe, own, who = PLANS[name]
    found = invert(net(), clients(), recipe)
    views = {v.name: v for v in found.views}
    assert [*views] == ["plain", "private", "message", "mean"] and found.way == "divide"
    assert views["plain"].middle > 40
    assert views["private"].middle < 12 and views["message"].middle < 12
    assert [v.name for v in found.views if v.own] == own.split()
    assert who in views["private"].who and found.mean_off <= 2.0**-41
    assert found.held.shape == (4, 1, 6, 6) == views["mean"].found.shape


def test_the_mean_under_masks_still_shows_examples():
    found = invert(net(400), clients(), Recipe(aggregator=Secure()))
    mean = next(v for v in found.views if v.name == "mean")
    assert int((mean.near > 40).sum()) >= 2  # masks hide whose it is, not what


def test_with_more_examples_less_is_found():
    few, many = (
        invert(net(), clients(2, 8), Recipe(), GradientAttack(examples=n)).views[0] for n in (1, 8)
    )
    assert few.middle > 40 > many.middle and many.near.shape == (16,)


def test_rows_of_tables_are_divided_out_too():
    g = torch.Generator().manual_seed(0)
    own = [Client(str(k), (torch.randn(5, 7, generator=g), torch.ones(5, 1))) for k in range(2)]
    recipe = Recipe(loss=nn.functional.binary_cross_entropy_with_logits)
    found = invert(nn.Linear(7, 1), own, recipe)
    assert found.views[0].middle > 40 and found.mean_off is None  # two make no masks
    # a loss of the whole batch has no private twin
    assert len(found.views) == 1 and "one number for each example" in found.notes[0]


def test_without_a_linear_layer_it_looks_for_the_gradient(monkeypatch):
    monkeypatch.setattr(gradient.reconstruct, "STEPS", 60)
    monkeypatch.setattr(gradient.reconstruct, "POLISH", 60)
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4))
    found = invert(conv, clients(1), Recipe())
    plain, private = found.views
    assert found.way == "match" and plain.middle > 30 and private.middle < 12
    monkeypatch.setattr(gradient.reconstruct, "STEPS", 1)
    shared = invert(
        conv, clients(3), Recipe(privacy=ClientLevel(rounds=9, rate=1.0, noise_multiplier=2.0))
    )
    assert [v.name for v in shared.views] == ["plain"] and "left out" in shared.notes[0]


def test_what_is_seen_is_what_the_round_lets_go():
    each = seen(net(), clients(), Recipe(lr=0.5, steps=1, batch_size=None))
    (mean,) = seen(net(), clients(), Recipe(lr=0.5, steps=1, batch_size=None, aggregator=Secure()))
    for k, v in mean.items():
        assert torch.allclose(v, sum(u[k] for u in each).to(v) / 4, atol=1e-6)


def words():
    return [Client(str(k), (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4))) for k in "ab"]


REFUSED = {
    "another optimizer": (clients, Recipe(optimizer="adam"), {}, "optimizer adam"),
    "parts kept": (clients, Recipe(FedPer(personal=("3.*",))), {}, "strategy fedper"),
    "words": (words, Recipe(), {}, "attack membership takes them"),
    "too many examples": (clients, Recipe(), {"examples": 99}, "more than any client has"),
    "one example alone": (clients, Recipe(), {"way": "match", "examples": 2}, "one example"),
    "steps too long": (clients, Recipe(lr=1e38), {"steps": 3}, "not finite: lower lr"),
    "a server optimizer": (
        clients,
        Recipe(
            FedAvg(server=ServerAdam()),
            privacy=ClientLevel(rounds=9, rate=1.0, noise_multiplier=2.0),
        ),
        {},
        "strategy.server",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_is_one_sentence(name):
    make, recipe, options, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        invert(net(), make(), recipe, GradientAttack(**options))
    with pytest.raises(ConfigError, match="attack"):
        GradientAttack(**{"examples": 0})
