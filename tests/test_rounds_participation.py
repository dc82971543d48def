import pytest
import torch

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, Everyone, FedAvg, Poisson, Recipe, Server, Uniform


@pytest.mark.parametrize("population", [1, 5])
def test_a_cohort_may_be_one_client_and_may_be_all(population):
    Uniform(cohort_size=1).check(population)
    Uniform(cohort_size=population).check(population)
    assert {len(Uniform(cohort_size=1).cohort(population, 0, r)[0]) for r in range(9)} == {1}
    with pytest.raises(ConfigError, match=f"between 1 and the {population} clients"):
        Uniform(cohort_size=population + 1).check(population)


def test_everyone_is_everyone():
    assert Everyone().cohort(5, 0, 0) == ([0, 1, 2, 3, 4], [])


def test_uniform_has_a_fixed_size_and_reaches_all_alike():
    counts = torch.zeros(20)
    for r in range(2000):
        chosen, _ = Uniform(cohort_size=5).cohort(20, 0, r)
        assert len(set(chosen)) == 5
        counts[chosen] += 1
    # 2000 draws of a quarter: a standard deviation is 19
    assert (counts - 500).abs().max() < 5 * 19.4


def test_poisson_takes_each_client_with_its_rate():
    sizes = [len(Poisson(rate=0.3).cohort(50, 1, r)[0]) for r in range(1000)]
    assert abs(sum(sizes) / 1000 - 15) < 5 * (50 * 0.3 * 0.7 / 1000) ** 0.5
    assert len(set(sizes)) > 5


def test_cohorts_depend_on_seed_and_round_alone():
    p = Uniform(cohort_size=4)
    assert p.cohort(30, 7, 3) == p.cohort(30, 7, 3)
    assert p.cohort(30, 7, 3) != p.cohort(30, 7, 4)
    assert p.cohort(30, 7, 3) != p.cohort(30, 8, 3)


def test_dropped_clients_are_chosen_but_do_not_report():
    both = [Everyone(dropout=0.4).cohort(10, 0, r) for r in range(200)]
    assert all(sorted(a + b) == list(range(10)) for a, b in both)
    share = sum(len(b) for _, b in both) / 2000
    assert abs(share - 0.4) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Everyone(dropout=1.0),
        lambda: Everyone(dropout=float("nan")),
        lambda: Poisson(rate=0.0),
        lambda: Poisson(rate=1.5),
        lambda: Uniform(cohort_size=0).check(3),
        lambda: Uniform(cohort_size=4).check(3),
    ],
)
def test_what_no_population_can_meet_is_refused(wrong):
    with pytest.raises(ConfigError, match="participation"):
        wrong()


def test_a_round_nobody_joins_leaves_the_model_as_it_was():
    model = mlp()
    server = Server(model, make_clients([5, 6]), Recipe(FedAvg()), participation=Poisson(rate=1e-9))
    before = weights(model)
    figures = server.round()
    assert figures["clients"] == 0
    assert server.round_number == 1
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())


@pytest.mark.parametrize("kind", [Everyone(dropout=0.5), Poisson(rate=0.5, dropout=0.3)])
def test_one_client_more_changes_no_others_coins(kind):
    ids = [f"c{k}" for k in range(20)]
    for r in range(5):
        for gone in (0, 7, 19):
            fewer = [i for i in ids if i != ids[gone]]
            many, few = (
                [[who[i] for i in part] for part in kind.cohort(len(who), 3, r, None, who)]
                for who in (ids, fewer)
            )
            assert [[i for i in part if i != ids[gone]] for part in many] == few


def test_drop_out_coins_do_not_depend_on_who_drew_the_cohort():
    kind = Everyone(dropout=0.5)
    for r in range(5):
        all_, fewer = kind.cohort(20, 3, r, [*range(20)]), kind.cohort(20, 3, r, [*range(1, 20)])
        assert [[i for i in part if i] for part in all_] == [*fewer]
