import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedtorch import ConfigError
from fedtorch.data import (
    Data,
    Dirichlet,
    Iid,
    Natural,
    QuantitySkew,
    Shards,
    from_tensors,
    partition,
)
from fedtorch.data.partition import _fill_empty


def data(n: int, classes: int = 5, owners: int = 0, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, generator=g), torch.randint(0, classes, (n,), generator=g)
    keys = [f"owner {i % owners}" for i in range(n)] if owners else None
    return from_tensors("made", (x, y), (x[:1], y[:1]), "classification", classes, keys)


HOW = [
    Iid(),
    Dirichlet(),
    Dirichlet(alpha=0.05),
    Dirichlet(alpha=100),
    Shards(),
    QuantitySkew(),
    Natural(),
]


@pytest.mark.parametrize("how", HOW, ids=str)
@given(n=st.integers(20, 200), clients=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_every_example_goes_to_exactly_one_client_and_no_client_is_empty(how, n, clients, seed):
    ids, parts = partition(data(n, owners=10), how, clients, seed)
    assert len(ids) == len(set(ids)) == len(parts) == clients
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert all(len(p) for p in parts)


@given(n=st.integers(1, 12), clients=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_as_many_clients_as_examples_still_get_one_each(n, clients, seed):
    assume(clients <= n)
    for how in (Iid(), Dirichlet(alpha=0.01), QuantitySkew(alpha=0.01)):
        _, parts = partition(data(n), how, clients, seed)
        assert sorted(torch.cat(parts).tolist()) == list(range(n))
        assert all(len(p) for p in parts)


@given(clients=st.integers(1, 30), more=st.integers(0, 80), seed=st.integers(0, 2**32))
def test_empty_clients_are_filled_from_the_largest_one_example_at_a_time(clients, more, seed):
    rng = np.random.default_rng(seed)
    owner = rng.choice(clients, clients + more, p=rng.dirichlet(np.full(clients, 0.2)))
    slow = owner.copy()
    for k in range(clients):  # as the rule reads, a search for each
        if not (slow == k).any():
            slow[np.flatnonzero(slow == np.bincount(slow).argmax())[0]] = k
    assert np.array_equal(_fill_empty(owner, clients), slow)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_seed_decides(how):
    a, b, c = (partition(data(300, owners=10), how, 6, s)[1] for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    if not isinstance(how, Natural):
        assert any(len(p) != len(q) or not torch.equal(p, q) for p, q in zip(a, c, strict=True))


def skew(how: Dirichlet | Iid) -> float:
    d = data(2000)
    _, parts = partition(d, how, 10, 0)
    top = [np.bincount(d.labels[p].numpy(), minlength=5).max() / len(p) for p in parts]
    return float(np.mean(top))


def test_a_smaller_alpha_is_more_skewed():
    assert (
        skew(Dirichlet(alpha=0.05)) > skew(Dirichlet(alpha=0.5)) > skew(Dirichlet(alpha=100)) + 0.05
    )
    assert abs(skew(Dirichlet(alpha=1000)) - skew(Iid())) < 0.1


def test_iid_sizes_differ_by_one_and_shards_hold_about_two_classes():
    _, parts = partition(data(103), Iid(), 10, 0)
    assert sorted({len(p) for p in parts}) == [10, 11]
    d = data(1000, classes=10)
    _, parts = partition(d, Shards(per_client=2), 20, 0)
    classes = [len(d.labels[p].unique()) for p in parts]
    # a shard can straddle the border between two classes
    assert max(classes) <= 4
    assert np.mean(classes) < 3


def test_quantity_skew_is_about_sizes_not_labels():
    d = data(5000)
    _, parts = partition(d, QuantitySkew(alpha=0.5), 5, 0)
    sizes = [len(p) for p in parts]
    assert max(sizes) > 3 * min(sizes)
    big = d.labels[parts[int(np.argmax(sizes))]]
    assert torch.allclose(big.bincount() / len(big), torch.full((5,), 0.2), atol=0.05)


def test_natural_keeps_owners_whole_and_names_clients_after_them():
    ids, parts = partition(data(40, owners=4), None, None, 0)
    assert ids == [f"owner {i}" for i in range(4)]
    assert parts[2].tolist() == list(range(2, 40, 4))
    _, fewer = partition(data(40, owners=4), Natural(), 2, 0)
    for k in range(4):
        homes = {c for c, p in enumerate(fewer) if set(p.tolist()) & set(range(k, 40, 4))}
        assert len(homes) == 1


def test_owners_of_one_size_are_dealt_round_in_the_order_of_their_names():
    # the odd ones have two examples
    owners = [f"{k:02d}" for k in range(60) for _ in range(1 + k % 2)]
    dealt = Natural().assign(np.zeros(90), owners, 10, np.random.default_rng(0))
    assert dealt.tolist() == [k % 10 for k in range(30) for _ in range(3)]


def test_ten_clients_and_the_papers_skew_where_none_are_asked_for():
    assert Dirichlet() == Dirichlet(alpha=0.5) and QuantitySkew() == QuantitySkew(alpha=0.5)
    assert Shards() == Shards(per_client=2)
    assert [len(partition(data(50), how, None, 0)[0]) for how in (Iid(), Dirichlet())] == [10, 10]


def regression() -> Data:
    x = torch.randn(30, 2)
    return from_tensors("numbers", (x, x[:, 0]), (x, x[:, 0]), "regression", 1)


def test_without_labels_or_owners_the_default_is_iid():
    assert sorted(len(p) for p in partition(regression(), None, 4, 0)[1]) == [7, 7, 8, 8]


@pytest.mark.parametrize(
    "make, how, clients, message",
    [
        (lambda: data(20), Iid(), 21, "21 clients are more than the 20 training examples"),
        (lambda: data(20), Iid(), 0, "clients must be at least 1"),
        (lambda: data(20), Shards(per_client=3), 10, "10 clients x 3 shards are more than the 20"),
        (lambda: data(20), Natural(), 2, "names none: use iid"),
        (lambda: data(20, owners=2), Natural(), 3, "3 clients asked for, but the data has 2"),
        (regression, Dirichlet(), 2, "needs class labels"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(make, how, clients, message):
    with pytest.raises(ConfigError, match=message):
        partition(make(), how, clients, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dirichlet(alpha=0),
        lambda: Dirichlet(alpha=float("nan")),
        lambda: Dirichlet(alpha=float("inf")),
        lambda: QuantitySkew(alpha=-1),
        lambda: Shards(per_client=0),
    ],
)
def test_options_that_cannot_be_meant_are_refused(make):
    with pytest.raises(ConfigError, match=r"partition\."):
        make()
