"""Rules on whole updates, on seven rows of which the last lies; answers worked out from the papers."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from conftest import make_clients, mlp, weights
from fedtorch import (
    Client,
    ConfigError,
    FedAvg,
    Local,
    Median,
    Recipe,
    Robust,
    Server,
    Uniform,
)
from fedtorch.aggregation.mixing import NNM, Bucketing, buckets
from fedtorch.aggregation.robust import TrimmedMean, near_median
from fedtorch.aggregation.table import TRIED, Table, distances
from fedtorch.aggregation.vectors import (
    Bulyan,
    CentredClip,
    FLTrust,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormBound,
    scores,
)
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.rounds.progress import troubles
from fedtorch.types import Released
from test_aggregation_robust import ends

ROWS = [(1, 2), (1.2, 1.8), (0.9, 2.1), (1.1, 2.2), (0.8, 1.9), (1.05, 2.05), (-10, 10)]
TRUSTED = (1, 1.5)


def table(rows: object = ROWS, **given: object) -> Table:
    stack = torch.tensor(rows, dtype=torch.float64)
    return Table({"w": [stack]}, torch.arange(len(stack)), **given)


def of(rule: Robust, **given: object) -> list[float]:
    return rule.merge(table(**given))[0]["w"].tolist()


KNOWN = {
    "median": (Median(), [1.0, 2.05]),
    "trimmed": (TrimmedMean(), [0.97, 2.05]),
    "krum": (Krum(), [1.0, 2.0]),
    "multi": (MultiKrum(m=4), [1.0125, 2.0875]),
    "bulyan": (Bulyan(), [1.05, 2.05]),  # chosen all at once by one scoring it were 0.983333
    "rfa 3": (GeometricMedian(steps=3), [0.952068, 2.058565]),
    "rfa": (GeometricMedian(), [0.991016, 2.033467]),
    "bound": (NormBound(bound=2.5), [0.611748, 1.973967]),
    "clip": (CentredClip(tau=1.0), [0.282839, 0.865548]),
    "clip twice": (CentredClip(tau=1.0, steps=2), [0.632467, 1.680420]),
    "nnm": (TrimmedMean(f=1, pre=NNM()), [1.008333, 2.008333]),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_each_rule_on_seven_clients_of_whom_one_lies(name, chunk):
    rule, want = KNOWN[name]
    # the ids of `ends` count down, and rules see their rows in the order of ids
    assert ends(ROWS[::-1], rule, chunk=chunk) == pytest.approx(want, abs=6e-7)


def test_scores_of_krum_and_who_is_chosen():
    found = scores(table().points[:-1], 1)
    want = [0.125, 0.505, 0.145, 0.295, 0.355, 0.14, 732.52]
    assert found.tolist() == pytest.approx(want, abs=1e-9)
    chosen = MultiKrum(m=4).merge(table())[1]
    assert chosen.nonzero().flatten().tolist() == [0, 2, 3, 5]
    assert Bulyan().merge(table())[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 5]
    assert MultiKrum(f=2).merge(table())[1].count_nonzero() == 5, "n - f of them"


def test_clipping_goes_on_from_where_the_round_before_ended():
    kept = {"w": torch.tensor([0.282839, 0.865548], dtype=torch.float64)}
    assert of(CentredClip(tau=1.0), reference=kept) == pytest.approx([0.632467, 1.680420], abs=1e-6)


def test_trust_by_the_angle_to_the_servers_own_update():
    """The trusted client comes first whatever its id, and counts no further."""
    for ids in ("server", "zz"):
        clients = [("server", TRUSTED), *((f"t{k}", r) for k, r in enumerate(ROWS))]
        rows = FLTrust(trusted=ids).start()
        for name, row in clients:
            rows.add(sent(name.replace("server", ids), row))
        found, _ = rows.result({})
        assert found["delta"]["w"].tolist() == pytest.approx([0.741394, 1.597052], abs=1e-6)
        assert "left_out" not in rows.figures
    rows.add(sent("against", (-1.0, -1.5)))
    assert rows.result({})[0] and rows.figures["left_out"] == ["against"]


def sent(id: str, row: object) -> Released:
    delta = {"w": torch.tensor([row], dtype=torch.float64)}
    return Released.received((id,), {"delta": delta}, {}, torch.ones(1))


def test_rows_are_mixed_before_a_rule():
    near = table().mixed(NNM().matrix(table(), 1, 0))
    assert near.whole()["w"][6].tolist() == pytest.approx([-0.858333, 3.375], abs=1e-6)
    apart = distances(table(near.whole()["w"].tolist()).points)
    assert torch.allclose(distances(near.points), apart, atol=1e-12)
    twins = table([(0.0, 0.0)] * 3 + [(9.0, 9.0)])
    assert NNM().matrix(twins, 1, 0).diagonal()[:3].tolist() == [1 / 3] * 3, "itself among them"
    pairs = table().mixed(buckets(torch.arange(7), 2))
    assert Median().merge(pairs)[0]["w"].tolist() == pytest.approx([0.9625, 2.0625], abs=1e-12)
    drawn = [Bucketing().matrix(table(), 1, seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].sum(1).tolist() == [1.0] * 4 and drawn[0].count_nonzero() == 7


@pytest.mark.parametrize("first", [False, True])
def test_distances_do_not_cancel_among_long_updates_with_or_without_a_liar(first):
    g = torch.Generator().manual_seed(0)
    rows = 1 + 1e-3 * torch.randn(12, 3000, dtype=torch.float64, generator=g)
    want = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    liar = torch.full((1, 3000), 1e12, dtype=torch.float64)
    both = torch.cat([liar, rows] if first else [rows, liar])
    found = distances(Table({"w": [both]}, torch.arange(13)).points)
    honest = slice(1, 13) if first else slice(0, 12)
    assert torch.allclose(found[honest, honest], want, rtol=1e-8, atol=1e-9)
    assert Krum(f=2).merge(Table({"w": [both]}, torch.arange(13)))[1][12 * (not first)] == 0
    short = Table({"w": [torch.cat([rows.float(), liar.float()])]}, torch.arange(13))
    assert float(distances(short.points)[:12, :12].sub(want).abs().max()) < 1e-5
    small = distances(Table({"w": [both * 1e-12]}, torch.arange(13)).points)
    assert torch.allclose(small[honest, honest] * 1e12, want, rtol=1e-6, atol=1e-8)  # in any unit


@pytest.mark.parametrize("size", [1e9, 1e200], ids=str)
@pytest.mark.parametrize("name", [n for n in KNOWN if n not in ("rfa 3", "bound", "clip twice")])
def test_no_liar_moves_a_rule_as_far_as_it_likes(name, size):
    rule, _ = KNOWN[name]
    rows = [*ROWS[:6], (-size, size)]
    assert all(abs(v) < 3 for v in ends(rows, rule))


@pytest.mark.parametrize(
    "rule, clients, why",
    [
        (TrimmedMean(f=2), 4, r"aggregator trimmed-mean with f 2 needs 2f \+ 1 = 5"),
        (Krum(f=1), 4, r"krum with f 1 needs 2f \+ 3 = 5"),
        (
            MultiKrum(f=1, m=5),
            5,
            r"needs max\(2f \+ 3, m \+ f\) = 6 .* lower aggregator.f or aggregator.m",
        ),
        (Bulyan(f=1), 6, r"bulyan with f 1 needs 4f \+ 3 = 7"),
        (Median(f=3), 6, r"median with f 3 needs 2f \+ 1 = 7"),
        (TrimmedMean(f=1, pre=Bucketing()), 4, "after bucketing, of 5 clients or more"),
        (Median(pre=Bucketing(size=5)), 5, "makes one bucket, the mean of all"),
        (FLTrust(), 5, "none of that name: give aggregator.trusted one of c0, c1, c2, c3, c4$"),
    ],
    ids=str,
)
def test_too_many_liars_for_so_few_clients_are_refused_by_name(rule, clients, why):
    with pytest.raises(ConfigError, match=why):
        Server(mlp(), make_clients([5] * clients), Recipe(aggregator=rule))
    if not isinstance(rule, FLTrust):
        Server(mlp(), make_clients([5] * (clients + 1)), Recipe(aggregator=rule))
        with pytest.raises(ConfigError, match=f"a round has {clients}"):
            few = Uniform(cohort_size=clients)
            Server(mlp(), make_clients([5] * 9), Recipe(aggregator=rule), participation=few)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Krum(f=0.29), r"aggregator.f must be a whole number, got 0.29"),
        (lambda: Krum(f=-1), "aggregator.f must be a number >= 0"),
        (lambda: MultiKrum(m=0), "aggregator.m must be at least 1"),
        (lambda: Median(pre=NNM()), "nnm needs aggregator.f"),
        (lambda: TrimmedMean(pre=Bucketing(size=1)), "aggregator.pre.size must be at least 2"),
        (lambda: CentredClip(tau=0.0), "aggregator.tau must be a positive"),
        (lambda: FLTrust(pre=Bucketing()), "leave aggregator.pre out"),
    ],
)
def test_options_that_cannot_be_meant_are_named(make, why):
    with pytest.raises(ConfigError, match=why):
        make()


def test_a_round_with_too_few_reports_leaves_the_model_and_says_so():
    server = Server(
        mlp(),
        make_clients([6] * 6),
        Recipe(aggregator=Krum(f=1)),
        participation=Uniform(cohort_size=6, dropout=0.6),
        seed=1,
    )
    before, few = weights(server.model), 0
    with pytest.warns(UserWarning, match="no client counted"):
        for figures in server.rounds(4):
            now = weights(server.model)
            stays = all(torch.equal(v, before[k]) for k, v in now.items())
            assert stays == ("too_few" in figures) == (figures["clients"] < 5)
            if stays:
                few += 1
                assert any("needs 2f + 3 = 5" in line for line in troubles(figures))
            before = now
    assert few > 0


def liars(sizes: list[int]) -> list[Client]:
    """The last has labels and inputs that lead far away."""
    *honest, last = make_clients(sizes)
    x, y = last.data.tensors
    return [*honest, Client(last.id, (x * -300, y))]


@pytest.mark.parametrize("rule", [MultiKrum(m=3), Krum(pre=NNM()), Bulyan()], ids=str)
def test_updates_left_out_and_updates_far_off_are_named_each_round(rule):
    server = Server(mlp(), liars([20] * 7), Recipe(epochs=1, aggregator=rule), seed=3)
    figures = server.round()
    assert ("c6" in figures["left_out"]) and "c6" in figures["far"]
    said = troubles(figures)
    assert any("left out" in line and "c6" in line for line in said)
    assert any("far from all others" in line and "c6" in line for line in said)


@pytest.mark.parametrize("chunk", [1, 7])
def test_an_update_far_longer_than_all_others_is_named_under_the_plain_mean_too(chunk):
    recipe, engine = Recipe(epochs=1), Local(chunk=chunk)
    server = Server(nn.Linear(6, 4), liars([20] * 7), recipe, engine=engine)
    figures = server.round()
    assert figures["far"] == ["c6"] and "left_out" not in figures
    server = Server(nn.Linear(6, 4), make_clients([20] * 7), recipe, engine=engine)
    assert not any("far" in figures for figures in server.rounds(3))


@pytest.mark.parametrize(
    "rule",
    [Krum(), GeometricMedian(), CentredClip(tau=0.5), TrimmedMean(f=1, pre=Bucketing()), Bulyan()],
    ids=str,
)
def test_every_solver_comes_to_the_same(rule):
    found = []
    for engine in (
        Local(chunk=1, solver="general"),
        Local(chunk=3, solver="stacked"),
        Local(solver="fast"),
    ):
        server = Server(
            mlp(),
            make_clients([9, 5, 12, 7, 8, 6, 11, 10]),
            Recipe(FedAvg(), lr=0.1, epochs=1, batch_size=8, aggregator=rule),
            engine=engine,
            seed=2,
        )
        [*server.rounds(2)]
        found.append(weights(server.model))
    for other in found[1:]:
        assert all(torch.allclose(v, found[0][k], atol=1e-6) for k, v in other.items())


def test_a_run_with_held_state_goes_on_from_its_checkpoint_to_the_bit():
    recipe = Recipe(epochs=1, aggregator=CentredClip(tau=0.02, pre=Bucketing()))

    def server() -> Server:
        return Server(mlp(), make_clients([9, 5, 12, 7]), recipe, seed=2)

    whole, first, second = server(), server(), server()
    [*whole.rounds(4)]
    [*first.rounds(2)]
    state = first.state_dict()
    assert state["aggregator"]["delta"]["0.weight"].dtype == torch.float64
    second.load_state_dict(state)
    [*second.rounds(2)]
    own = weights(second.model)
    assert all(torch.equal(v, own[k]) for k, v in weights(whole.model).items())
    second.load_state_dict(state | {"aggregator": {}})
    [*second.rounds(2)]
    assert not torch.equal(second.model[0].weight, whole.model[0].weight)


def test_noised_rows_are_taken_and_noise_for_a_sum_is_not():
    plan = SampleLevel(noise_multiplier=0.5, rounds=1, insecure_seed=3)
    server = Server(mlp(), make_clients([20] * 5), Recipe(privacy=plan, aggregator=Krum()))
    assert len(server.round()["left_out"]) == 4
    plan = ClientLevel(noise_multiplier=0.5, rounds=1, insecure_seed=3)
    with pytest.raises(ConfigError, match="krum voids the claim of client-level privacy"):
        Server(mlp(), make_clients([20] * 5), Recipe(privacy=plan, aggregator=Krum()))


@dataclass(frozen=True, kw_only=True)
class Middle(Robust):
    """A rule of somebody's own, given mixed rows."""

    def combine(self, sent: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {g: {n: v.mean(0) for n, v in s.items()} for g, s in sent.items()}


def test_a_rule_of_your_own_is_given_mixed_rows_too():
    assert ends(ROWS, Middle(f=1, pre=NNM())) == pytest.approx(
        torch.tensor(table().mixed(NNM().matrix(table(), 1, 0)).whole()["w"].tolist())
        .mean(0)
        .tolist()
    )


def test_rules_and_mixtures_have_short_names(fedtorch):
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
    given = ["--aggregator", "trimmed-mean", "--aggregator.f", 2, "--aggregator.pre", "nnm"]
    code, out, _ = fedtorch(*small, *given, "--run-dir", "run")
    assert code == 0 and "aggregator trimmed-mean (f 2, pre nnm)" in out
    code, out, _ = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 2)
    assert code == 0
    code, out, _ = fedtorch(*small, "--aggregator", "krum", "--aggregator.f", 2)
    assert code == 0 and "the aggregator took " in out and " alone\n" in out
    code, _, err = fedtorch(*small, "--aggregator", "krum", "--aggregator.f", 4)
    assert code == 2 and "needs 2f + 3 = 11" in err and err.count("\n") == 1
    code, _, err = fedtorch(*small, "--aggregator", "krum", "--aggregator.f", 0.5)
    assert code == 2 and "aggregator.f" in err


def test_a_liar_who_comes_first_costs_no_second_pass(monkeypatch):
    """A look at some columns shows that the first row is far from all others; distances stay exact."""
    rows = torch.randn(7, 3000, generator=torch.Generator().manual_seed(2)).double()
    rows[0] = 1e9
    passes = []
    whole = Table._products
    monkeypatch.setattr(
        Table, "_products", lambda t, o, first=None: passes.append((o, first)) or whole(t, o, first)
    )
    points = Table({"w": [rows]}, torch.arange(7)).points[:-1]
    assert [first for _, first in passes] == [TRIED, None] and passes[1][0] != 0
    assert torch.allclose(distances(points), torch.cdist(rows, rows), rtol=1e-9)


@pytest.mark.parametrize("fewer", [0, 2, 6])
def test_near_the_median_are_the_nearest_one_by_one(fewer):
    """Whoever is farthest is left out first; of two as far, the higher."""
    rows = torch.randint(-6, 7, (9, 200), generator=torch.Generator().manual_seed(1)).double() / 2
    found = near_median(rows, fewer)
    for column, mean in zip(rows.T, found, strict=True):
        left, middle = sorted(column.tolist()), float(column.median())
        for _ in range(fewer):
            left.pop(0 if middle - left[0] > left[-1] - middle else -1)
        assert float(mean) == pytest.approx(sum(left) / len(left))


def test_the_trusted_client_alone_is_no_round():
    rule = FLTrust(trusted="a")
    assert rule.missing(["a", "b"]) is None and "a round has 1" in str(rule.missing(["a"]))
    assert "needs client 'a', who did not report" in str(rule.missing(["b", "c"]))
