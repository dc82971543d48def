"""A collate, a sampler and a DataLoader of a client's own: trained as a loop by hand would, or refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from conftest import mlp, weights
from fedtorch import Client, ConfigError, Local, Recipe, Server, evaluate
from fedtorch.checks.data import check
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.types import ClientError

SIZES = [11, 7, 16]


class Texts(Dataset):
    """Ragged: sentences of 2 to 9 words."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 10, (n,), generator=g).tolist()
        self.words = [torch.randint(1, 20, (k,), generator=g) for k in lengths]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int):
        return self.words[i], int(self.words[i].float().mean() > 10)


def padded(items):
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor(
        [y for _, y in items]
    )


class Reader(nn.Module):
    """The mean of the words that are there, or of all places."""

    def __init__(self, masked: bool = True) -> None:
        super().__init__()
        self.words, self.out, self.masked = nn.Embedding(20, 8), nn.Linear(8, 2), masked

    def forward(self, x):
        there = (x > 0)[..., None] if self.masked else torch.ones_like(x)[..., None]
        return self.out((self.words(x) * there).sum(1) / there.sum(1).clamp(min=1))


def reader(masked: bool = True) -> Reader:
    torch.manual_seed(3)
    return Reader(masked)


def easy_first(seed: int, round: int):
    """A curriculum: the first few examples, one more every round, in an order from the seed."""
    return torch.randperm(3 + round, generator=torch.Generator().manual_seed(seed))


def in_order(seed: int, round: int) -> list[int]:
    return [0, 2, 1, 1, 5, 4][: 4 + round]


def clients(sampler=None, **more) -> list[Client]:
    return [
        Client(f"c{k}", Texts(n, k), collate=padded, sampler=sampler, **more)
        for k, n in enumerate(SIZES)
    ]


def by_hand(model: nn.Module, rounds: int, batch_size: int, epochs: int, lr: float) -> nn.Module:
    """What a PyTorch user writes: a DataLoader for each client, and the mean by examples."""
    for round in range(rounds):
        total = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in model.state_dict().items()}
        for k, n in enumerate(SIZES):
            own = copy.deepcopy(model)
            optimizer = torch.optim.SGD(own.parameters(), lr)
            for _ in range(epochs):
                for x, y in DataLoader(
                    Texts(n, k), batch_size, sampler=in_order(0, round), collate_fn=padded
                ):
                    optimizer.zero_grad()
                    F.cross_entropy(own(x), y).backward()
                    optimizer.step()
            for name, v in own.state_dict().items():
                total[name] += v.double() * n / sum(SIZES)
        model.load_state_dict(total)
    return model


ENGINES = {
    "one after another": Local(),
    "one at a time": Local(solver="general", chunk=1),
    "processes": Processes(workers=1),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_collate_and_sampler_train_as_a_loop_over_loaders_does(engine):
    recipe = Recipe(lr=0.3, batch_size=4, epochs=2)
    server = Server(reader(), clients(in_order), recipe, engine=engine)
    figures = [*server.rounds(2)]
    server.close()
    wanted = by_hand(reader(), 2, 4, 2, 0.3).state_dict()
    assert all(torch.allclose(v, wanted[k], atol=1e-6) for k, v in weights(server.model).items())
    assert not torch.allclose(wanted["out.weight"], reader().out.weight, atol=1e-3)
    assert figures[0]["clients"] == 3
    if not engine.chunk:
        assert "clients train one after another: data has a collate or num_workers" in str(
            server.notes
        )


def test_a_run_with_a_sampler_goes_on_bit_for_bit():
    recipe = Recipe(lr=0.3, batch_size=2, steps=3)

    def server() -> Server:
        return Server(reader(), clients(easy_first), recipe, seed=5)

    whole, first, second = server(), server(), server()
    assert len([*whole.rounds(4)]) == len([*first.rounds(2)]) + 2
    second.load_state_dict(first.state_dict())
    assert len([*second.rounds(2)]) == 2
    a, b = weights(whole.model), weights(second.model)
    assert all(torch.equal(a[k], b[k]) for k in a)


ORDERS = {
    "no examples": (lambda seed, round: [], "its sampler gives no examples"),
    "out of range": (lambda seed, round: [0, 3], "gives place 3, but it has places 0 to 2"),
    "below zero": (lambda seed, round: np.array([-1]), "gives place -1, but it has places 0 to 2"),
    "floats": (lambda seed, round: [0.0, 1.0], "a list of whole numbers .*not float32"),
    "a mask": (lambda seed, round: torch.ones(3).bool(), "a list of whole numbers .*not bool"),
    "batches": (lambda seed, round: [[0, 1], [1, 2]], "a list of whole numbers .*of 2 axes"),
    "other arguments": (lambda round: [0], "its sampler fails: TypeError"),
    "an error": (lambda seed, round: 1 / 0, "its sampler fails: ZeroDivisionError"),
    "no function": ([0, 1], r"must be fn\(seed, round\) -> places .*got list"),
    "its own generator": (
        WeightedRandomSampler([1.0] * 3, 9, generator=torch.Generator()),
        "other places when asked again .*leave out its own generator",
    ),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_sampler_that_gives_no_places_is_refused_before_training(kind):
    sampler, message = ORDERS[kind]
    with pytest.raises(ConfigError, match=rf"client '?clinic'?: .*{message}"):
        Server(
            nn.Linear(2, 2),
            [Client("clinic", (torch.randn(3, 2), torch.arange(3) % 2), sampler=sampler)],
        )


def test_a_sampler_that_fails_later_is_an_error_that_names_client_and_round():
    def later(seed: int, round: int) -> list[int]:
        return [0, 1] if round < 2 else [7]

    data = torch.randn(3, 2), torch.arange(3) % 2
    server = Server(nn.Linear(2, 2), [Client("clinic", data, sampler=later)])
    assert len([*server.rounds(2)]) == 2
    with pytest.raises(ClientError, match=r"client clinic, round 2: .*gives place 7"):
        server.round()


@pytest.mark.parametrize("kind", [WeightedRandomSampler, RandomSampler, SubsetRandomSampler])
def test_samplers_of_torch_draw_from_the_run_s_seed(kind):
    x = torch.arange(6.0)[:, None]
    made = {
        WeightedRandomSampler: WeightedRandomSampler([0, 0, 1.0, 0, 1.0, 0], 8),
        RandomSampler: RandomSampler(x, replacement=True, num_samples=8),
        SubsetRandomSampler: SubsetRandomSampler([2, 4]),
    }[kind]
    seen: list[list[float]] = []

    def collate(items):
        seen.append([float(y) for _, y in items])
        return default_collate(items)

    def run(seed: int) -> list[list[float]]:
        server = Server(
            nn.Linear(1, 1),
            [Client("a", DataLoader(TensorDataset(x, x), 4, sampler=made, collate_fn=collate))],
            Recipe(loss=F.mse_loss, batch_size=4, epochs=2, lr=1e-3),
            seed=seed,
        )
        seen.clear()
        assert len([*server.rounds(2)]) == 2
        return [*seen]

    first, again, other = run(0), run(0), run(1)
    assert first == again != other
    if kind is not RandomSampler:
        assert {v for batch in first for v in batch} == {2.0, 4.0}
    assert len(first) == (8 if kind is not SubsetRandomSampler else 4)
    halves = first[: len(first) // 2], first[len(first) // 2 :]
    assert kind is SubsetRandomSampler or halves[0] != halves[1]  # a round draws anew


def test_a_plan_that_draws_the_batches_refuses_samplers_and_a_client_level_one_takes_them():
    mine = clients(in_order)
    with pytest.raises(ConfigError, match=r"c0 has a sampler, .* draws the batches itself .*leave"):
        Server(reader(), mine, Recipe(privacy=SampleLevel(noise_multiplier=1.0, rounds=1)))
    plan = ClientLevel(noise_multiplier=1.0, rounds=1)
    server = Server(reader(), mine, Recipe(batch_size=4, privacy=plan))
    assert server.round()["round"] == 1


@pytest.mark.parametrize(
    "options, recipe, message",
    [
        (
            {"batch_size": 4},
            {"batch_size": 8},
            r"batch_size 4, and the recipe 8: give Recipe\(batch",
        ),
        ({"batch_size": 4}, {"batch_size": None}, "and the recipe None"),
        ({"batch_size": 4, "drop_last": True}, {"batch_size": 4}, r"Recipe\(drop_last=True\)"),
        ({"batch_size": 4}, {"batch_size": 4}, ""),
        ({"batch_size": 99}, {"batch_size": None}, ""),
    ],
    ids=str,
)
def test_a_loader_cuts_batches_as_the_recipe_does_or_is_refused(options, recipe, message):
    x, y = torch.randn(10, 2), torch.arange(10) % 2
    client = Client("a", DataLoader(TensorDataset(x, y), shuffle=True, **options))
    if message:
        with pytest.raises(ConfigError, match=f"client a: its DataLoader has .*{message}"):
            Server(nn.Linear(2, 2), [client], Recipe(**recipe))
        return
    server = Server(nn.Linear(2, 2), [client], Recipe(**recipe))
    assert not [n for n in server.notes if "DataLoader" in n]
    unshuffled = [Client(k, DataLoader(TensorDataset(x, y), 4)) for k in "ab"]
    server = Server(nn.Linear(2, 2), unshuffled, Recipe(batch_size=4))
    (note,) = [n for n in server.notes if "DataLoader" in n]
    assert "client a, as of 1 more, does not shuffle" in note


class Noisy(Texts):
    """Words are left out at random, as augmentation does."""

    def __getitem__(self, i: int):
        x, y = super().__getitem__(i)
        return x * (torch.rand(len(x)) > 0.3) + 0 * int(np.random.rand() > 2), y


class Dropping(Reader):
    def forward(self, x):
        return super().forward(x) + F.dropout(self.out.bias, 0.5, self.training)


def test_workers_that_read_ahead_change_nothing_and_what_draws_repeats():
    def run(kind: type, workers: int, engine=None) -> dict:
        torch.manual_seed(3)
        made = [Client(f"c{k}", kind(7, k), collate=padded, num_workers=workers) for k in range(2)]
        server = Server(Dropping(), made, Recipe(lr=0.3, batch_size=3, epochs=1), engine=engine)
        server.round()
        server.close()
        return weights(server.model)

    def same(a: dict, b: dict) -> bool:
        return all(torch.equal(v, b[k]) for k, v in a.items())

    assert same(run(Texts, 0), run(Texts, 2))
    one = run(Noisy, 1)
    assert same(one, run(Noisy, 2)) and same(one, run(Noisy, 1, Processes(workers=1)))
    assert not same(one, run(Noisy, 0))


class Graphs(Dataset):
    """Nodes with two numbers, edges between them, and whether the first numbers add up to more."""

    def __init__(self, n: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.items = []
        for k in torch.randint(2, 6, (n,), generator=g).tolist():
            x = torch.randn(k, 2, generator=g)
            edges = torch.randint(0, k, (2, 2 * k), generator=g)
            self.items.append(((x, edges), int(x[:, 0].sum() > 0)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        return self.items[i]


def offset(items):
    """One large graph of many, and which graph each node is of."""
    sizes = torch.tensor([len(x) for (x, _), _ in items])
    starts = sizes.cumsum(0) - sizes
    edges = torch.cat([e + s for ((_, e), _), s in zip(items, starts, strict=True)], 1)
    of = torch.repeat_interleave(torch.arange(len(items)), sizes)
    x = torch.cat([x for (x, _), _ in items])
    return (x, edges, of), torch.tensor([y for _, y in items])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, x, edges, of):
        h = self.inner(x).tanh()
        h = h.index_add(0, edges[1], h[edges[0]])
        pooled = h.new_zeros(int(of.max()) + 1, 6).index_add(0, of, h)
        return self.out(pooled)


def graph_clients(**more) -> list[Client]:
    return [Client(f"c{k}", Graphs(n, k), collate=offset, **more) for k, n in enumerate((9, 6))]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_graphs_train_and_are_judged_by_their_collate():
    made = graph_clients(validation=Graphs(5, 8))
    server = Server(net(), made, Recipe(lr=0.1, batch_size=None, epochs=1))
    start = copy.deepcopy(server.model)
    server.round()
    total = {k: torch.zeros_like(p) for k, p in start.named_parameters()}
    for c in made:
        x, y = offset([c.data[i] for i in range(len(c))])
        grads = torch.autograd.grad(F.cross_entropy(start(*x), y), [*start.parameters()])
        for k, g in zip(total, grads, strict=True):
            total[k] += len(c) / 15 * g
    for k, p in start.named_parameters():
        assert torch.allclose(server.model.get_parameter(k), p - 0.1 * total[k], atol=1e-6)
    found = evaluate(server.model, made[0].validation, {"accuracy": "accuracy"}, batch_size=2)
    x, y = offset([made[0].validation[i] for i in range(5)])
    hits = (server.model(*x).argmax(1) == y).float().mean()
    assert found["accuracy"] == pytest.approx(float(hits))
    loader = DataLoader(Graphs(5, 8), 3, collate_fn=offset)
    assert evaluate(server.model, loader, ["accuracy"]) == found


def clipped_by_hand(model: nn.Module, made: list[Client], collate, clip: float, lr: float) -> dict:
    """One step of every example of every client, each clipped by the gradient it has alone."""
    start, total = copy.deepcopy(model), None
    for c in made:
        part = [torch.zeros_like(p) for p in start.parameters()]
        for i in range(len(c)):
            x, y = collate([c.data[i]])
            output = start(*x) if isinstance(x, tuple) else start(x)
            grads = torch.autograd.grad(F.cross_entropy(output, y), [*start.parameters()])
            norm = float(torch.cat([g.flatten() for g in grads]).norm())
            for s, g in zip(part, grads, strict=True):
                s += min(1.0, clip / norm) * g
        total = part if total is None else [t + s for t, s in zip(total, part, strict=True)]
    names = [k for k, _ in start.named_parameters()]
    steps = zip(names, start.parameters(), total, strict=True)
    return {k: p - lr * t / 8.0 / len(made) for k, p, t in steps}


@pytest.mark.parametrize(
    "make, model, collate, mode",
    [
        (lambda: clients(), lambda: reader(), padded, "layers"),
        (lambda: clients(), lambda: reader(masked=False), padded, "alone"),
        (graph_clients, net, offset, "alone"),
    ],
    ids=["padding that is masked", "padding that is seen", "graphs"],
)
def test_private_gradients_are_those_of_examples_collated_alone(make, model, collate, mode):
    plan = SampleLevel(
        noise_multiplier=1e-6, sample_rate=1.0, steps=1, batch_size=8.0, clip=0.2, rounds=1
    )
    made = make()
    server = Server(model(), made, Recipe(lr=1.0, privacy=plan))
    wanted = clipped_by_hand(server.model, made, collate, 0.2, 1.0)
    server.round()
    for k, v in wanted.items():
        assert torch.allclose(server.model.get_parameter(k), v, atol=1e-5), k
    assert server.session.recipe.privacy.mode == mode
    said = [n for n in server.notes if "each collated alone: rows of a batch" in n]
    assert bool(said) == (mode == "alone")
    server = Server(
        model(), made, Recipe(privacy=SampleLevel(noise_multiplier=1.0, rounds=1, sample_rate=0.1))
    )
    server.round()  # some batches are empty
    if mode == "alone":
        plan = SampleLevel(noise_multiplier=1.0, rounds=1, mode="hooks")
        with pytest.raises(
            ConfigError, match=r"mode hooks cannot train: rows of .*; take mode alone"
        ):
            Server(model(), made, Recipe(privacy=plan))


class Square(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int):
        return torch.tensor([float(i), 1.0]), i % 2


def test_a_collate_whose_examples_are_all_alike_is_not_trusted_and_one_that_mixes_is_found():
    def mixing(items):
        x, y = default_collate(items)
        return x - x.mean(0) if len(x) > 1 else x, y

    for collate in (lambda items: default_collate(items), mixing):
        made = [Client("a", Square(), collate=collate)]
        plan = SampleLevel(noise_multiplier=1.0, rounds=1)
        server = Server(nn.Linear(2, 2), made, Recipe(privacy=plan))
        assert server.session.recipe.privacy.mode == "alone"
        assert "the examples looked at are all of one size" in str(server.notes)

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = None

        def forward(self, output, target):
            self.last = output.detach()
            return F.cross_entropy(output, target, reduction="none")

    plan = SampleLevel(noise_multiplier=1.0, rounds=1)
    with pytest.raises(ConfigError, match="keeps something from call to call"):
        Server(net(), graph_clients(), Recipe(loss=Kept(), privacy=plan))


class Together(TensorDataset):
    """Gives several examples at once, perhaps by what is largest among them."""

    def __init__(self, mixed: bool) -> None:
        x = torch.linspace(-1, 2, 20).view(10, 2)
        super().__init__(x, (x[:, 0] > 0).long())
        self.mixed = mixed

    def __getitems__(self, places):
        x, y = self.tensors
        largest = x[places].max() if self.mixed else 1.0
        return [{"x": (x[k] / largest).numpy(), "y": int(y[k])} for k in places]


class Held(Dataset):
    """So that nobody knows it for tables."""

    def __init__(self, inside: Together) -> None:
        self.inside, self.__getitems__ = inside, inside.__getitems__

    def __len__(self) -> int:
        return len(self.inside)

    def __getitem__(self, k: int):
        return self.__getitems__([k])[0]


@pytest.mark.parametrize("mixed", [True, False])
def test_examples_that_a_dataset_prepares_by_one_another_are_no_private_ones(mixed: bool) -> None:
    clients = [Client("a", Held(Together(mixed)))]
    recipe = Recipe(privacy=SampleLevel(noise_multiplier=1.0, rounds=1))
    if not mixed:
        assert check(clients, recipe) == []
        return
    with pytest.raises(ConfigError, match="__getitems__ gives other examples in company"):
        check(clients, recipe)


LOOSE = np.random.default_rng(0)


class Jittered(Dataset):
    def __init__(self, draw):
        self.transform = draw

    def __len__(self):
        return 12

    def __getitem__(self, k):
        return torch.ones(6) + self.transform(k), k % 4


class Loose(Jittered):
    def __getitem__(self, k):
        return torch.ones(6) + float(LOOSE.normal()), k % 4


def test_a_generator_that_a_dataset_keeps_is_said():
    rng, steady = np.random.default_rng(0), torch.Generator()

    def said(data):
        clients = [Client(f"c{k}", Subset(data, range(4 * k, 4 * k + 4))) for k in range(2)]
        notes = Server(mlp(), clients, Recipe(batch_size=4)).notes
        return [n.split(", ")[1] for n in notes if "generator of its own" in n]

    assert said(Jittered(lambda k: float(rng.normal()))) == ["dataset.transform.rng"]
    assert said(Loose(None)) == ["dataset.__getitem__.LOOSE"]
    # one that begins anew at each example, and torch's own, repeat
    assert said(Jittered(lambda k: torch.randn(6, generator=steady.manual_seed(k)))) == []
    assert said(Jittered(lambda k: torch.randn(6) + np.random.normal())) == []


class Torn(torch.utils.data.Dataset):
    """A dataset of which examples far from both ends cannot be read."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if 8 < i < 38:
            raise OSError("a picture is truncated")
        return torch.full((6,), float(i)), i % 3


def test_an_example_that_cannot_be_read_is_said_before_training():
    with pytest.raises(ConfigError, match=r"of its dataset failed: OSError: a picture is"):
        Server(mlp(), [Client(str(k), Torn()) for k in range(3)], Recipe(batch_size=4))


def test_numbers_that_torch_can_hardly_hold_and_sparse_tables_are_told_what_to_be():
    x, y = torch.randn(12, 6), np.arange(12, dtype="uint16") % 3
    with pytest.raises(ConfigError, match="labels are uint16, and classes must be int64"):
        Server(mlp(), [Client("a", (x, y))])
    sparse = type("csr_matrix", (), {"toarray": None})()
    with pytest.raises(ConfigError, match=r"data is sparse \(csr_matrix\): give it dense"):
        Client("a", (sparse, y))
