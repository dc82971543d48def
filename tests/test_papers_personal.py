"""Ditto, FedRep, FedBABU and LG-FedAvg on the two quadratic clients of test_papers."""

import json
from dataclasses import replace
from inspect import isfunction
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, weights
from fedtorch import Client, ConfigError, FedAvg, Local, Recipe, Server, TopK, Uniform
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.run.finetune import finetuned
from fedtorch.strategies import APFL, IFCA, Ditto, FedBABU, FedRep, LGFedAvg, PFedMe
from test_papers import Scalar, Summed, quadratic
from test_papers_optimisation import clients

ENGINES = [{"chunk": 1}, {"chunk": 2}, {"chunk": 2, "solver": "stacked"}]
WHOLE = {"loss": quadratic, "lr": 0.1, "steps": 4, "batch_size": None}


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_ditto_li_2021(engine):
    server = Server(Scalar(), clients(), Recipe(Ditto(lam=1.0), **WHOLE), engine=Local(**engine))
    want = [(0.601925, 0.942800, -0.479200), (0.658198, 1.154259, -0.583925)]
    for shared, *own in want:
        server.round()
        assert float(server.model.w.detach()) == pytest.approx(shared, abs=6e-7)
        found = [float(server.model_of(i).w.detach()) for i in "01"]
        assert found == pytest.approx(own, abs=6e-7)


PFEDME = (
    PFedMe(lam=2.0, inner_steps=3),
    [(0.363943, 1.118353, -0.573425), (0.267990, 1.038384, -0.612118)],
)
FIXED = (
    APFL(weighting="uniform"),
    [(0.188000, 0.768262, -0.147856), (0.048193, 1.036436, -0.570980)],
)
LEARNED = (
    APFL(learn=True, weighting="uniform"),
    [(0.188000, 0.763225, -0.076741), (0.048193, 1.054663, -0.335829)],
)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize(
    "strategy, want", [PFEDME, FIXED, LEARNED], ids=["pfedme", "fixed", "apfl"]
)
def test_whole_models_of_clients_own(engine, strategy, want):
    """Dinh et al. 2020 and Deng et al. 2020; the numbers are those of theta and v."""
    server = Server(Scalar(), clients(), Recipe(strategy, **WHOLE), engine=Local(**engine))
    group, shares = ("theta", {}) if isinstance(strategy, PFedMe) else ("v", {"0": 0.5, "1": 0.5})
    learned = iter([{"0": 0.447877, "1": 0.229082}, {"0": 0.681964, "1": 0.235920}])
    for shared, *own in want:
        server.round()
        w = float(server.model.w.detach())
        assert w == pytest.approx(shared, abs=6e-7)
        memory = server.session.memory()
        found = [float(memory[i][group]["w"]) for i in "01"]
        assert found == pytest.approx(own, abs=6e-7)
        if group == "v" and strategy.learn:
            shares = next(learned)
        for i, v in zip("01", own, strict=True):
            if shares:
                alpha = float(memory[i]["alpha"]["alpha"])
                assert alpha == pytest.approx(shares[i], abs=6e-7)
            used = shares[i] * v + (1 - shares[i]) * w if shares else v
            assert float(server.model_of(i).w.detach()) == pytest.approx(used, abs=1e-6)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_fedrep_collins_2021(engine):
    recipe = Recipe(FedRep(head_steps=2), **WHOLE)
    server = Server(Summed(), clients(), recipe, engine=Local(**engine))
    want = [(0.673747, 0.285000, -0.765000), (0.806692, 0.482838, -1.228461)]
    for body, *heads in want:
        server.round()
        assert float(server.model.body.detach()) == pytest.approx(body, abs=6e-7)
        found = [float(server.own()[i]["head.h"]) for i in "01"]
        assert found == pytest.approx(heads, abs=6e-7)


def test_fedbabu_trains_the_body_alone_and_the_head_stays():
    server = Server(Summed(), clients(), Recipe(FedBABU(), **WHOLE))
    body = Server(Scalar(), clients(), Recipe(FedAvg(), **WHOLE))
    for _ in range(2):
        server.round(), body.round()
    assert float(server.model.body.detach()) == pytest.approx(float(body.model.w.detach()))
    assert float(server.model.head["h"]) == 0 and server.trainable == ["body"]
    with pytest.raises(ConfigError, match=r"fits no weight .* such as 2\.\*"):
        Server(mlp(), make_clients([5]), Recipe(FedBABU()))
    with pytest.raises(ConfigError, match="fits every weight"):
        Server(mlp(), make_clients([5]), Recipe(FedBABU(head=("*",))))


def test_lg_keeps_the_lower_layers():
    recipe = Recipe(LGFedAvg(personal=("0.*",)), epochs=1)
    server = Server(mlp(), make_clients([9, 7]), recipe)
    server.round()
    assert server.own()["c0"].keys() == {"0.weight", "0.bias"}


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


SIZES = [12, 8, 16, 12, 20]


@pytest.mark.parametrize(
    "strategy, model",
    [
        (Ditto(lam=0.3), mlp),
        (Ditto(lam=0.3), normed),
        (FedRep(personal=("3.*",), head_epochs=2), mlp),
        (FedRep(personal=("3.*",), head_epochs=2), normed),
        (APFL(learn=True), mlp),
        (PFedMe(inner_steps=2), mlp),
        (IFCA(clusters=3), mlp),
        (FedBABU(head=("2.*",)), mlp),
    ],
    ids=lambda v: v.__name__ if isfunction(v) else str(v),
)
def test_every_engine_comes_to_the_same(strategy, model):
    if isinstance(strategy, FedRep) and model is mlp:
        strategy = FedRep(personal=("2.*",), head_epochs=2)
    found = []
    engines = [Local(chunk=1, solver="general"), Local(chunk=3, solver="stacked")]
    if model is mlp:
        engines.append(Processes(workers=2, chunk=2))
    if strategy.apart and model is mlp:  # the shared pass alone
        engines.append(Local(solver="fast"))
    for engine in engines:
        recipe = Recipe(strategy, lr=0.05, epochs=2, batch_size=4)
        cohort = Uniform(cohort_size=4)
        server = Server(
            model(), make_clients(SIZES), recipe, participation=cohort, engine=engine, seed=3
        )
        [*server.rounds(3)]
        own = server.own()
        found.append(
            weights(server.model) | {f"{i}/{k}": v for i in own for k, v in own[i].items()}
        )
        server.close()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.allclose(v, found[0][k], atol=2e-6) for k, v in other.items())


def test_ditto_moves_the_shared_model_as_fedavg_and_keeps_statistics_of_its_own():
    ends = {}
    for strategy in (FedAvg(), Ditto()):
        server = Server(normed(), make_clients(SIZES), Recipe(strategy, epochs=1, batch_size=4))
        [*server.rounds(2)]
        ends[type(strategy)] = weights(server.model)
    assert all(torch.equal(v, ends[Ditto][k]) for k, v in ends[FedAvg].items())
    own = server.own()
    assert own.keys() == {f"c{k}" for k in range(5)}
    assert not torch.allclose(own["c0"]["1.running_mean"], own["c1"]["1.running_mean"])


@pytest.mark.parametrize("strategy", [Ditto(), APFL(learn=True), PFedMe(), IFCA()], ids=str)
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(strategy):
    def server() -> Server:
        cohort = Uniform(cohort_size=3)
        recipe = Recipe(strategy, epochs=1, batch_size=4)
        model = normed() if isinstance(strategy, Ditto) else mlp()
        return Server(model, make_clients(SIZES), recipe, participation=cohort, seed=2)

    whole, first, second = server(), server(), server()
    [*whole.rounds(4)]
    [*first.rounds(2)]
    second.load_state_dict(first.state_dict())
    [*second.rounds(2)]
    kept = [v for m in whole.session.memory().values() for g in m.values() for v in g.values()]
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in kept), "nobody else's rows with it"
    one, other = (s.own() | {"": weights(s.model)} for s in (whole, second))
    assert all(torch.equal(v, other[i][k]) for i, m in one.items() for k, v in m.items())


def test_personal_passes_and_privacy():
    noise = dict(noise_multiplier=0.5, rounds=1, insecure_seed=1)
    for strategy, why in [
        (FedRep(personal=("2.*",)), "fedrep sends steps that start from what another pass"),
        (PFedMe(), "pfedme sends what it makes of losses or gradients"),
        (IFCA(), "ifca sends numbers that no noise is made for.* or --privacy none"),
    ]:
        with pytest.raises(ConfigError, match=why):
            Server(mlp(), make_clients([9, 7]), Recipe(strategy, privacy=SampleLevel(**noise)))
    plan = ClientLevel(rate=1.0, **noise)
    for strategy in (Ditto(), APFL(), PFedMe()):
        server = Server(mlp(), make_clients(SIZES), Recipe(strategy, privacy=plan))
        server.round()
        assert len(server.own()) == 5
    with pytest.raises(ConfigError, match="ifca sends numbers that no noise is made for"):
        Server(mlp(), make_clients(SIZES), Recipe(IFCA(), privacy=plan))


def test_what_stays_with_a_client_costs_no_privacy_and_moves_nothing_that_is_shared():
    """Noised steps, batches and epsilon are FedAvg's to the bit; v is trained without noise."""
    plan = SampleLevel(noise_multiplier=0.7, rounds=2, steps=3, insecure_seed=1)
    ends, spent = [], []
    for each in (FedAvg(), Ditto(), APFL()):
        recipe = Recipe(each, privacy=plan, lr=0.1)
        engine = Local(solver="general")
        server = Server(mlp(), make_clients(SIZES), recipe, engine=engine, seed=3)
        spent += [f["privacy_epsilon"] for f in server.rounds(2)]
        ends.append(weights(server.model))
        if own := server.own():
            assert float((own["c4"]["0.weight"] - ends[-1]["0.weight"]).norm()) > 0
    for other in ends[1:]:
        assert all(torch.equal(v, other[k]) for k, v in ends[0].items())
    assert spent[:2] == spent[2:4] == spent[4:] and len(own) == len(SIZES)


@pytest.mark.parametrize("strategy", [Ditto(), APFL()], ids=lambda s: type(s).__name__)
def test_one_row_that_spoils_a_model_of_ones_own_does_not_decide_who_counts(strategy):
    """Nobody clips passes that stay with a client; what is shared is FedAvg's all the same."""
    plan = SampleLevel(
        noise_multiplier=0.7, sample_rate=1.0, batch_size=8, rounds=2, steps=2, insecure_seed=1
    )
    for channel in ((), (TopK(share=0.3),)):
        ends = []
        for each in (FedAvg(), strategy):
            members = make_clients(SIZES)
            members[1].data.tensors[0][2] = torch.nan
            recipe = Recipe(each, privacy=plan, lr=0.1, channel=channel)
            server = Server(mlp(), members, recipe, engine=Local(solver="general"))
            for figures in server.rounds(2):
                assert figures["clients"] == len(SIZES) and not figures["failed"]
            ends.append(weights(server.model))
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-7)
        assert server.own().keys() == {"c0", "c2", "c3", "c4"}, "its own model is the shared one"


def test_whole_models_are_weights_and_steps_plain_sgd():
    for strategy in (APFL(), PFedMe(), IFCA()):
        with pytest.raises(ConfigError, match=r"has running statistics|also has running"):
            Server(normed(), make_clients([9, 7]), Recipe(strategy))
        personal = replace(strategy, personal=("2.*",))
        with pytest.raises(ConfigError, match=r"leave out strategy.personal"):
            Server(mlp(), make_clients([9, 7]), Recipe(personal))
    for options in ({"optimizer": "Adam"}, {"clip_norm": 1.0}, {"lr_decay": "cosine"}):
        with pytest.raises(ConfigError, match="apfl takes steps of its own"):
            Server(mlp(), make_clients([9, 7]), Recipe(APFL(), **options))
    for wrong in ({"clusters": 1}, {"spread": 0.0}):
        with pytest.raises(ConfigError, match=f"strategy.{next(iter(wrong))} must be"):
            IFCA(**wrong)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_ifca_ghosh_2020(engine):
    """From 1 and 0: each client uses its own cluster's model; a third one that nobody picks stays."""
    recipe = Recipe(IFCA(clusters=3), **WHOLE)
    model = Scalar()
    with torch.no_grad():
        model.w.fill_(1.0)
    server = Server(model, clients(), recipe, engine=Local(**engine))
    server.extras["m1"]["w"].zero_(), server.extras["m2"]["w"].fill_(50.0)
    for want in [(1.343900, -0.759900), (1.569533, -0.942352)]:
        figures = server.round()
        assert [figures[f"strategy_m{j}"] for j in range(3)] == [0.75, 0.25, 0]  # 3 and 1 examples
        found = [float(server.model_of(i).w.detach()) for i in "01"]
        assert found == pytest.approx(want, abs=6e-7)
        assert float(model.w.detach()) == found[0] and float(server.extras["m2"]["w"]) == 50
    assert [float(m["pick"]["pick"]) for m in server.session.memory().values()] == [0, 1]


def test_ifca_weighs_the_members_of_a_cluster_alone():
    """Three clients of one minimum and one of another: each model is FedAvg over its own members."""
    torch.manual_seed(0)
    near, far = make_clients([9, 7, 8]), make_clients([6])
    far[0].id = "far"
    flipped = Client("far", (far[0].data.tensors[0], 3 - far[0].data.tensors[1]))
    server = Server(mlp(), [*near, flipped], Recipe(IFCA(spread=0.5), batch_size=4, lr=0.1))
    before = {k: v.clone() for k, v in server.extras["m1"].items()}
    start = weights(server.model)
    assert not torch.equal(before["0.weight"], start["0.weight"]), "the others start elsewhere"
    server.round()
    picks = {i: int(m["pick"]["pick"]) for i, m in server.session.memory().items()}
    for j, first in enumerate([start, before]):
        members = [c for c in (*make_clients([9, 7, 8]), flipped) if picks[c.id] == j]
        now = weights(server.model) if j == 0 else server.extras["m1"]
        if not members:
            assert all(torch.equal(v, first[k]) for k, v in now.items())
            continue
        model = mlp()
        model.load_state_dict(first)
        alone = Server(model, members, Recipe(FedAvg(), batch_size=4, lr=0.1))
        alone.round()
        assert all(torch.allclose(v, now[k], atol=1e-6) for k, v in weights(model).items())


def test_a_client_that_never_trained_uses_the_shared_model():
    server = Server(
        mlp(), make_clients(SIZES), Recipe(Ditto()), participation=Uniform(cohort_size=2), seed=1
    )
    server.round()
    away = next(i for i in server.ids if i not in server.own())
    assert torch.equal(server.model_of(away)[0].weight, server.model[0].weight)


def test_fine_tuning_goes_on_from_the_shared_model_and_leaves_it_and_memory_alone():
    """By hand: client k steps 3 times by 0.1 a_k (w - b_k) from w = 0.601925."""
    server = Server(Scalar(), clients(), Recipe(Ditto(), **WHOLE))
    server.round()
    before, w = server.own(), float(server.model.w.detach())
    found = finetuned(server, clients(), 3)
    for k, (a, b) in enumerate([(1, 2), (3, -1)]):
        v = w
        for _ in range(3):
            v -= 0.1 * a * (v - b)
        assert float(found[str(k)]["w"]) == pytest.approx(v, abs=1e-12)
    assert float(server.model.w.detach()) == w and server.own() == before
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, insecure_seed=1)
    server = Server(mlp(), make_clients([9, 7]), Recipe(privacy=plan))
    assert finetuned(server, make_clients([9, 7]), 2).keys() == {"c0", "c1"}


def test_fine_tuning_trains_the_head_that_fedbabu_froze():
    server = Server(Summed(), clients(), Recipe(FedBABU(), **WHOLE))
    server.round()
    found = finetuned(server, clients(), 1)["0"]
    assert float(found["head.h"]) != 0 and not server.model.head["h"].requires_grad


def test_a_run_judges_own_shared_and_fine_tuned_models_side_by_side(fedtorch):
    small = [
        "train",
        "--privacy",
        "none",
        "--tracking",
        "none",
        "--model",
        "logistic",
        "--rounds",
        2,
    ]
    given = ["--strategy", "ditto", "--evaluate", "personal", "--finetune-steps", 5]
    code, out, _ = fedtorch(*small, *given, "--run-dir", "run")
    assert "validation = 0.2" in Path("run/config.toml").read_text()
    assert code == 0 and "shared" in out and "finetuned" in out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    kinds = ("validation", "shared", "finetuned")
    assert all(0 < last[f"{kind}_accuracy_min"] <= last[f"{kind}_accuracy"] for kind in kinds)
    assert last["finetuned_by_client"].keys() == last["validation_by_client"].keys()
    assert not any("finetuned" in name for line in lines[:-1] for name in line)
    code, _, err = fedtorch(*small, "--finetune-steps", 5)
    assert code == 2 and "add --evaluate personal, or --validation 0.2" in err
