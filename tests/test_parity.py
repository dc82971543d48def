"""One definition of an algorithm, the same weights however clients are put together."""

import copy
import itertools

import pytest
import torch
from torch import nn

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
)

SIZES = [37, 5, 18, 64, 1, 23]  # unequal, one below a batch, one single example

STRATEGIES = [
    cls(server=server)
    for cls, server in itertools.product(
        (FedAvg, FedProx, Scaffold), (None, ServerSGD(momentum=0.9), ServerAdam(lr=0.03))
    )
]
OPTIMIZERS = [
    (ClientOptimizer("SGD"), 0.1),
    (ClientOptimizer("SGD", {"momentum": 0.9, "weight_decay": 0.01}), 0.05),
    (ClientOptimizer("Adam"), 0.01),
]


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


@pytest.mark.parametrize("optimizer, lr", OPTIMIZERS, ids=["sgd", "momentum+wd", "adam"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_chunks_agree(strategy, optimizer, lr):
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
