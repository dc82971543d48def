"""A small private federation, for the tests of privacy."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedtorch import Client, FedAvg, Local, Recipe, Server
from fedtorch.fast import offer
from fedtorch.privacy import Privacy
from fedtorch.training.local_update import local_update
from fedtorch.training.module import snapshot
from fedtorch.types import Task


def model(inputs: int = 6, hidden: int = 5, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def silent(inputs: int = 40, classes: int = 50) -> nn.Module:
    """All gradients are zero on inputs of zero: what it learns is noise alone."""
    net = nn.Linear(inputs, classes, bias=False)
    nn.init.zeros_(net.weight)
    return net


def clients(
    sizes: Sequence[int] = (9, 20, 14), inputs: int = 6, scale: float = 1.0
) -> list[Client]:
    g = torch.Generator().manual_seed(1)
    return [
        Client(
            f"c{k}",
            (scale * torch.randn(n, inputs, generator=g), torch.randint(0, 4, (n,), generator=g)),
        )
        for k, n in enumerate(sizes)
    ]


class Rows(FedAvg):
    """Sends what FedAvg sends, of which nobody knows: each client's own update is seen."""

    def upload(self, params, ctx):
        return super().upload(params, ctx)


def visit(
    net: nn.Module,
    who: Sequence[Client],
    plan: Privacy,
    noise: float,
    round: int = 0,
    quick: bool = False,
) -> dict[str, Tensor]:
    """What ``who`` send in one round at lr 1, [K, ...]; ``quick``: of the fast path, one by one."""
    if quick:
        solver = offer(net, [c.data for c in who], Recipe(FedAvg(), lr=1.0, privacy=plan), plan)
        assert not isinstance(solver, str), solver
        sent = [_one(net, [c], plan, noise, round, solver) for c in who]
        return {k: torch.cat([s[k] for s in sent]) for k in sent[0]}
    return _one(net, who, plan, noise, round, None)


def _one(net, who, plan, noise, round, solver) -> dict[str, Tensor]:
    task = Task(snapshot(net), {}, round, 0, 1.0, {"clip": plan.clip, "noise": noise})
    worker = copy.deepcopy(net)  # a working copy is overwritten
    strategy = FedAvg() if solver else Rows()
    update, _ = local_update(who, task, Recipe(strategy, lr=1.0, privacy=plan), worker, solver)
    assert len(update.ids) == len(who), "a client was left out"
    return update.sent["delta"]


def server(net: nn.Module, who: Sequence[Client], plan: Privacy, **options) -> Server:
    recipe = {k: options.pop(k) for k in ("strategy", "lr", "epochs", "batch_size") if k in options}
    chunk = options.pop("chunk", None)
    return Server(net, who, Recipe(privacy=plan, **recipe), engine=Local(chunk=chunk), **options)


def flat(tree: dict[str, Tensor]) -> Tensor:
    """[K, ...] stacks -> [K, P]."""
    return torch.cat([v.reshape(len(v), -1) for v in tree.values()], 1)
