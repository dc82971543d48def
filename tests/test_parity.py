"""One definition of an algorithm, the same weights however clients are put together."""

import copy

import pytest
import torch
from torch import nn

from conftest import make_clients
from fedtorch import (
    Client,
    ClientOptimizer,
    FedAvg,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    ServerSGD,
    local_update,
    seeds,
)
from fedtorch.training.batches import batch_order
from fedtorch.training.losses import cross_entropy
from fedtorch.training.module import snapshot
from fedtorch.types import ClientError, Task

SIZES = [37, 5, 18, 64, 1, 23]  # unequal, one below a batch, one single example

STRATEGIES = (FedAvg, FedProx, Scaffold)
SERVERS = (None, ServerSGD(momentum=0.9), ServerAdam(lr=0.03))
OPTIMIZERS = (
    (ClientOptimizer("SGD"), 0.1),
    (ClientOptimizer("SGD", {"momentum": 0.9, "weight_decay": 0.01}), 0.05),
    (ClientOptimizer("Adam"), 0.01),
)


def clients(seed: int = 0) -> list[Client]:
    g = torch.Generator().manual_seed(seed)
    return [
        Client(f"c{k}", (torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g)))
        for k, n in enumerate(SIZES)
    ]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def trained(chunk: int, recipe: Recipe, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    model = model or mlp()
    server = Server(model, clients(), recipe, engine=Local(chunk=chunk), seed=3)
    for _ in server.rounds(3):
        pass
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("client", range(3), ids=["sgd", "momentum+wd", "adam"])
@pytest.mark.parametrize("kind", range(3), ids=["fedavg", "fedprox", "scaffold"])
def test_chunks_agree(kind, client):
    # each two of strategy, client and server optimizer meet
    strategy = STRATEGIES[kind](server=SERVERS[(kind + client) % 3])
    optimizer, lr = OPTIMIZERS[client]
    recipe = Recipe(strategy, optimizer=optimizer, lr=lr, epochs=2, batch_size=8)
    alone = trained(1, recipe)
    for chunk in (3, len(SIZES)):
        together = trained(chunk, recipe)
        worst = max((alone[k] - together[k]).abs().max().item() for k in alone)
        assert worst <= 1e-6, f"chunk {chunk}: {worst}"


def test_training_moves_the_weights():
    # without this, parity would also hold for an engine that does nothing
    before = mlp().state_dict()
    after = trained(3, Recipe(lr=0.1))
    assert max((before[k] - after[k]).abs().max().item() for k in before) > 1e-2


def test_one_client_full_batch_is_plain_sgd_to_the_last_bit():
    x, y = clients()[3].data.tensors
    model, plain = mlp(), mlp()
    recipe = Recipe(lr=0.3, epochs=4, batch_size=None)
    server = Server(model, [Client("only", (x, y))], recipe, engine=Local(solver="general"))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    for _ in server.rounds(5):
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y, reduction="none").mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_same_seed_is_bit_identical_and_another_seed_is_not():
    recipe = Recipe(Scaffold(), lr=0.1, epochs=2, batch_size=8)
    a, b = trained(3, recipe), trained(3, recipe)
    assert all(torch.equal(a[k], b[k]) for k in a)
    model = mlp()
    for _ in Server(model, clients(), recipe, engine=Local(chunk=3), seed=4).rounds(3):
        pass
    assert any(not torch.equal(a[k], v) for k, v in model.state_dict().items())


def test_a_server_starts_with_fresh_client_memory():
    recipe = Recipe(Scaffold(), lr=0.1)
    same = clients()
    results = []
    for _ in range(2):
        model = mlp()
        for _ in Server(model, same, recipe).rounds(2):
            pass
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def conv_bn() -> nn.Module:
    torch.manual_seed(2)
    # no conv bias before BatchNorm: its gradient is zero and optimizers amplify its rounding noise
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_batchnorm_agrees_and_is_never_padded():
    recipe = Recipe(lr=0.1, epochs=2, batch_size=4, drop_last=True)
    ok = [c for c in clients() if len(c) >= 4]
    states = []
    for chunk in (1, 4):
        model = conv_bn()
        server = Server(model, ok, recipe, engine=Local(chunk=chunk), seed=3)
        assert server.session.choice.strict == (chunk > 1)
        for _ in server.rounds(3):
            pass
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    for k, v in states[0].items():
        assert torch.allclose(v.double(), states[1][k].double(), atol=1e-6), k


def whole_batch(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One number that no mean over examples gives: each is weighed against its neighbours."""
    losses = nn.functional.cross_entropy(output, target, reduction="none")
    return (losses.softmax(0).detach() * losses).sum()


def bn_mlp() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def by_hand(model: nn.Module, clients: list[Client], recipe: Recipe, rounds: int) -> nn.Module:
    """What a PyTorch user would write: every client on its own batches, then the mean by examples."""
    model = copy.deepcopy(model)
    for r in range(rounds):
        mean = dict.fromkeys(model.state_dict(), 0.0)
        for c in clients:
            own = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(own.parameters(), recipe.lr)
            x, y = c.data.tensors
            for index in batch_order(len(c), recipe, seeds.derive(3, "order", r, c.id)):
                index = index[index >= 0]
                optimizer.zero_grad()
                recipe.loss(own(x[index]), y[index]).mean().backward()
                optimizer.step()
            share = len(c) / sum(len(c) for c in clients)
            mean = {k: mean[k] + share * v.double() for k, v in own.state_dict().items()}
        model.load_state_dict({k: mean[k].to(v) for k, v in model.state_dict().items()})
    return model


WHOLE = {
    "batchnorm": (bn_mlp, cross_entropy),
    "conv": (conv_bn, cross_entropy),
    "mean": (mlp, nn.CrossEntropyLoss()),
    "sum": (mlp, nn.CrossEntropyLoss(reduction="sum")),
    "weighed": (mlp, whole_batch),
    "both": (bn_mlp, nn.CrossEntropyLoss(label_smoothing=0.1)),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(
    "order",
    [
        {"batch_size": 8},
        {"batch_size": 8, "epochs": 2, "drop_last": True},
        {"batch_size": 7, "steps": 6},
        {"batch_size": None, "epochs": 2},
    ],
    ids=str,
)
def test_a_model_that_looks_at_the_whole_batch_sees_only_real_rows(name, order):
    make, loss = WHOLE[name]
    recipe = Recipe(loss=loss, lr=0.02, **order)
    sizes = [37, 18, 37, 5, 18, 20]  # 8 leaves 5, 2, 5, 5, 2, 4; some equally large, some not
    everybody = make_clients(sizes)
    wanted = by_hand(make(), everybody, recipe, 2)
    for solver, chunk in (("auto", None), ("stacked", 3), ("stacked", None), ("general", None)):
        model = make()
        engine = Local(chunk=chunk, solver=solver)
        server = Server(model, everybody, recipe, engine=engine, seed=3)
        assert all(figures["clients"] == len(sizes) for figures in server.rounds(2))
        for k, v in wanted.state_dict().items():
            if v.is_floating_point():
                worst = float((model.state_dict()[k] - v).abs().max())
                assert worst <= 1e-6, (solver, chunk, k, worst)


@pytest.mark.parametrize("make, loss", [WHOLE["batchnorm"], WHOLE["mean"]])
def test_the_stacked_solver_refuses_batches_it_would_fill_up(make, loss):
    model = make()
    task = Task(snapshot(model), {}, 0, 0, 0.1)
    with pytest.raises(ClientError, match="looks at the whole batch"):
        local_update(make_clients([5, 9]), task, Recipe(loss=loss), model)
    update, _ = local_update(make_clients([9, 9]), task, Recipe(loss=loss), model)
    assert len(update.ids) == 2


class Largest(nn.Module):
    """The three largest of each example, as they are: which those are hangs on the last bit."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, places = x.topk(3, 1)
        return torch.zeros_like(x).scatter(1, places, values)


def test_where_rounding_grows_solvers_differ_by_rounding_alone():
    # steps up the loss through topk and BatchNorm double every difference: 4e-3 in float32 after six rounds
    # of these, and a billionth of it in float64. A mistake would be as large in both.
    def trained(solver: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Largest(), nn.Linear(8, 4))
        everybody = make_clients([16] * 4)
        for c in everybody:
            c.data.tensors = (c.data.tensors[0].double(), c.data.tensors[1])
        recipe = Recipe(optimizer=ClientOptimizer("sgd", {"maximize": True}), lr=0.5, batch_size=8)
        server = Server(model.double(), everybody, recipe, engine=Local(solver=solver), seed=3)
        list(server.rounds(6))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert float((trained("general") - trained("stacked")).abs().max()) < 1e-8


def crowded(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss for each example, until more than thirty of a class meet: no batch of eight sees that."""
    many = (target[:, None] == target).sum(1) > 30
    return cross_entropy(output, target) * (1 + many * output.detach().mean().square())


def test_clients_side_by_side_are_no_larger_batch_to_a_loss():
    everybody, recipe = make_clients([24] * 12), Recipe(loss=crowded, lr=0.1, batch_size=8)
    model, wanted = mlp(), by_hand(mlp(), everybody, recipe, 1)
    Server(model, everybody, recipe, seed=3).round()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Follows(nn.Module):
    """Statistics that follow the batch, and no output that shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x)


class Hidden(nn.Module):
    """Scaled by the whole batch, behind weights that are zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last((h - h.mean(0)).relu())


class Attention(nn.Module):
    """Every example looks at every other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last((h @ h.T).softmax(1) @ h)


class Late(Hidden):
    """Looks at the others of a full batch alone: a short one that is filled up becomes one."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if len(x) > 7 else self.last(self.first(x).relu())


class BatchSecond(nn.Module):
    """An LSTM that takes the batch for its time axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(3, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(x.view(len(x), 2, 3))[0][:, -1])


def of_one_class(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss for each example, weighed by those of its class."""
    losses = cross_entropy(output, target)
    share = (target[:, None] == target).float()
    return losses * (share @ losses / share.sum(1)).detach()


def above_the_median(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses = cross_entropy(output, target)
    return losses * (losses >= losses.median()).float()


def seeded(make) -> nn.Module:
    torch.manual_seed(1)
    return make()


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 4))


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 4))


@pytest.mark.parametrize(
    "make, loss",
    [
        *((make, cross_entropy) for make in (Follows, Hidden, Late, Attention, BatchSecond)),
        *((make, cross_entropy) for make in (group_norm, instance_norm)),
        *((make, loss) for make in (mlp, group_norm) for loss in (of_one_class, above_the_median)),
    ],
)
def test_hidden_looks_at_other_examples_are_found(make, loss):
    recipe = Recipe(loss=loss, lr=0.05, batch_size=8, epochs=2)
    everybody = make_clients([21, 13, 6, 13])
    wanted = by_hand(seeded(make), everybody, recipe, 1)
    for engine in (Local(), Local(chunk=4), Local(solver="general")):
        model = seeded(make)
        Server(model, everybody, recipe, engine=engine, seed=3).round()
        for k, v in wanted.state_dict().items():
            if v.is_floating_point():
                worst = float((model.state_dict()[k] - v).abs().max())
                assert worst <= 1e-6, (engine, k, worst)


def of_the_third_class(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss for each example, larger where the batch has more of one class."""
    return cross_entropy(output, target) * (1 + (target == 2).sum())


@pytest.mark.parametrize("solver", ["stacked", "auto"])
def test_a_loss_that_mixes_is_found_where_the_largest_client_has_one_class(solver):
    recipe = Recipe(loss=of_the_third_class, lr=0.05, batch_size=8, epochs=2)
    everybody = make_clients([21, 13, 6, 13])
    everybody[0].data.tensors[1].zero_()
    wanted, model = by_hand(mlp(), everybody, recipe, 1), mlp()
    server = Server(model, everybody, recipe, engine=Local(solver=solver, chunk=4), seed=3)
    assert server.session.choice.strict
    server.round()
    for k, v in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[k], v, rtol=0, atol=1e-6)
