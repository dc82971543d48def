"""Sample-level privacy inside another framework: fedtorch's steps, charged, and nothing else leaves."""

import logging

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fedtorch import (
    ClientOptimizer,
    FedAvg,
    FedDyn,
    FedExP,
    FedProx,
    Median,
    Recipe,
    Scaffold,
    ServerAdam,
    TopK,
)
from fedtorch.privacy import Budget, LocalDP, SampleLevel
from fedtorch.privacy.answers import has_receipt
from fedtorch.sites.inside import PrivateVisits
from fedtorch.types import ConfigError, OverBudget

PLAN = SampleLevel(epsilon=8.0, rounds=3, steps=2, sample_rate=0.5, batch_size=4.0)
DATA = (torch.ones(8, 50), torch.zeros(8, dtype=torch.long))


def nothing(out, y):
    return 0 * out.sum(1)


def visits(folder, recipe=None, model=None, data=DATA, **more) -> PrivateVisits:
    recipe = recipe or Recipe(loss=nothing, privacy=PLAN, lr=0.5)
    return PrivateVisits(model or nn.Linear(50, 40), data, recipe, folder, **more)


def sent(model=None) -> dict:
    return {k: v.clone() for k, v in (model or nn.Linear(50, 40)).state_dict().items()}


def test_what_leaves_is_noised_by_the_law_of_the_plan(tmp_path):
    site, weights = visits(tmp_path), sent()
    changes = []
    for round in range(3):
        out = site.visit(weights, round)
        changes += [(out[k].double() - weights[k].double()).flatten() for k in weights]
    # two steps of lr times noise clip / batch_size, as no gradient moves anything
    scale = 0.5 * 2**0.5 * PLAN.calibrated(3) * PLAN.clip / PLAN.batch_size
    assert stats.kstest(torch.cat(changes) / scale, stats.norm.cdf).pvalue > 1e-4


def test_it_learns_what_fedtorch_would(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draw)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0]) > 0).long()
    plan = SampleLevel(noise_multiplier=1.0, steps=4, sample_rate=0.25, batch_size=100.0)
    recipe = Recipe(FedProx(mu=0.01), privacy=plan)
    site = visits(tmp_path, recipe, nn.Linear(5, 2), (x, y), most=100.0)
    weights = {k: v.numpy() for k, v in sent(nn.Linear(5, 2)).items()}
    for round in range(8):
        weights = site.visit(weights, round)
    assert all(type(v) is np.ndarray and v.dtype == np.float32 for v in weights.values())
    scores = x.numpy() @ weights["weight"].T + weights["bias"]
    assert (scores.argmax(1) == y.numpy()).mean() > 0.9


def test_a_spent_budget_stops_it_over_restarts_and_nothing_is_trained(tmp_path):
    site = visits(tmp_path, site="north")
    for round in range(3):
        site.visit(sent(), round)
    assert site.budget.spent == pytest.approx(8.0, abs=1e-2)
    assert (tmp_path / "ledger-example.jsonl").exists()
    with pytest.raises(OverBudget, match="round 3: north would have spent"):
        visits(tmp_path, site="north").visit(sent(), 3)


def test_what_a_release_of_all_data_has_cost_is_lacking_here(tmp_path):
    whole = Budget(tmp_path, LocalDP(epsilon=2.5, rounds=1))
    whole.charge(0)
    site = visits(tmp_path)
    paid = site.budget.charge(0)
    assert paid == site.budget.spent == whole.spent > 2.5 + 4.0
    with pytest.raises(OverBudget, match="would have spent"):
        site.visit(sent(), 1)


def test_it_is_charged_before_a_step_and_knows_what_it_let_go(tmp_path, monkeypatch):
    site, weights = visits(tmp_path), sent()
    out = site.visit(weights, 0)
    assert has_receipt(tmp_path, out) and not has_receipt(tmp_path, weights)
    assert not has_receipt(tmp_path, {k: v + 1e-6 for k, v in out.items()})
    monkeypatch.setattr(type(site._session), "collect", lambda _: 1 / 0)
    before = site.budget.spent
    with pytest.raises(ZeroDivisionError):
        site.visit(weights, 1)
    assert site.budget.spent > before


def test_an_error_of_the_data_is_not_told(tmp_path, caplog):
    class Rows(torch.utils.data.Dataset):
        broken = False

        def __len__(self):
            return 8

        def __getitem__(self, k):
            if self.broken:
                raise ValueError("row 17")
            return torch.ones(50), 0

    rows = Rows()
    site = visits(tmp_path, data=rows)
    rows.broken = True
    with caplog.at_level(logging.ERROR, "fedtorch.site"), pytest.raises(ConfigError) as told:
        for round in range(3):  # a batch may be empty
            site.visit(sent(), round)
    assert "row 17" not in str(told.value) and "row 17" in caplog.text
    assert told.value.__cause__ is None


@pytest.mark.parametrize(
    "change, why",
    [
        ({"privacy": LocalDP(rounds=3)}, "by SampleLevel, not LocalDP"),
        ({"privacy": SampleLevel(epsilon=8.0)}, "for how many rounds"),
        ({"privacy": SampleLevel(noise_multiplier=1.0)}, "give most"),
        ({"privacy": SampleLevel(rounds=3, metrics_epsilon=0.5)}, "tells no figures"),
        ({"strategy": Scaffold()}, "carries weights alone"),
        ({"strategy": FedExP()}, "carries weights alone"),
        ({"strategy": FedDyn()}, "carries weights alone"),
        ({"strategy": FedAvg(server=ServerAdam())}, "server optimizers on the server"),
        ({"aggregator": Median()}, "are the other framework's"),
        ({"channel": (TopK(share=0.5),)}, "are the other framework's"),
        ({"optimizer": ClientOptimizer("LBFGS")}, "LBFGS"),
    ],
    ids=[
        *("plan", "rounds", "most", "figures", "memory", "step", "both", "server"),
        *("aggregator", "channel", "optimizer"),
    ],
)
def test_what_the_other_framework_would_not_do_is_refused(tmp_path, change, why):
    with pytest.raises(ConfigError, match=why):
        visits(tmp_path, Recipe(**{"privacy": PLAN} | change))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"bias": None}, "lack bias"),
        ({"more": torch.zeros(2)}, r"more, \(2,\)"),
        ({"weight": torch.zeros(50, 40)}, "weight"),
        ({"bias": [1.0]}, "not an array"),
    ],
    ids=["lacking", "unknown", "shape", "list"],
)
def test_weights_of_another_model_are_refused_and_cost_nothing(tmp_path, change, why):
    site = visits(tmp_path)
    with pytest.raises(ConfigError, match=why):
        site.visit({k: v for k, v in (sent() | change).items() if v is not None}, 0)
    assert site.budget.spent == 0
