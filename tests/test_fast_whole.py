"""Small models, whose visits one loop takes: the same steps as autograd's, client by client."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Server
from fedtorch.fast import Fast, whole
from fedtorch.kernels.compile import available, loops
from fedtorch.privacy import ClientLevel
from loop_case import close, drawn

SIZES = 37, 5, 18, 64, 1, 23  # unequal, one below a batch, one single example

needs_loops = pytest.mark.skipif(not available(), reason="without numba there are no loops")


def own(widths: list[int], biased: bool) -> tuple[Tensor, list]:
    """Parameters in a row, and where each layer's begin."""
    sizes = [(b * a, b if biased else 0) for a, b in pairwise(widths)]
    row, at, table = drawn(sum(map(sum, sizes))) / 4, 0, []
    for (weights, biases), (a, b) in zip(sizes, pairwise(widths), strict=True):
        table.append((b, a, at, at + weights if biases else -1))
        at += weights + biases
    return row, table


def by_autograd(row: Tensor, table: list, x: Tensor, y: Tensor, factor: Tensor, keep: float):
    """A step: the parameters after it, and each example's loss."""
    row = row.clone().requires_grad_()
    for n, (b, a, at, bias) in enumerate(table):
        w = row[at : at + a * b].view(b, a)
        x = linear(x.relu() if n else x, w, row[bias : bias + b] if bias >= 0 else None)
    losses = cross_entropy(x, y, reduction="none")
    (losses * factor).sum().backward()
    return keep * row.detach() - row.grad, losses.detach()


@needs_loops
@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("B", [1, 2, 5, 7])
def test_each_step_is_one_of_autograd(B, biased, keep):
    for widths in ([3, 2], [17, 5], [64, 10], [16, 33, 4], [5, 1, 2], [81, 70, 64, 7]):
        start, table = own(widths, biased)
        x, T, steps = drawn(9, widths[0]), 3 * B, torch.tensor([3, 1, 0])
        draw = torch.Generator().manual_seed(B)
        index = torch.randint(9, (3, T), generator=draw)
        y = torch.randint(widths[-1], (9,), generator=draw)
        scale = torch.full((3, T, 1), 1 / B)
        scale[0, B - 1] = 0  # there is no example
        factor, values = scale * 0.3, torch.empty(3, len(start) + 5)
        places = torch.tensor(table).numpy(), sum(widths[:-1]), max(widths)
        given = (values, start, keep), places, (x, index), (y, scale, factor), (steps, B)
        squares, losses = loops("fedtorch.kernels.loops").Loops().visits(*given)
        values = values[:, : len(start)]
        for c, n in enumerate(steps.tolist()):
            row, total = start, 0.0
            for t in range(n):
                at = slice(t * B, (t + 1) * B)
                given = x[index[c, at]], y[index[c, at]], factor[c, at, 0]
                row, each = by_autograd(row, table, *given, keep)
                total += float((each * scale[c, at, 0]).sum())
            close(values[c] + start, row)
            assert not n or float(losses[c]) == pytest.approx(total / n, rel=1e-5)
            assert float(squares[c]) == pytest.approx(float(values[c].double().square().sum()))


@needs_loops
@pytest.mark.parametrize("B", [1, 2, 5, 7])
def test_each_step_behind_a_first_layer_is_one_of_autograd(B):
    for widths in ([17, 5, 3], [64, 10, 33, 4], [5, 1, 2], [20, 81, 64, 7]):
        start, table = own(widths, True)
        n, m = widths[:2]
        w, b, ahead = start[: m * n].view(m, n), start[m * n : m * (n + 1)], m * (n + 1)
        each, T, steps = 9, 3 * B, torch.tensor([3, 1, 0])
        x, draw = drawn(3, each, n) / 2, torch.Generator().manual_seed(B)
        local = torch.randint(each, (3, T), generator=draw)
        index, flat = local + each * torch.arange(3)[:, None], x.flatten(0, 1)
        y = torch.randint(widths[-1], (3 * each,), generator=draw)
        scale = torch.full((3, T, 1), 1 / B)
        scale[0, B - 1] = 0  # there is no example
        factor, values = scale * 0.3, torch.empty(3, len(start) - ahead + 5)
        rest = [
            (size, into, v - ahead, u - ahead)
            for size, into, v, u in torch.tensor(table[1:]).tolist()
        ]
        places = torch.tensor(rest).numpy(), sum(widths[1:-1]), max(widths[1:])
        ops = loops("fedtorch.kernels.loops").Loops()
        first = ops.coefficients(linear(flat, w, b), x @ x.mT + 1, (index, local))
        of = values, start[ahead:].clone()
        squares, losses = ops.behind(of, places, first, (y, scale, factor), (steps, B))
        values = values[:, : len(start) - ahead]
        for c, many in enumerate(steps.tolist()):
            row, total = start, 0.0
            for t in range(many):
                at = slice(t * B, (t + 1) * B)
                given = flat[index[c, at]], y[index[c, at]], factor[c, at, 0]
                row, each_loss = by_autograd(row, table, *given, 1.0)
                total += float((each_loss * scale[c, at, 0]).sum())
            moved = first.rows[c].T @ x[c], first.rows[c].sum(0)
            close(torch.cat([w - moved[0], (b - moved[1])[:, None]], 1), whole_row(row, m, n))
            close(values[c] + start[ahead:], row[ahead:])
            assert not many or float(losses[c]) == pytest.approx(total / many, rel=1e-5)
            assert float(squares[c]) == pytest.approx(float(values[c].double().square().sum()))


def whole_row(row: Tensor, m: int, n: int) -> Tensor:
    """A first layer's weights and biases, [m, n + 1]."""
    return torch.cat([row[: m * n].view(m, n), row[m * n : m * (n + 1)][:, None]], 1)


def clients(inputs: int = 20, classes: int = 3) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    tables = [
        (torch.randn(n, inputs, generator=g), torch.randint(classes, (n,), generator=g))
        for n in SIZES
    ]
    return [Client(f"c{k}", table) for k, table in enumerate(tables)]


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner = nn.Linear(20, 18), nn.ReLU(), nn.Linear(18, 7, bias=False), nn.ReLU()
        return nn.Sequential(nn.Flatten(), *inner, nn.Linear(7, 3))


def ends(recipe: Recipe, solver: str, who: list[Client] | None = None) -> dict[str, Tensor]:
    model = mlp()
    list(Server(model, who or clients(), recipe, engine=Local(solver=solver), seed=3).rounds(2))
    return model.state_dict()


@pytest.fixture(params=["visit", "visit_behind"])
def way(request) -> str:
    return request.param


@pytest.fixture
def taken(monkeypatch, way) -> list[int]:
    """The clients of each chunk that is visited so; the rule always says that it pays."""
    found: list[int] = []
    before = getattr(whole.Whole, way)

    def visit(self, *given) -> None:
        found.append(len(self.change))
        before(self, *given)

    monkeypatch.setattr(whole.Whole, way, visit)
    monkeypatch.setattr(whole, "CALLS", 1e9)
    if way == "visit_behind":
        monkeypatch.setattr(whole, "pays", lambda *given: False)
        monkeypatch.setattr(whole.dual, "pays", lambda *given: True)
    return found


PLAN = ClientLevel(rounds=2, noise_multiplier=1e-6, clip=0.05, insecure_seed=5)
DECAY = ClientOptimizer("SGD", {"weight_decay": 0.1})


@needs_loops
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": DECAY}, {"epochs": 2, "drop_last": True}, {"privacy": PLAN}],
    ids=["plain", "decay", "epochs", "client-level"],
)
def test_the_same_weights_as_the_general_path(taken, way, options):
    recipe = Recipe(**{"lr": 0.1, "epochs": 3, "batch_size": 8} | options)
    found, wanted = (ends(recipe, solver) for solver in ("fast", "general"))
    # weight decay takes from a first layer's shared weights too: that goes side by side
    assert bool(taken) == (way == "visit" or "optimizer" not in options)
    assert all(torch.allclose(found[k], wanted[k], atol=2e-6) for k in wanted)


@needs_loops
def test_a_client_that_diverges_fails_alone(taken):
    who = clients()
    x = who[0].data.tensors[0]
    x[3] = torch.inf
    model = mlp()
    server = Server(model, who, Recipe(batch_size=8), engine=Local(solver="fast"))
    figures = server.round()
    assert taken and figures["failed"] == {"c0": "nonfinite"} and figures["clients"] == 5
    assert all(v.isfinite().all() for v in model.state_dict().values())


@needs_loops
def test_a_norm_is_never_less_than_it_is():
    start, table = own([30, 40, 3], True)
    relu = whole.Activation("ReLU")
    chain = whole.Chain((whole.Linear("w", "b", (40, 30)), relu, whole.Linear("v", "u", (3, 40))))
    state = {"w": start[:1200].view(40, 30), "b": start[1200:1240]}
    state |= {"v": start[1240:1360].view(3, 40), "u": start[1360:]}
    form = whole.Form.of(chain, "wbvu")
    made = whole.Whole(form, state, whole.Rule(0.1), whole.Memory(), 2)
    assert [tuple(row) for row in form.places[0].tolist()] == table
    made.change.copy_(drawn(2, len(start)) * torch.tensor([[1e-42], [1e3]]))
    made.squares = made.change.double().square().sum(1)
    exact = [sum(Fraction(v) ** 2 for v in row.tolist()) for row in made.change]
    assert all(
        e <= Fraction(v) for e, v in zip(exact, made.sq_norms(upper=True).tolist(), strict=True)
    )
    assert torch.equal(made.stack()["w"], (made.change + made.start)[:, :1200].view(2, 40, 30))


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"strategy": FedProx(mu=0.1)}, mlp),
        ({"optimizer": ClientOptimizer("SGD", {"momentum": 0.9})}, mlp),
        ({}, lambda: nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 3))),
        ({}, lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3))),
        ({}, lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))),
        ({}, lambda: nn.Sequential(nn.Linear(20, 600), nn.ReLU(), nn.Linear(600, 600), nn.Linear(600, 3))),
        ({"loss": lambda output, y: cross_entropy(output, y, reduction="none")}, mlp),
    ],
    ids=["pull", "momentum", "tanh", "relu-twice", "dropout", "large", "loss"],
)  # fmt: skip
def test_what_it_does_not_know_goes_side_by_side(taken, options, model):
    recipe = Recipe(**{"strategy": FedAvg()} | options)
    server = Server(model(), clients(), recipe, engine=Local(solver="fast"))
    server.round()
    assert isinstance(server.session.choice.solver, Fast) and not taken


@needs_loops
@pytest.mark.parametrize("way", ["visit"], indirect=True)
def test_what_a_client_learns_hangs_on_nobody_beside_it(taken):
    found, sizes = [], []
    for chunk in (1, 6):
        engine = Local(solver="fast", chunk=chunk)
        server = Server(mlp(), clients(), Recipe(batch_size=8), engine=engine, seed=3)
        taken.clear()  # what was tried
        server.round()
        sizes.append([*taken])
        found.append(server.visits.values)
    assert sizes == [[1] * 6, [6]]
    for name in ("train_loss", "update_norm"):
        assert torch.equal(found[0][name], found[1][name])
