"""Clients and what they do in a round: ``local_update`` trains a stack of them.

Behind ``local_update`` stand solvers with one meaning: ``general`` (one client, any module) and
``stacked`` (K clients at once through torch.func). Strategies never know which one ran.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds, solvers
from fedtorch.batches import length, plan
from fedtorch.losses import Loss, cross_entropy
from fedtorch.optimizers import ClientOptimizer, positive
from fedtorch.strategies import FedAvg, Strategy
from fedtorch.tree import double, expand, finite, row, sq_norms, stack
from fedtorch.types import ClientError, ConfigError, Context, Failure, Params, Task, Update


class Client:
    """One data owner: an id, data that stays here, and memory that never leaves.

    ``data`` is ``(x, y)`` tensors with one row for each example, or any map-style
    ``torch.utils.data.Dataset`` of ``(x, y)`` pairs. ``validation`` is held out of training.
    """

    def __init__(
        self,
        id: str,
        data: Dataset | tuple[Tensor, ...],
        validation: Dataset | tuple[Tensor, ...] | None = None,
    ) -> None:
        """Raises ConfigError when there is no data or its length is unknown."""
        self.id = str(id)
        self.data = as_dataset(data, f"client {id!r}")
        self.validation = None if validation is None else as_dataset(validation, f"client {id!r}")
        self.memory: dict[str, Params] = {}

    def __len__(self) -> int:
        """Number of training examples."""
        return length(self.data)

    def __repr__(self) -> str:
        """Id and size, never data."""
        return f"Client({self.id!r}, {len(self)} examples)"


@dataclass(frozen=True)
class Recipe:
    """How every client trains in a visit, and how their work is combined."""

    strategy: Strategy = FedAvg()
    loss: Loss = cross_entropy
    optimizer: ClientOptimizer = field(default_factory=ClientOptimizer)
    lr: float = 0.1
    """Client learning rate before the schedule."""
    epochs: int = 1
    """Passes over the client's data in one visit."""
    steps: int | None = None
    """Optimizer steps in one visit; given, it takes the place of epochs."""
    batch_size: int | None = 32
    """Examples in a local step; None: all of the client's at once."""
    drop_last: bool = False
    """Leave out the last, smaller batch of each pass (clients smaller than a batch keep theirs)."""

    def __post_init__(self) -> None:
        """Refuse what cannot train, by name."""
        positive("lr", self.lr)
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.optimizer.check()


def local_update(
    clients: Sequence[Client], task: Task, recipe: Recipe, model: nn.Module
) -> tuple[Update, list[Failure]]:
    """Train ``clients`` from the global model and return what they send.

    ``model`` is a working copy that is overwritten. Several clients run side by side (stacked), one
    alone runs through the module itself. A client whose result is not finite is a Failure, keeps its
    memory as it was, and is left out of the Update, which may then be empty.
    """
    task = solvers.to_device(task, model)
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    anchor = {k: task.state[k] for k in names}
    device = next(iter(anchor.values())).device
    memory = [c.memory or recipe.strategy.remember(anchor) for c in clients]
    plans = [
        plan(len(c), recipe, seeds.derive(task.seed, "order", task.round, c.id)) for c in clients
    ]
    ctx = Context(
        anchor=expand(anchor),
        extras={g: expand(e) for g, e in task.extras.items()},
        memory={g: solvers.to(stack([m[g] for m in memory]), device) for g in memory[0]},
        steps=torch.tensor([len(p) for p in plans]),
        lr=task.lr,
    )
    solve = solvers.general if len(clients) == 1 else solvers.stacked
    with seeds.seeded(seeds.derive(task.seed, "visit", task.round, clients[0].id)):
        try:
            trained = solve(model, [c.data for c in clients], plans, task, recipe, ctx)
        except Exception as e:
            who = f"client {clients[0].id}" if len(clients) == 1 else f"{len(clients)} clients"
            raise ClientError(f"{who}, round {task.round}: {type(e).__name__}: {e}") from e

    # in float64 the delta is exact, so anchor + delta gives back the very weights of the client
    exact = Context(
        double(ctx.anchor),
        {g: double(e) for g, e in ctx.extras.items()},
        {g: double(m) for g, m in ctx.memory.items()},
        ctx.steps,
        ctx.lr,
    )
    with torch.no_grad():
        sent, remembered = recipe.strategy.upload(double(trained.params), exact)
    groups = [*sent.values(), *([trained.buffers] if trained.buffers else [])]
    keep = torch.stack([finite(g) for g in groups]).all(0).cpu()
    failures = []
    for k, client in enumerate(clients):
        if keep[k]:
            client.memory = {
                g: {n: v.to(anchor[n].dtype) for n, v in row(m, k).items()}
                for g, m in remembered.items()
            }
        else:
            failures.append(Failure(client.id, "nonfinite", "its update is not finite"))
    examples = torch.tensor([float(len(c)) for c in clients])
    update = Update(
        ids=tuple(c.id for k, c in enumerate(clients) if keep[k]),
        sent={g: {n: v[keep] for n, v in s.items()} for g, s in sent.items()},
        buffers={n: v[keep] for n, v in trained.buffers.items()},
        weight=(examples if recipe.strategy.weighting == "examples" else examples * 0 + 1)[keep],
        metrics={
            "train_loss": trained.loss[keep],
            "examples": examples[keep],
            "steps": ctx.steps.double()[keep],
            "update_norm": sq_norms(sent["delta"]).sqrt().cpu()[keep],
        },
    )
    return update, failures


def as_dataset(data: Dataset | tuple[Tensor, ...], owner: str) -> Dataset:
    """Tensors or a map-style dataset -> a dataset of known, positive length."""
    if isinstance(data, (tuple, list)):
        if not all(isinstance(t, Tensor) and t.dim() for t in data):
            kinds = ", ".join(type(t).__name__ for t in data)
            raise ConfigError(
                f"{owner}: data must be tensors (x, y) with one row each, got {kinds}"
            )
        sizes = [len(t) for t in data]
        if len(set(sizes)) != 1:
            raise ConfigError(f"{owner}: tensors of different lengths {sizes}")
        data = TensorDataset(*data)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{owner}: {type(data).__name__} is not map-style (it needs __len__ and __getitem__)"
        )
    if length(data) == 0:
        raise ConfigError(f"{owner} has no examples; leave it out")
    return data
