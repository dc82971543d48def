"""Dropout on the fast path drops what it drops on the general path: the same numbers, the same weights."""

import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.engines import Processes
from fedtorch.fast import Fast, front, offer, reader
from fedtorch.fast import solver as solve
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.strategies import Strategy
from fedtorch.training import dropout
from fedtorch.training.dropout import Dropout

SIZES = [21, 5, 13, 1, 8]  # unequal, one below a batch, one single example


def clients(*shape: int) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}", (torch.randn(n, *shape, generator=g), torch.randint(0, 4, (n,), generator=g))
        )
        for k, n in enumerate(SIZES)
    ]


def dense() -> nn.Module:
    """One layer used twice, one before and one after the activation."""
    drop = nn.Dropout(0.3)
    return nn.Sequential(
        nn.Linear(30, 25), nn.Tanh(), drop, nn.Linear(25, 20), nn.Dropout(0.5), nn.ReLU(),
        nn.Linear(20, 12), drop, nn.Linear(12, 4),
    )  # fmt: skip


class Functions(nn.Module):
    """As in the examples of PyTorch: with and without the flag, and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(*n) for n in ((30, 20), (20, 16), (16, 12), (12, 4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(F.relu(self.a(x)), training=self.training)
        x = F.dropout(F.relu(self.b(x)), 0.2)
        return self.d(torch.dropout(torch.sigmoid(self.c(x)), p=0.4, train=True))


class Mnist(nn.Module):
    """The network of PyTorch's own MNIST example, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(32, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


class Channels(nn.Module):
    """Whole channels, single numbers in place, and what lies in another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.drop, self.inner = nn.Dropout2d(0.3), nn.Dropout(0.2, inplace=True)
        self.mix, self.out = nn.Linear(36, 5), nn.Linear(30, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.max_pool2d(F.relu(self.conv1(x)), 1))
        x = x + self.inner(F.silu(self.conv2(x)))
        x = F.dropout(x.flatten(2).transpose(1, 2), 0.3, self.training).transpose(1, 2)
        return self.out(F.dropout1d(self.mix(x), 0.4, self.training).flatten(1))


def inputs() -> nn.Module:
    """Dropout of the examples themselves, twice."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Dropout(0.1),
        nn.Linear(30, 20),
        nn.ReLU(),
        nn.Linear(20, 4),
    )


MODELS = {
    "dense": (dense, (30,)),
    "functions": (Functions, (30,)),
    "inputs": (inputs, (5, 6)),
    "mnist": (Mnist, (1, 8, 8)),
    "channels": (Channels, (1, 8, 8)),
}


def trained(make, recipe: Recipe, solver: str, who: list[Client], **engine):
    torch.manual_seed(1)
    model = make()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    server = Server(model, who, recipe, engine=Local(solver=solver, **engine), seed=3)
    figures = list(server.rounds(2))
    assert isinstance(server.session.choice.solver, Fast) == (solver == "fast")
    return {k: v - start[k] for k, v in model.state_dict().items()}, figures


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


@pytest.fixture(params=["rule", "dual", "own"])
def form(request, monkeypatch):
    """Layers held as the cost rule says, all without copies, all with copies."""
    if request.param != "rule":
        monkeypatch.setattr(solve, "pays", lambda *_: request.param == "dual")
    return request.param


# all pairs of them without dropout: test_fast
KINDS: dict[str, tuple[Strategy, dict]] = {
    "momentum": (FedAvg(), {"momentum": 0.9}),
    "fedprox": (FedProx(mu=0.5), {"weight_decay": 0.1}),
    "scaffold": (Scaffold(), {}),
}


def recipe_of(kind: str) -> Recipe:
    strategy, args = KINDS[kind]
    made = ClientOptimizer("SGD", args)
    return Recipe(strategy, optimizer=made, lr=0.05, epochs=2, batch_size=4)


@cache
def general(name: str, kind: str):
    make, shape = MODELS[name]
    return trained(make, recipe_of(kind), "general", clients(*shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_same_weights_as_the_general_path(form, name, kind):
    (make, shape), recipe = MODELS[name], recipe_of(kind)
    slow, before = general(name, kind)
    for chunk in (3, 5) if form == "rule" else (3,):
        fast, after = trained(make, recipe, "fast", clients(*shape), chunk=chunk)
        assert apart(fast, slow) < 5e-4  # of the way; of the weights it is less than 1e-5
        for a, b in zip(after, before, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


@pytest.mark.parametrize("uniform", [True, False])
def test_masks_drawn_at_once_and_one_by_one_are_the_same(monkeypatch, uniform):
    if uniform and not dropout.uniform():
        pytest.skip("this processor's bernoulli_ is MKL's")
    monkeypatch.setattr(dropout, "uniform", lambda: uniform)
    for make, shape in MODELS.values():
        recipe = Recipe(lr=0.05, batch_size=4)
        ends = [trained(make, recipe, s, clients(*shape))[0] for s in ("general", "fast")]
        assert apart(*ends) < 5e-4


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything_dropped(p):
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(p), nn.Flatten(), nn.Linear(108, 9),
            nn.Dropout(p), nn.ReLU(), nn.Linear(9, 7), nn.Dropout(0.3), nn.Linear(7, 4),
        )  # fmt: skip

    recipe = Recipe(lr=0.1, batch_size=4)
    slow, fast = (trained(make, recipe, s, clients(1, 8, 8))[0] for s in ("general", "fast"))
    assert all(torch.allclose(fast[k], slow[k], atol=1e-6) for k in slow)
    assert any(v.any() for v in slow.values())


class Frozen(nn.Module):
    """Half of its dropout stays off whatever mode it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.off, self.on = (
            nn.Linear(30, 20),
            nn.Linear(20, 4),
            nn.Dropout(),
            nn.Dropout(),
        )

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.off.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.off(self.a(x)), 0.5, training=self.off.training)
        return self.b(self.on(x))


def test_a_layer_that_is_off_drops_nothing():
    torch.manual_seed(0)
    chain = reader.read(Frozen().eval(), torch.zeros(2, 30))
    assert [p.p for p in chain.layers if isinstance(p, Dropout)] == [0.5]
    recipe = Recipe(lr=0.1, batch_size=4)
    slow, fast = (trained(Frozen, recipe, s, clients(30))[0] for s in ("general", "fast"))
    assert apart(fast, slow) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_private_steps_drop_the_same_in_every_mode(name):
    # the same noise too; some of the batches are empty
    make, shape = MODELS[name]
    ends = []
    for mode, solver, chunk in (("hooks", "auto", 1), ("stacked", "auto", 3), ("auto", "fast", 3)):
        plan = SampleLevel(
            rounds=2, noise_multiplier=0.5, clip=0.3, batch_size=6.0, steps=4, sample_rate=0.25,
            insecure_seed=5, mode=mode,
        )  # fmt: skip
        recipe = Recipe(FedAvg(), lr=0.3, privacy=plan)
        ends.append(trained(make, recipe, solver, clients(*shape), chunk=chunk)[0])
    assert apart(ends[1], ends[0]) < 1e-5 and apart(ends[2], ends[0]) < 1e-5


def test_projected_noise_drops_what_dense_noise_drops():
    ends = []
    for projected in (False, True):  # noise of another shape, hence hardly any
        plan = SampleLevel(
            rounds=2, noise_multiplier=1e-9, clip=0.3, insecure_seed=5, projected=projected
        )
        recipe = Recipe(FedAvg(), lr=0.3, privacy=plan)
        ends.append(trained(dense, recipe, "fast", clients(30))[0])
    assert apart(*ends) < 5e-4  # what float32 leaves of so small a change


def test_each_client_clipped():
    plan = ClientLevel(rounds=2, noise_multiplier=1e-6, clip=0.05, insecure_seed=5)
    recipe = Recipe(lr=0.2, batch_size=4, privacy=plan)
    for make, shape in MODELS.values():
        slow, fast = (trained(make, recipe, s, clients(*shape))[0] for s in ("general", "fast"))
        assert apart(fast, slow) < 1e-3


def test_bf16_drops_the_same_numbers():
    for make, shape in MODELS.values():
        recipe = Recipe(lr=0.05, batch_size=4)
        ends = [
            trained(make, recipe, s, clients(*shape), dtype="bf16")[0] for s in ("general", "fast")
        ]
        assert apart(*ends) < 0.3  # other masks would be more than 1 apart


def test_another_round_another_client_another_seed_drops_others():
    ends = []
    for seed, rounds in ((3, 1), (4, 1), (3, 1)):
        torch.manual_seed(1)
        model = dense()
        recipe = Recipe(lr=0.05, batch_size=None)  # every step sees everything, in one order
        server = Server(model, clients(30), recipe, engine=Local(solver="fast"), seed=seed)
        list(server.rounds(rounds))
        ends.append(model.state_dict())
    assert apart(ends[0], ends[1]) > 1e-3
    assert all(torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        F.dropout(x)
        return self.b(F.dropout(x))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 20), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(F.dropout(x, inplace=True) + x)


REFUSED = {
    "what a dropout layer gives is not used": Unused(),
    "changes in place what others read": InPlace(),
    "drops channels of inputs with 2 axes": nn.Sequential(
        nn.Linear(30, 20), nn.Dropout2d(), nn.Linear(20, 4)
    ),
    "layer 1 (alphadropout) has no fast form": nn.Sequential(
        nn.Linear(30, 20), nn.AlphaDropout(), nn.Linear(20, 4)
    ),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")
def test_what_is_refused_and_why(why):
    got = reader.read(REFUSED[why], torch.randn(2, 30))
    assert isinstance(got, str) and why in got.lower()


def test_examples_that_lie_in_another_order_in_memory():
    who = clients(3, 8, 8)
    strided = [
        Client(
            c.id,
            (c.data.tensors[0].contiguous(memory_format=torch.channels_last), c.data.tensors[1]),
        )
        for c in who
    ]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.Flatten(), nn.Linear(144, 4))
    assert isinstance(offer(model, [c.data for c in who], Recipe()), Fast)
    assert "contiguous in memory" in offer(model, [c.data for c in strided], Recipe())


def test_a_model_in_channels_last_memory():
    recipe = Recipe(lr=0.05, batch_size=4)
    ends = []
    for solver in ("general", "fast"):
        make = lambda: Channels().to(memory_format=torch.channels_last)  # noqa: E731
        ends.append(trained(make, recipe, solver, clients(1, 8, 8))[0])
    assert apart(*ends) < 5e-4


def test_the_solver_travels():
    who = clients(1, 8, 8)
    solver = offer(Channels(), [c.data for c in who], Recipe())
    solver.module = front.build(Channels(), solver.chain.front)
    arrived = pickle.loads(pickle.dumps(solver))
    assert arrived.module is None and arrived.chain == solver.chain
    assert len(pickle.dumps(solver)) < 3000


def test_projected_noise_needs_the_examples_as_they_are():
    plan = SampleLevel(rounds=1, noise_multiplier=1.0, projected=True)
    got = offer(inputs(), [c.data for c in clients(30)], Recipe(privacy=plan), plan)
    assert "the model drops some of each" in got


@pytest.mark.parametrize("name", ["mnist", "functions"])
def test_chunks_engines_and_resumed_runs_drop_the_same(name):
    make, shape = MODELS[name]
    recipe = Recipe(Scaffold(), lr=0.05, batch_size=4)

    def server(engine):
        torch.manual_seed(1)
        return Server(make(), clients(*shape), recipe, engine=engine, seed=3)

    whole = server(Local(solver="fast"))
    list(whole.rounds(3))
    stopped, later = (server(Local(solver="fast")) for _ in range(2))
    list(stopped.rounds(1))
    later.load_state_dict(stopped.state_dict())
    list(later.rounds(2))
    want = whole.model.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in later.model.state_dict().items())
    other = server(Processes(workers=2, solver="fast", chunk=2))
    try:
        list(other.rounds(3))
    finally:
        other.close()
    assert apart(other.model.state_dict(), want) < 1e-5


@pytest.mark.parametrize("name", ["mnist", "dense"])
@pytest.mark.parametrize("args", [{}, {"momentum": 0.9}], ids=str)
def test_weights_in_float64(name, args):
    make, shape = MODELS[name]
    who = [Client(c.id, (c.data.tensors[0].double(), c.data.tensors[1])) for c in clients(*shape)]
    recipe = Recipe(optimizer=ClientOptimizer("SGD", args), lr=0.05, batch_size=3)
    slow, fast = (trained(lambda: make().double(), recipe, s, who)[0] for s in ("general", "fast"))
    assert apart(fast, slow) < 1e-9
