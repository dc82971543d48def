"""The aggregator secure in a simulation: the same whole numbers, and nothing of one client beside them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, watched
from fedtorch import (
    ConfigError,
    Everyone,
    FedAvg,
    FedNova,
    Local,
    Mean,
    Observer,
    Recipe,
    Scaffold,
    Secure,
    Server,
    Uniform,
)
from fedtorch.privacy import AdaptiveClip, ClientLevel, Nothing, SampleLevel
from fedtorch.rounds.attacks import SignFlip
from fedtorch.rounds.progress import troubles
from fedtorch.secure import costs
from fedtorch.secure.encode import Figures, Layout, from_words, seal, to_words, unseal
from fedtorch.types import CLIP_BIT, Released
from secure_rounds import Round, terms

SIZES = [9, 14, 7, 12, 10]
NOISE = dict(noise_multiplier=0.5, rounds=2, insecure_seed=1)


def norm_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))


def trained(aggregator, strategy=FedAvg(), model=mlp, rounds=2, sizes=SIZES, **given):
    order = {"engine": Local(solver="general")}
    order |= {k: given.pop(k) for k in ("engine", "participation") if k in given}
    server = Server(
        model(), make_clients(sizes), Recipe(strategy, aggregator=aggregator, **given), **order
    )
    figures = {}
    for _ in range(rounds):
        figures = server.round()
    return server, figures


def apart(one, two):
    states = (one.model.state_dict(), two.model.state_dict())
    return max(
        float((states[0][k].double() - states[1][k].double()).abs().max()) for k in states[0]
    )


@pytest.mark.parametrize("model", [mlp, norm_model])
@pytest.mark.parametrize(
    ("aggregator", "plain", "off"),
    [
        (Secure(), FedAvg(weighting="uniform"), 1e-9),
        (Secure(width=32, range=4.0), FedAvg(weighting="uniform"), 1e-6),
        (Secure(weight_cap=100), FedAvg(), 1e-9),
        (Secure(width=32, range=4.0, weight_cap=100), FedAvg(), 1e-6),
    ],
    ids=["64", "32", "weighed", "32 weighed"],
)
def test_the_model_is_that_of_the_mean(aggregator, plain, off, model):
    secure, figures = trained(aggregator, model=model)
    usual, expected = trained(Mean(), plain, model)
    assert apart(secure, usual) <= off
    assert figures["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
    assert figures["examples"] == expected["examples"] == sum(SIZES)


@pytest.mark.parametrize("strategy", [Scaffold(), FedNova()], ids=lambda s: type(s).__name__)
def test_groups_and_numbers_of_a_strategy_are_summed_too(strategy):
    secure, _ = trained(Secure(width=32, range=50.0), strategy)
    usual, _ = trained(Mean(), type(strategy)(weighting="uniform"))
    assert apart(secure, usual) < 1e-5


def test_a_weight_cap_is_a_cap():
    secure, _ = trained(Secure(width=32, range=4.0, weight_cap=9))
    uniform, _ = trained(Secure(width=32, range=4.0))
    sized, _ = trained(Mean())
    assert apart(secure, uniform) > 1e-5 and apart(secure, sized) > 1e-5
    # of all but the third, which has 7, the weight is 9
    weights = secure.recipe.weights(torch.tensor([9.0, 14, 7, 12, 10]))
    assert weights.tolist() == [9, 9, 7, 9, 9]


def test_whole_numbers_are_the_same_bits_for_any_chunks():
    models = [
        trained(Secure(width=32, range=4.0), engine=Local(chunk=chunk, solver="general"))[0]
        for chunk in (1, 2, 5)
    ]
    for other in models[1:]:
        assert apart(models[0], other) == 0


def test_the_protocol_opens_the_very_sum_of_the_simulation():
    """Real keys, masks and shares over what five clients of a run sent, one of whom drops out."""
    recipe = Recipe(aggregator=Secure(width=32, range=4.0), epochs=1)
    plain = Server(
        norm_model(),
        make_clients(SIZES),
        Recipe(aggregator=_Shown(), epochs=1),
        engine=Local(solver="general"),
    )
    seen, start = (
        watched(plain),
        {k: v.double().clone() for k, v in plain._weights.copied().items()},
    )
    plain.round()
    rows = [(u, k) for u in seen for k in range(len(u.ids))]
    by_id = {u.ids[k]: (u, k) for u, k in rows}
    shapes = {g: {n: tuple(v.shape[1:]) for n, v in s.items()} for g, s in seen[0].sent.items()}
    layout = Layout.of(shapes, {n: tuple(v.shape[1:]) for n, v in seen[0].buffers.items()})
    coding = recipe.secure.coding(5, recipe.privacy)
    this = Round(
        terms(5, size=layout.size, width=32, scale=coding.scale, range=4.0), gone={2: "masked"}
    )
    for place, (u, k) in enumerate(by_id[f"c{i}"] for i in range(5)):
        sent = {g: {n: v[k] for n, v in s.items()} for g, s in u.sent.items()}
        moved = {n: v[k] - start[n] for n, v in u.buffers.items()}
        told = Figures(1.0, float(u.metrics["examples"][k]), float(u.metrics["train_loss"][k]))
        this.words[place] = to_words(seal(coding, layout.flat(sent, moved), told), 32)
    mean, figures = unseal(coding, from_words(this.run()), 4)
    sent, changes = layout.unflat(mean)
    assert (figures.weight, figures.examples, figures.clamped) == (4, sum(SIZES) - SIZES[2], 0)
    # the simulation, of the four
    total = recipe.aggregator.start()
    total.expect(5, recipe.privacy, 1.0)
    for u, k in (by_id[f"c{i}"] for i in (3, 0, 4, 1)):
        total.add(_one(u, k))
    found, buffers = total.result(start)
    assert all(torch.equal(found["delta"][n], v) for n, v in sent["delta"].items())
    assert {n for n in buffers} == {n for n in changes} and buffers
    assert all(torch.equal(buffers[n], start[n] + v) for n, v in changes.items())


class _Shown(Mean):
    """A mean of rows that observers see."""

    linear = False


def _one(update, k):
    at = slice(k, k + 1)
    return Released.received(
        (update.ids[k],),
        {g: {n: v[at] for n, v in s.items()} for g, s in update.sent.items()},
        {n: v[at] for n, v in update.buffers.items()},
        torch.ones(1),
        {n: v[at] for n, v in update.metrics.items()},
    )


def test_what_is_beyond_the_range_is_clamped_and_counted():
    secure, figures = trained(Secure(width=32, range=0.01))
    assert figures["clamped"] > 50
    (said,) = troubles(figures)
    assert f"{figures['clamped']:,} numbers of updates were beyond aggregator.range" in said
    assert all(float(v.abs().max()) <= 0.01 + 1e-9 for v in secure.last_step.values())
    assert "clamped" not in trained(Secure(width=32, range=4.0))[1]


@pytest.mark.parametrize("aggregator", [Secure(), Secure(width=32, range=4.0)], ids=["64", "32"])
def test_nothing_of_one_client_is_told(aggregator):
    server, figures = trained(aggregator)
    usual = trained(Mean(), FedAvg(weighting="uniform"))[1]
    gone = {k for k in usual if k.startswith("client_loss")} | {"update_norm", "cosine_to_mean"}
    assert usual.keys() - figures.keys() == gone
    for name, values in server.visits.values.items():
        assert len({*values.tolist()}) == 1, name
    assert len({*server.visits.weight.tolist()}) == 1
    seen = watched(server)  # who looks on later is shown nothing
    server.round()
    assert seen == []


@pytest.mark.parametrize("aggregator", [Secure(), Secure(width=32, range=4.0)], ids=["64", "32"])
def test_too_few_reports_open_nothing(aggregator):
    private = dict(privacy=ClientLevel(clip=1.0, **NOISE))
    for given in ({}, private):
        server, figures = trained(aggregator, participation=Everyone(dropout=0.6), **given)
        mark = "nonprivate_" if given else ""
        assert figures[f"{mark}clients"] < 4  # by the seed: of five, four are needed
        assert "opens the sum of 4 or more of 5 clients" in figures[f"{mark}too_few"]
        assert not {"train_loss", "examples", f"{mark}train_loss"} & {*figures}
        assert not server.last_step
    assert figures["privacy_epsilon"] > 10  # the ledger keeps the charge


def test_noise_for_the_sum_is_that_of_the_mean():
    plan = ClientLevel(clip=1.0, **NOISE)
    usual = trained(Mean(), privacy=plan)[0]
    assert apart(trained(Secure(), privacy=plan)[0], usual) < 1e-9
    narrow, figures = trained(Secure(width=32), privacy=plan)  # its range is the clip
    assert apart(narrow, usual) < 1e-6 and "nonprivate_clamped" not in figures
    sample = dict(privacy=SampleLevel(steps=2, sample_rate=0.5, **NOISE), rounds=1)
    narrow, figures = trained(Secure(width=32, range=8.0), **sample)
    assert apart(narrow, trained(Mean(), **sample)[0]) < 1e-6
    assert {"secure_bytes_down", "secure_client_seconds"} <= figures.keys()


class Watcher(Observer):
    def sent(self, released):
        raise AssertionError("nobody is shown anything")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(aggregator=Secure(width=32)), "width 32 needs a range"),
        (
            dict(
                aggregator=Secure(width=32),
                privacy=ClientLevel(clip=1.0, adaptive=AdaptiveClip(), **NOISE),
            ),
            "width 32 needs a range",
        ),
        (dict(aggregator=Secure(width=32, range=1e9)), "need more bits"),
        (dict(aggregator=Secure(threshold=2)), "threshold must be from 3 to 5"),
        (dict(aggregator=Secure(threshold=6)), "leave it out for 4"),
        (dict(aggregator=Secure(neighbours=2, threshold=4)), "threshold must be from 2 to 3"),
        (dict(aggregator=Secure(), participation=Uniform(cohort_size=2)), "needs 3 clients"),
        (dict(aggregator=Secure(), observers=[Watcher()]), "observer Watcher looks at what"),
        (dict(aggregator=Secure(), threat=SignFlip()), "threat and aggregator secure"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_cannot_be_had_is_refused_before_training(given, why):
    parts = {k: given.pop(k) for k in ("aggregator", "privacy") if k in given}
    with pytest.raises(ConfigError, match=why):
        Server(mlp(), make_clients(SIZES), Recipe(**parts), **given)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(width=16), "aggregator.width must be 64 or 32, got 16"),
        (dict(neighbours=3), "aggregator.neighbours must be even, got 3"),
        (dict(neighbours=1), "aggregator.neighbours must be at least 2"),
        (dict(range=0.0), "aggregator.range must be a positive number"),
        (dict(weight_cap=0), "aggregator.weight_cap must be at least 1"),
        (dict(phase_seconds=-1.0), "aggregator.phase_seconds must be a positive number"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_options_that_are_none(options, why):
    with pytest.raises(ConfigError, match=why):
        Secure(**options)


def test_what_masks_do_not_hide_is_said():
    def words():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(18, 4))

    g = torch.Generator().manual_seed(0)
    clients = make_clients(SIZES)
    for c in clients:
        c.data = type(c.data)(torch.randint(0, 7, (len(c), 6), generator=g), c.data.tensors[1])
    server = Server(words(), clients, Recipe(aggregator=Secure()))
    assert any("rows of an embedding that only one client's words touch" in n for n in server.notes)
    server = Server(
        mlp(),
        make_clients(SIZES),
        Recipe(aggregator=Secure()),
        participation=Uniform(cohort_size=4),
    )
    assert any("arXiv:2106.06089" in n for n in server.notes)
    near = Secure(neighbours=4, threshold=3)
    (said,) = (n for n in trained(Secure())[0].notes if "secure" in n)
    for rule, told in ((Secure(), True), (Secure(weight_cap=20), False), (Mean(), False)):
        assert any("clients count alike" in n for n in trained(rule, rounds=0)[0].notes) == told
    assert said.startswith("aggregator secure: a simulation adds the same whole numbers")
    assert any("(semi-honest)" in n for n in trained(near, rounds=0)[0].notes)


@pytest.mark.parametrize("near", [None, 4], ids=["all", "ring"])
def test_bytes_of_the_formula_are_those_of_the_messages(near, monkeypatch):
    import secure_rounds

    monkeypatch.setattr(
        secure_rounds, "sign", lambda place, s: (b"%02d" % place + s)[: costs.SIGNED].ljust(72)
    )
    monkeypatch.setattr(
        secure_rounds, "verify", lambda place, s, found: found == secure_rounds.sign(place, s)
    )
    this = Round(terms(9, neighbours=near, size=50), seed=4)
    down = []
    this.tamper = lambda way, phase, place, m: down.append((way, place, m)) or m
    this.run()
    cost = costs.cost_of(9, 9, near or 8, this.terms.threshold, 50, 32)
    up = [_size(m) for way, place, m in down if way == "up" and place == 0]
    assert sum(up) == cost.up
    assert sum(_size(m) for way, place, m in down if way == "down" and place == 0) == cost.down


def _size(message):
    parts = []
    for value in vars(message).values():
        if isinstance(value, bytes | np.ndarray):
            parts.append(value if isinstance(value, bytes) else value.tobytes())
        elif isinstance(value, tuple):
            parts.append(bytes(4 * len(value)))
        else:
            parts += [v if isinstance(v, bytes) else bytes(_size(v)) for v in value.values()]
    return sum(map(len, parts))


def test_a_sum_that_sites_have_opened_goes_through_as_it_is():
    mean = torch.tensor([[1.0 + 2**-40, -3.0]], dtype=torch.float64)
    opened = Released.received(
        ("a", "b", "c"),
        {"delta": {"w": mean}},
        {},
        torch.full((3,), 0.5),
        {"clamped": torch.full((3,), 2 / 3)},
        summed=True,
    )
    for rule in (Secure(), Secure(width=32, range=1.0)):
        total = rule.start()
        total.expect(3, Nothing(), 0.0)
        total.add(opened)
        assert torch.equal(total.result({})[0]["delta"]["w"], mean[0])
        assert torch.equal(total.sums()["delta"]["w"], 1.5 * mean[0])
        assert total.figures["clamped"] == 2


def test_rounding_stays_within_an_adaptive_clip_of_the_round():
    plan = ClientLevel(clip=1.0, adaptive=AdaptiveClip(), **NOISE)
    steps = Secure(width=32, range=1.0).coding(10_000, plan).scale
    row = torch.full((1, 10**5), (round(steps / 1000) // 2 * 2 - 0.5) / steps, dtype=torch.float64)
    bit = torch.full((1, 1), 0.5, dtype=torch.float64)
    clip = float(row.norm())  # which is not the plan's first
    total = Secure(width=32, range=1.0).start()
    total.expect(10_000, plan, clip)
    sent = {"delta": {"w": row}, CLIP_BIT: {"bit": bit}}
    total.add(Released.received(("a",), sent, {}, torch.ones(1)))
    found = total.sums()
    assert 0.997 * clip < found["delta"]["w"].norm() <= clip
    assert 0 <= 0.5 - float(found[CLIP_BIT]["bit"]) <= 1 / steps


def test_the_terms_of_a_round_follow_from_options_and_roster():
    members, facts = terms(7).members, dict(run="r", round=2, attempt=b"a" * 16, task=b"t" * 32)
    found = Secure(neighbours=4).terms(**facts, members=members, size=9, privacy=Nothing())
    found.check()
    assert (found.threshold, found.width, found.scale) == (4, 64, 2**40)
    plan = ClientLevel(clip=0.5, **NOISE)
    found = Secure(width=32).terms(**facts, members=members, size=9, privacy=plan)
    found.check()
    assert (found.threshold, found.range) == (5, 0.5)


def test_the_bytes_of_a_round_are_reported():
    server, figures = trained(Secure(width=32, range=4.0))
    numbers = sum(p.numel() for p in server.model.parameters()) + 4
    cost = costs.cost_of(5, 5, 4, 4, numbers, 32)
    assert figures["bytes_up"] == 5 * cost.up
    assert figures["secure_bytes_down"] == 5 * cost.down
    plain = trained(Mean())[1]
    assert figures["bytes_down"] == plain["bytes_down"] + 5 * cost.down


@pytest.mark.parametrize("flag", ["--validation 0.2", "--tracking.client-runs 2"])
def test_a_run_shows_no_figures_of_single_clients(flag, tmp_path, fedtorch):
    code, _, err = fedtorch("train", "--aggregator", "secure", "--privacy", "null", *flag.split())
    assert code == 2 and "shows figures of single clients" in err


def test_images_come_out_of_a_sum_under_masks_and_not_out_of_a_noised_one():
    shown = runpy.run_path(str(Path(__file__).parents[1] / "examples/masks_show.py"))
    images, labels = shown["held"]()
    good = []
    for plan in (None, shown["NOISE"]):
        near = shown["divided"](*shown["step"](images, labels, plan), images)[1]
        good.append(int((near > shown["GOOD"]).sum()))
    assert good[0] >= 9 and good[1] == 0
