"""Attacks on the seven rows of test_aggregation_vectors, of which the last lies."""

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, FedAvg, Local, Median, Recipe, Scaffold, Server, TrimmedMean
from fedtorch.aggregation.vectors import FLTrust, Krum
from fedtorch.privacy import ClientLevel
from fedtorch.rounds.attacks import (
    Alie,
    Gauss,
    Ipm,
    LabelFlip,
    Mimic,
    MinMax,
    MinSum,
    SignFlip,
    furthest,
)
from fedtorch.rounds.threat import Threat
from test_aggregation_vectors import ROWS

HONEST = torch.tensor(ROWS[:6], dtype=torch.float64)
OWN = torch.tensor([(1.0, 1.0), (2.0, 0.0)], dtype=torch.float64)

KNOWN = {
    "sign": (SignFlip(scale=2.0), [-2.0, -2.0]),
    "alie": (Alie(z=1.5), [0.794003, 1.794003]),
    "ipm": (Ipm(epsilon=0.5), [-0.504167, -1.004167]),
    "min-max": (MinMax(), [0.854196, 1.854196]),
    "min-sum": (MinSum(), [0.808160, 1.808160]),
    "mimic": (Mimic(), [1.0, 2.0]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_attack_on_known_rows(name):
    threat, want = KNOWN[name]
    found = threat.rows(HONEST, OWN, 0)
    assert found.shape == OWN.shape and found[0].tolist() == pytest.approx(want, abs=6e-7)


@pytest.mark.parametrize("attack", [MinMax(), MinSum()], ids=["max", "sum"])
def test_the_farthest_is_found_among_many_who_are_close_together_and_far_away(attack):
    g = torch.Generator().manual_seed(0)
    honest = 1e4 + 1e-4 * torch.randn(30, 3, generator=g, dtype=torch.float64)
    apart = (honest[:, None] - honest).square().sum(2)
    away = (attack.rows(honest, honest[:1], 0) - honest).square().sum(1)
    allowed, found = (apart.sum(1).max(), away.sum()) if attack.sums else (apart.max(), away.max())
    assert float(found / allowed) == pytest.approx(1, abs=1e-3)


def test_how_far_alie_goes_unseen():
    assert furthest(25, 5) == pytest.approx(0.253347, abs=6e-7)
    assert furthest(50, 12) == pytest.approx(0.336038, abs=6e-7)
    assert furthest(7, 1) == 0


def test_noise_is_new_each_round_and_of_the_size_asked_for():
    big = torch.zeros(2, 5000)
    one, same, other = (Gauss(std=3.0).rows(HONEST, big, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(3, rel=0.05) and not torch.equal(one[0], one[1])


def test_labels_are_turned_round():
    y = torch.tensor([0, 3, 9])
    assert LabelFlip().data(TensorDataset(torch.zeros(3, 1), y)).tensors[1].tolist() == [9, 6, 0]
    with pytest.raises(ConfigError, match=r"threat\.classes 4 is too few for label 9"):
        LabelFlip(classes=4).data(TensorDataset(torch.zeros(3, 1), y))


def run(threat: Threat | None, chunk: int = 1, **options: object) -> tuple[Server, dict]:
    recipe = Recipe(**{"epochs": 1, "strategy": FedAvg(weighting="uniform"), **options})
    engine = Local(chunk=chunk)
    server = Server(mlp(), make_clients([9] * 6), recipe, engine=engine, threat=threat, seed=4)
    return server, server.round()


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_mean_of_honest_and_forged_updates(chunk):
    """One of six sends -5 times the mean of the others: the step is 0 x of it."""
    start = weights(mlp())
    server, figures = run(Ipm(epsilon=5.0), chunk)
    now = weights(server.model)
    assert all(torch.allclose(v, now[k], atol=1e-7) for k, v in start.items())
    assert len(figures["liars"]) == 1
    again = run(Ipm(epsilon=5.0), chunk)[1]["liars"]
    assert again == figures["liars"], "who lies is the seed's"


def test_a_rule_holds_where_the_mean_does_not():
    honest = run(None)[0]
    ends = {}
    rules = {"mean": {}, "median": {"aggregator": Median()}, "krum": {"aggregator": Krum()}}
    for name, options in rules.items():
        server, figures = run(SignFlip(scale=50.0), **options)
        gap = server.model[0].weight.detach() - honest.model[0].weight.detach()
        ends[name] = float(gap.norm())
        assert figures["liars"] and (name == "mean" or ends[name] < ends["mean"] / 5)
        if name == "krum":
            assert set(figures["liars"]) <= {*figures["left_out"], *figures["far"]}


@pytest.mark.parametrize("trusted", ["c0", "c1", "c2"])
def test_whom_a_rule_trusts_does_not_lie(trusted):
    recipe = Recipe(aggregator=FLTrust(trusted=trusted))
    server = Server(mlp(), make_clients([6, 6, 6]), recipe, threat=SignFlip())
    assert len(server.recipe.aggregator.who) == 1 and trusted not in server.recipe.aggregator.who


def test_a_liar_trains_on_flipped_labels():
    plain, lying = (run(t, 6)[0] for t in (None, LabelFlip(liars=3)))
    assert lying.recipe.aggregator.threat.classes == 4, "as the labels say"
    assert not torch.equal(plain.model[0].weight, lying.model[0].weight)
    assert len(lying.recipe.aggregator.who) == 3


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: run(Ipm(liars=6)), "leaves no honest one of 6"),
        (lambda: Ipm(liars=0), "threat.liars must be at least 1"),
        (lambda: Ipm(epsilon=-1.0), "threat.epsilon must be a number >= 0"),
        (
            lambda: run(Ipm(), strategy=Scaffold()),
            "threat ipm puts its own in the place of .* scaffold needs the mean .* or leave threat out",
        ),
        (
            lambda: run(Ipm(), strategy=FedAvg(weighting="examples")),
            "threat ipm .*: aggregator mean counts every client once",
        ),
        (
            lambda: run(
                Ipm(), privacy=ClientLevel(noise_multiplier=1.0, rounds=1, insecure_seed=1)
            ),
            "ipm forges what single clients send, .* leave threat out",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, why):
    with pytest.raises(ConfigError, match=why):
        make()


def test_a_threat_is_named_on_the_command_line(fedtorch):
    small = [
        "train",
        "--model",
        "logistic",
        "--rounds",
        1,
        "--tracking",
        "none",
        "--privacy",
        "none",
    ]
    code, out, _ = fedtorch(
        *small, "--threat", "sign-flip", "--threat.liars", 2, "--aggregator", "median"
    )
    assert code == 0 and re.search(
        r"^threat sign-flip \(liars 2, scale 1\): clients \d, \d lie$", out, re.M
    )
    assert "attacked" not in out


def test_an_attack_that_does_nothing_and_a_rule_that_is_told_of_fewer_are_said():
    """ALIE's z is 0 until liars and some honest ones are more than half."""

    def said(threat, **rule):
        notes = run(threat, **rule)[0].notes
        return [n for n in notes if "z is 0" in n or "ready for" in n]

    assert said(Alie()) == [
        "threat alie: the paper's z is 0 for 1 of 6, and who lies sends the honest mean: take "
        "more threat.liars, or give threat.z"
    ]
    assert not said(Alie(z=1.0)) and not said(Alie(liars=3)) and not said(SignFlip())
    few = said(SignFlip(liars=2), aggregator=TrimmedMean(f=1))
    assert few == ["threat sign-flip: 2 lie, and aggregator.f makes trimmed-mean ready for 1"]
    assert not said(SignFlip(liars=2), aggregator=TrimmedMean(f=2))
    assert not said(SignFlip(), aggregator=Median())
