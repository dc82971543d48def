"""Distributed privacy: shares of the noise under masks, in whole numbers that never wrap."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtorch import FedAvg, Local, Recipe, Secure, Server
from fedtorch.privacy import DistributedDP, SampleLevel
from fedtorch.privacy.accounting.events import epsilon
from fedtorch.privacy.noise.rounding import rounded
from fedtorch.privacy.noise.streams import stream
from fedtorch.rounds.participation import Everyone, Uniform
from fedtorch.run.report import promise, statement
from fedtorch.sites.ledgers import SiteLedgers, book
from fedtorch.types import ConfigError, Task
from private_case import clients, model, silent


def federation(plan, n=6, net=None, width=32, **options):
    """``n`` clients under masks; of the silent model all that is seen is noise."""
    who = options.pop("who", None) or clients((4,) * n, 40, 0.0)
    chunk = options.pop("chunk", None)
    aggregator = Secure(width=width, threshold=options.pop("threshold", None))
    recipe = Recipe(FedAvg(), privacy=plan, aggregator=aggregator, lr=1.0)
    return Server(net or silent(), who, recipe, engine=Local(chunk=chunk), **options)


def weights(server):
    return torch.cat([p.detach().flatten() for p in server.model.parameters()]).double()


def opened(server):
    """The next round's sum, in steps of the grid."""
    before = weights(server)
    figures = server.round()
    moved = (weights(server) - before) * figures["clients"]
    return moved * server.recipe.privacy.resolution


# how much noise


@pytest.mark.parametrize(("target", "known"), [(1, 4.045385), (3, 1.496589), (8, 0.638087)])
def test_noise_for_a_target_on_a_fine_grid(target, known):
    assert DistributedDP(epsilon=target, rounds=1).calibrated(1) == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize(
    ("plan", "numbers"),
    [
        (DistributedDP(epsilon=3.0, clip=0.3, resolution=64.0), 1),
        (DistributedDP(epsilon=3.0, clip=0.3).placed(20, 14, 1000), 14 * 1000),
    ],
    ids=["of one", "of a run"],
)
def test_what_rounding_of_tables_adds_to_delta_is_of_all_numbers_of_all_rounds(plan, numbers):
    noise = plan.calibrated(5)
    each = (1 + math.exp(plan.planned(noise, 5))) * plan.table(noise).error
    assert plan.slack(noise, 5) == pytest.approx(5 * numbers * each, rel=1e-9, abs=0)


@pytest.mark.parametrize("clip", [1e-4, 0.3, 50.0])
def test_the_noise_of_a_run_costs_its_target_on_its_own_grid(clip):
    plan = DistributedDP(epsilon=3.0, rounds=20, clip=clip).placed(20, 14, 10_000)
    noise = plan.calibrated(20)
    assert 3.0 - 1e-6 < plan.planned(noise, 20) <= 3.0
    assert math.frexp(plan.resolution)[0] == 0.5
    share = math.sqrt(14) * 4096 / (noise * clip)
    assert plan.resolution == pytest.approx(share, rel=0.42)


@pytest.mark.parametrize("width", [32, 64])
def test_the_opened_sum_has_the_noise_that_is_planned(width):
    server = federation(DistributedDP(epsilon=8, rounds=3, clip=0.3), 10, width=width)
    plan, noise = server.recipe.privacy, server.private.noise
    assert (plan.shares, plan.clients) == (7, 10)
    sums = torch.cat([opened(server) for _ in range(3)])
    spread = noise * 0.3 * math.sqrt(10 / 7)
    assert server.private.figures()["privacy_noise_std"] == pytest.approx(spread)
    assert sums.std().item() / plan.resolution == pytest.approx(spread, rel=0.02)
    # whole steps: what is not is the model's own rounding to float32
    assert (sums - sums.round()).abs().max() < 0.05


def test_the_fewest_honest_shares_are_noise_enough_and_one_fewer_is_not():
    plan = DistributedDP(epsilon=8, rounds=5, clip=0.3, colluding=2).placed(10, 7, 2000)
    noise, task = plan.calibrated(5), Task({}, {}, 0, 0, 1.0, {"clip": 0.3, "noise": 0.0})
    task = replace(task, privacy={"clip": 0.3, "noise": noise})
    assert plan.shares == 5
    sent = {"delta": {"w": torch.zeros(10, 2000).double()}}
    rows = plan.client(sent, torch.ones(10), task, [f"c{k}" for k in range(10)])["delta"]["w"]
    needed = noise * 0.3
    assert rows[:5].sum(0).std().item() == pytest.approx(needed, rel=0.06)
    assert rows[:4].sum(0).std().item() < 0.95 * needed
    share = (needed * plan.resolution) ** 2 / 5
    assert rows[0].std().item() * plan.resolution == pytest.approx(math.sqrt(share), rel=0.06)


# what one client can change


def test_one_client_moves_the_sum_by_what_is_charged_and_not_by_the_clip_alone():
    plan = DistributedDP(noise_multiplier=40.0, rounds=1).placed(10, 7, 9610)
    charged, scale = plan.event(40.0), plan.clip * plan.resolution
    rng, norms, lengths = np.random.default_rng(0), [], []
    for k in range(10):
        x = rng.normal(size=9610)
        q = rounded(x * scale / math.sqrt(x @ x), plan.reach, stream("aes", 1, "coins", k))
        norms.append(math.sqrt(q @ q))
        lengths.append(float(np.abs(q).sum()))
    assert max(norms) <= charged.l2 and max(lengths) <= charged.l1

    def covers(event):
        return event.l2 >= max(norms)

    assert covers(charged)
    assert not covers(replace(charged, l2=scale))  # the bug: rounding left out
    wrong = replace(charged, l2=scale, l1=scale * math.sqrt(9610))
    assert epsilon([wrong], 1e-5) < epsilon([charged], 1e-5)


def test_longer_updates_are_clipped_and_broken_ones_are_noise_alone(monkeypatch):
    plan = DistributedDP(noise_multiplier=1e-3, rounds=1, clip=0.5).placed(3, 3, 60)
    task = Task({}, {}, 0, 0, 1.0, {"clip": 0.5, "noise": 1e-3})
    sent = {"delta": {"a": torch.randn(3, 5, 8).double(), "b": 100 * torch.randn(3, 20).double()}}
    sent["delta"]["b"][1, 3] = math.nan
    out = plan.client(sent, torch.ones(3), task, ["x", "y", "z"])["delta"]
    rows = torch.cat([out["a"].flatten(1), out["b"]], 1)
    norms = rows.norm(dim=1).tolist()
    assert norms == pytest.approx([0.5, 0.0, 0.5], abs=0.02)
    assert rows[1].count_nonzero() > 30
    was = torch.cat([sent["delta"]["a"].flatten(1), sent["delta"]["b"]], 1)[0]
    assert torch.dot(rows[0], was) > 0.99 * 0.5 * was.norm()


def test_no_share_and_no_coin_is_ever_drawn_twice():
    plan = DistributedDP(noise_multiplier=1.0, rounds=2).placed(4, 3, 300)
    sent = {"delta": {"w": torch.full((2, 300), 0.01).double()}}
    rows = []
    for draw in (Task({}, {}, r, 0, 1.0, {"clip": 1.0, "noise": 1.0}) for r in range(2)):
        rows += [*plan.client(sent, torch.ones(2), draw, ["a", "b"])["delta"]["w"]]
    corr = torch.corrcoef(torch.stack(rows))
    assert (corr - torch.eye(4)).abs().max() < 0.25


def test_nothing_wraps_however_many_there_are():
    for n in (3, 5000, 40_000):
        plan = DistributedDP(epsilon=8, rounds=10).placed(n, 2 * n // 3 + 1, 1000)
        most, scale = plan.grid(n)
        farthest = plan.resolution * plan.clip + 1 + plan.table(plan.calibrated(10)).end
        assert farthest <= most * scale
        assert n * (most * scale + 0.5) < 2**31
    with pytest.raises(ConfigError, match="beyond 32 bits"):
        replace(plan, resolution=plan.resolution * 8).placed(40_000, 26_667, 1000)
    with pytest.raises(ConfigError, match="too long"):
        DistributedDP(epsilon=8, rounds=1, clip=1e9).placed(10, 7, 100)


# one run


def test_the_same_bits_for_any_chunk_and_width():
    plan = DistributedDP(epsilon=8, rounds=2, insecure_seed=3)
    runs = []
    for width, chunk in ((32, None), (32, 1), (64, 3)):
        server = federation(
            plan, 6, copy.deepcopy(model()), width, who=clients((5,) * 6), chunk=chunk
        )
        server.fit(2, progress=False)
        runs.append(weights(server))
    # steps of training may differ in the last bit by chunk: all but one in ten thousand round alike
    assert all((runs[0] - r).abs().max() < 2e-3 for r in runs[1:])
    # noise alone is the same to the bit
    silents = []
    for width, chunk in ((32, None), (32, 2), (64, 4)):
        server = federation(plan, 6, width=width, chunk=chunk)
        server.fit(2, progress=False)
        silents.append(weights(server))
    assert all(torch.equal(silents[0], r) for r in silents[1:])


def test_a_resumed_run_goes_on_to_the_bit_and_pays_no_less():
    plan = DistributedDP(epsilon=8, rounds=4, insecure_seed=5)
    whole = federation(plan, 5, who=clients((5,) * 5), net=model())
    whole.fit(2, progress=False)
    saved = copy.deepcopy(whole.state_dict())
    spent = whole.private.spent()
    whole.fit(2, progress=False)
    again = federation(plan, 5, who=clients((5,) * 5), net=model())
    again.load_state_dict(saved)
    assert again.private.spent() == spent
    again.fit(2, progress=False)
    assert torch.equal(weights(again), weights(whole))
    assert again.private.spent() == whole.private.spent() <= 8
    assert [e.event.mechanism for e in again.private.ledger.entries] == ["skellam"] * 4


def test_every_round_is_charged_to_whoever_is_asked_without_amplification():
    server = federation(DistributedDP(epsilon=8, rounds=3), 9, participation=Uniform(cohort_size=5))
    plan = server.recipe.privacy
    assert (plan.clients, plan.shares) == (5, 4)
    server.fit(3, progress=False)
    entries = server.private.ledger.entries
    assert all(e.event.rate == 1 and len(e.clients) == 5 for e in entries)
    per = server.private.ledger.spent_by_client(1e-5)
    rounds = {i: sum(i in e.clients for e in entries) for i in per}
    for i, spent in per.items():
        assert spent == pytest.approx(plan.planned(server.private.noise, rounds[i]))


def test_a_sum_of_fewer_than_the_noise_is_made_for_is_not_opened():
    server = federation(
        DistributedDP(epsilon=8, rounds=8), 6, participation=Everyone(dropout=0.5), seed=2
    )
    short = 0
    for _ in range(6):
        before = weights(server)
        figures = server.round()
        if figures["clients"] < 5:
            short += 1
            assert torch.equal(weights(server), before)
            assert "honest" in figures["too_few"] or "secure" in figures["too_few"]
        else:
            assert not torch.equal(weights(server), before)
    assert short
    assert len(server.private.ledger) == 6  # what is asked for is paid for


def test_a_low_threshold_means_more_noise_for_each():
    high = federation(DistributedDP(epsilon=8, rounds=1), 9).recipe.privacy
    low = federation(DistributedDP(epsilon=8, rounds=1), 9, threshold=5).recipe.privacy
    assert (high.shares, low.shares) == (7, 5)
    noise = low.calibrated(1)
    assert low.spread(noise, {}, 9) > high.spread(noise, {}, 9)


def test_nothing_of_one_client_goes_beside_the_sum():
    loud = federation(DistributedDP(epsilon=8, rounds=1), 5)
    strict = federation(DistributedDP(epsilon=8, rounds=1, strict=True), 5)
    told = loud.round()
    assert "nonprivate_train_loss" in told
    assert not any("update_norm" in k for k in told)
    silent_figures = strict.round()
    assert not any(
        "loss" in k
        or "examples" in k
        or "norm" in k.replace("clip_norm", "").replace("step_norm", "")
        for k in silent_figures
    )
    plan = DistributedDP(strict=True)
    assert plan.disclosed({"train_loss": torch.ones(2), "update_norm": torch.ones(2)}) == {}


def test_the_report_says_who_is_trusted_and_by_what_it_is_priced():
    server = federation(DistributedDP(epsilon=8, rounds=2, colluding=1), 6)
    said = "\n".join(promise(server.private))
    assert "at most 1 work together with the server" in said and "rdp accountant" in said
    told = statement(server.private)
    assert told["accountant"] == "rdp" and "tables of 128-bit" in told["randomness"]
    assert 0 < told["added_to_delta_by_rounding_of_probabilities"] < 1e-20
    assert server.private.delta >= 1e-5
    assert any("noise outweighs" in n for n in server.notes)
    fine = federation(DistributedDP(epsilon=8, rounds=2), 6, width=64)
    assert any("half the bytes" in n for n in fine.notes)


# what is refused


def test_without_masks_it_is_refused():
    with pytest.raises(ConfigError, match="aggregator secure"):
        Server(silent(), clients((4,) * 6, 40), Recipe(privacy=DistributedDP(rounds=1)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"accountant": "prv"}, "priced by rdp"),
        ({"resolution": 1000.0}, "power of two"),
        ({"resolution": 0.5}, "power of two"),
        ({"statistics_noise": 10.0}, "statistics of columns"),
        ({"colluding": -1}, "colluding"),
        ({"shares": 0}, "shares"),
    ],
)
def test_options_without_sense(options, why):
    with pytest.raises(ConfigError, match=why):
        DistributedDP(**options)


def test_shares_that_are_not_sure_are_refused():
    with pytest.raises(ConfigError, match="no share of the noise is sure"):
        federation(DistributedDP(rounds=1, colluding=5), 6)
    with pytest.raises(ConfigError, match="honest shares"):
        federation(DistributedDP(rounds=1, shares=6), 6)
    plan = DistributedDP(rounds=1).placed(6, 5, 100)
    plan.holds(6, 5)
    with pytest.raises(ConfigError, match="honest shares"):
        plan.holds(6, 4)  # a roster whose sum would be opened sooner
    with pytest.raises(ConfigError, match="32,768 is the most"):  # before a table of it is made
        replace(plan, resolution=2.0**40).holds(6, 5)
    with pytest.raises(ConfigError, match="a Server fills in"):
        DistributedDP(rounds=1).holds(6, 5)
    with pytest.raises(ConfigError, match="cannot be reached"):
        DistributedDP(epsilon=1e-4, rounds=100).calibrated(100)


def test_more_colluding_clients_than_masks_hold_against_are_refused():
    # an honest client signs one list: two of 7 take 14 signatures, and with 3 who sign both there are 13
    DistributedDP(rounds=1, colluding=3).placed(10, 7, 100)
    with pytest.raises(ConfigError, match=r"two lists of 7 confirmed.*colluding \(to 3 at most"):
        DistributedDP(rounds=1, colluding=4).placed(10, 7, 100)
    plan = DistributedDP(rounds=1, shares=2, colluding=1).placed(6, 5, 100)
    with pytest.raises(ConfigError, match="two lists of 3"):  # shares enough, and a low threshold
        plan.holds(6, 3)
    assert plan.check(6, plan.calibrated(1)) is not None


def test_a_task_for_which_the_plan_is_not_made_is_refused():
    plan = DistributedDP(epsilon=8, rounds=1).placed(3, 3, 10)
    sent = {"delta": {"w": torch.zeros(1, 11).double()}}
    task = Task({}, {}, 0, 0, 1.0, {"clip": 1.0, "noise": plan.calibrated(1)})
    with pytest.raises(ConfigError, match="11 numbers"):
        plan.client(sent, torch.ones(1), task, ["a"])
    with pytest.raises(ConfigError, match="not what this plan"):
        DistributedDP(epsilon=8, rounds=1).client(sent, torch.ones(1), task, ["a"])


def test_a_site_with_a_limit_wants_masks_and_charges_its_own_ledger(tmp_path):
    plan = DistributedDP(epsilon=2.0, rounds=4).placed(5, 4, 100)
    recipe, noise = Recipe(privacy=plan, aggregator=Secure(width=32)), plan.calibrated(4)
    site = SiteLedgers(tmp_path, "north", 2.5, 1e-5)
    with pytest.raises(ConfigError, match="require_secure"):
        site.admit(recipe, insecure=False, derived=False)
    site.admit(recipe, insecure=False, derived=False, masks=True)
    assert book(plan) == "presence" and book(SampleLevel()) == "example"
    for round in range(4):
        site.charge(plan, round, noise)
    assert site.spent() == pytest.approx(2.0, abs=1e-5)
    again = SiteLedgers(tmp_path, "north", 2.5, 1e-5)
    assert again.spent() == site.spent()
    plan.hold({"clip": plan.clip, "noise": noise})
    with pytest.raises(ConfigError, match="noise multiplier"):
        plan.hold({"clip": plan.clip, "noise": noise / 2})
