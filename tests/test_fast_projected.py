"""Projected noise has the law of dense noise: every claim of its proof, by measurement."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, ClientOptimizer, FedProx, Local, Recipe, Server
from fedtorch.fast import whole
from fedtorch.fast.chunk_data import Kept
from fedtorch.fast.layers import Rule
from fedtorch.fast.ops import ops_for
from fedtorch.fast.projected import Known, Projected
from fedtorch.fast.reader import Linear
from fedtorch.privacy import SampleLevel
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream
from fedtorch.types import ConfigError

INPUTS, EXAMPLES, STEPS, OUT = 7, 4, 3, 4000
SIGMA = 0.5


def data(kind: str) -> torch.Tensor:
    x = torch.randn(EXAMPLES, INPUTS, generator=torch.Generator().manual_seed(0))
    if kind == "twice the same":
        x[1] = x[0]
    if kind == "zeros":
        x[2] = 0
    return x


@pytest.fixture(params=["independent", "twice the same", "zeros"])
def run(request):
    """A visit without gradients: what each step saw of the noise, and all of it in the end.

    Columns of a layer have independent noise, so that each of the ``OUT`` is a run of its own.
    """
    x = data(request.param)
    kept, table = Kept(), TensorDataset(x, torch.zeros(EXAMPLES))
    rows = kept.rows([table], torch.device("cpu"), ops_for(x))
    basis = kept.basis(table, True, x.device)
    known = Known(kept.gram(table, True, x.device)[None], [basis], basis[1].T[None])
    every = torch.arange(EXAMPLES).repeat(STEPS)[None]
    private = PrivateSteps(1.0, SIGMA, 1.0, [stream("aes", 7, request.param)])
    layer = Projected(
        Linear("w", "b", (OUT, INPUTS)), torch.zeros(OUT, INPUTS), torch.zeros(OUT), Rule(1.0),
        rows, (every, every), known, private,
    )  # fmt: skip
    seen = []
    for _ in range(STEPS):
        seen.append(layer.forward(torch.zeros(1, EXAMPLES))[0].clone())
        layer.step(torch.zeros(1, EXAMPLES, OUT))
    wide = torch.cat([x, torch.ones(EXAMPLES, 1)], 1)
    own = layer.done().stack()
    total = torch.cat([own["w"][0], own["b"][0][:, None]], 1)
    return wide, torch.stack(seen), total


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Covariances of OUT samples: within five standard errors of their largest entry."""
    assert float((found - wanted).abs().max()) < 5 * float(wanted.abs().max()) * math.sqrt(2 / OUT)


def test_the_sum_of_the_noise_is_white_in_every_direction(run):
    wide, _, total = run
    close(total.T @ total / OUT, STEPS * SIGMA**2 * torch.eye(INPUTS + 1))
    # along the data, where it came step by step, and across it, where it came at once
    q = torch.linalg.qr(wide.T, mode="complete").Q
    spread = (total @ q).square().mean(0) / (STEPS * SIGMA**2)
    assert spread[0] == pytest.approx(1, abs=0.15) and spread[-1] == pytest.approx(1, abs=0.15)


def test_what_steps_see_grows_by_independent_parts_of_the_right_size(run):
    wide, seen, _ = run
    gram = SIGMA**2 * wide @ wide.T
    assert not seen[0].any()
    close(seen[1] @ seen[1].T / OUT, gram)
    later = seen[2] - seen[1]
    close(later @ later.T / OUT, gram)
    # uncorrelated: nothing is added to what should be there
    close(later @ seen[1].T / OUT + gram, gram)


def test_what_was_seen_is_part_of_the_sum(run):
    # seen is minus the noise of the steps before; with the sum it shares exactly that noise
    wide, seen, total = run
    close(seen[1] @ total / OUT, SIGMA**2 * wide)
    close(seen[2] @ total / OUT, 2 * SIGMA**2 * wide)


def test_the_sum_is_normal(run):
    _, _, total = run
    z = total.flatten() / (SIGMA * math.sqrt(STEPS))
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=0.15)
    assert float(z.pow(3).mean()) == pytest.approx(0, abs=0.1)


def clients(twice: bool = False) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    out = []
    for k, n in enumerate((20, 7, 1, 12)):
        x, y = torch.randn(n, 30, generator=g), torch.randint(0, 4, (n,), generator=g)
        if twice:
            x[n // 2 :] = x[: n - n // 2].clone()
        out.append(Client(f"c{k}", (x, y)))
    return out


def trained(who: list[Client], projected: bool, noise: float, bias: bool = True):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 16, bias=bias), nn.ReLU(), nn.Linear(16, 4))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plan = SampleLevel(
        noise_multiplier=noise, rounds=3, sample_rate=0.4, steps=4, batch_size=5.0, clip=0.7,
        projected=projected, insecure_seed=5,
    )  # fmt: skip
    engine = Local(solver="fast", chunk=3)
    server = Server(model, who, Recipe(lr=0.2, privacy=plan), engine=engine)
    figures = [server.round() for _ in range(2)]
    return {k: v - start[k] for k, v in model.state_dict().items()}, figures


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("twice", [False, True])
def test_without_noise_it_is_the_dense_form(twice, bias, at_once, monkeypatch):
    if not at_once:  # side by side
        monkeypatch.setattr(whole, "pays_privately", lambda *given: False)
    who = clients(twice)
    dense, before = trained(who, False, 1e-7, bias)
    projected, after = trained(who, True, 1e-7, bias)
    for k, v in dense.items():
        assert float((projected[k] - v).norm() / v.norm()) < 1e-4
    for a, b in zip(after, before, strict=True):
        for name in ("nonprivate_train_loss", "update_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_the_model_moves_by_noise_of_the_claimed_deviation():
    moved, _ = trained(clients(), True, 50.0)
    # the mean of 4 clients, 2 rounds of 4 steps each of lr noise clip / batch_size
    std = 0.2 * 50.0 * 0.7 / 5.0 * math.sqrt(8 / 4)
    assert float(moved["0.weight"].std()) == pytest.approx(std, rel=0.15)
    assert float(moved["2.weight"].std()) == pytest.approx(std, rel=0.3)


def test_an_example_that_is_not_finite_counts_as_nothing():
    who = clients()
    who[0].data.tensors[0][3] = float("nan")
    moved, _ = trained(who, True, 0.1)
    assert all(v.isfinite().all() for v in moved.values())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"optimizer": ClientOptimizer("SGD", {"momentum": 0.9})}, "plain SGD"),
        ({"strategy": FedProx(mu=0.1)}, "plain SGD"),
        ({"optimizer": ClientOptimizer("Adam")}, "Adam, not SGD"),
    ],
)
def test_projected_noise_is_refused_where_it_does_not_hold(change, why):
    plan = SampleLevel(rounds=1, noise_multiplier=1.0, projected=True)
    model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ConfigError, match=f"projected.*{why}"):
        Server(model, clients(), Recipe(privacy=plan, **change))


def test_projected_noise_is_refused_with_another_solver():
    plan = SampleLevel(rounds=1, noise_multiplier=1.0, projected=True)
    with pytest.raises(ConfigError, match=r"projected.*engine\.solver stacked"):
        Server(nn.Linear(30, 4), clients(), Recipe(privacy=plan), engine=Local(solver="stacked"))


@pytest.mark.parametrize("size", [1e20, 1e38, 3e38])
def test_an_example_too_large_for_products_moves_its_client_by_the_clip(size):
    # its products with others overflow: they must not be seen in anything the others send
    x, y = clients()[0].data.tensors
    ends = []
    for extra in (torch.zeros(0, 30), torch.full((1, 30), size)):
        data = torch.cat([x[:15], extra, x[15:]]), torch.cat([y[:15], y[: len(extra)], y[15:]])
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4))
        plan = SampleLevel(
            noise_multiplier=1e-7, rounds=3, sample_rate=1.0, steps=1, batch_size=1.0, clip=0.5,
            projected=True, insecure_seed=5,
        )  # fmt: skip
        who = [clients()[3], Client("c", data)]
        server = Server(model, who, Recipe(lr=1.0, privacy=plan))
        assert server.round()["failed"] == {}
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((ends[0] - ends[1]).norm()) <= 0.5 / 2 * (1 + 1e-4)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("size", [1e-22, 1e-24, 1e-30])
def test_an_example_whose_squares_vanish_moves_its_client_by_the_clip_at_most(projected, size):
    # inputs as small as their gradient is large: a norm of ordinary size, of which float32 squares see none
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(19, 12, generator=g), torch.randn(19, 4, generator=g)
    x[18] *= size
    y[18] /= size
    ends = []
    for n in (18, 19):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 4, bias=False))
        plan = SampleLevel(
            rounds=1, steps=1, sample_rate=1.0, noise_multiplier=1e-9, clip=0.05, batch_size=1.0,
            projected=projected, insecure_seed=5,
        )  # fmt: skip
        recipe = Recipe(lr=1.0, loss=lambda z, y: (z - y).square().sum(1), privacy=plan)
        server = Server(model, [Client("c", (x[:n], y[:n]))], recipe, engine=Local(solver="fast"))
        server.round()
        ends.append(model[0].weight.detach().double())
    assert float((ends[1] - ends[0]).norm()) <= 0.05 * (1 + 1e-5)
