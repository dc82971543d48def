"""Clients and what they do in a round: ``local_update`` trains a stack of them.

Behind ``local_update`` stand solvers with one meaning: ``general`` (one client, any module) and
``stacked`` (K clients at once through torch.func). Strategies never know which one ran.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedtorch import seeds, solvers
from fedtorch.batches import length, plan
from fedtorch.losses import Loss, cross_entropy
from fedtorch.optimizers import ClientOptimizer, positive
from fedtorch.privacy import Privacy, SampleLevel
from fedtorch.privacy.gradients import PrivateSteps
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
    privacy: Privacy | None = None
    """SampleLevel, ClientLevel or LocalDP; none: nothing is noised."""

    def __post_init__(self) -> None:
        """Refuse what cannot train, by name."""
        positive("lr", self.lr)
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.optimizer.check()

    @property
    def weighting(self) -> str:
        """How clients are weighed: auto is by examples, and alike where privacy asks for it."""
        chosen = self.strategy.weighting
        return chosen if chosen != "auto" else "uniform" if self.privacy else "examples"


def local_update(
    clients: Sequence[Client],
    task: Task,
    recipe: Recipe,
    model: nn.Module,
    solve: solvers.Solver | None = None,
) -> tuple[Update, list[Failure]]:
    """Train ``clients`` from the global model and return what they send.

    ``model`` is a working copy that is overwritten. Without ``solve`` several clients run side by side
    (stacked) and one alone through the module itself. A client whose result is not finite is a
    Failure, keeps its memory as it was, and is left out of the Update, which may then be empty.
    """
    task = solvers.to_device(task, model)
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    anchor = {k: task.state[k] for k in names}
    device = next(iter(anchor.values())).device
    memory = [c.memory or recipe.strategy.remember(anchor) for c in clients]
    plans, private = _steps(clients, task, recipe)
    ctx = Context(
        anchor=expand(anchor),
        extras={g: expand(e) for g, e in task.extras.items()},
        memory={g: solvers.to(stack([m[g] for m in memory]), device) for g in memory[0]},
        steps=torch.tensor([len(p) for p in plans]),
        lr=task.lr,
    )
    if solve is None:
        alone = len(clients) == 1 and not (private and private.mode == "stacked")
        solve = solvers.general if alone else solvers.stacked
    with seeds.seeded(seeds.derive(task.seed, "visit", task.round, clients[0].id)):
        try:
            trained = solve(model, [c.data for c in clients], plans, task, recipe, ctx, private)
        except Exception as e:
            who = f"client {clients[0].id}" if len(clients) == 1 else f"{len(clients)} clients"
            raise ClientError(f"{who}, round {task.round}: {type(e).__name__}: {e}") from e

    if isinstance(trained, solvers.Implicit) and type(recipe.strategy).upload is Strategy.upload:
        done = _summed(clients, task, recipe, trained, plans)
        if done is not None:
            return done
    # in float64 the delta is exact, so anchor + delta gives back the very weights of the client
    exact = replace(
        ctx,
        anchor=expand({k: task.exact[k] for k in names}),
        extras={g: double(e) for g, e in ctx.extras.items()},
        memory={g: double(m) for g, m in ctx.memory.items()},
    )
    with torch.no_grad():
        params = {k: v.to(torch.float64, copy=True) for k, v in trained.params.items()}
        sent, remembered = recipe.strategy.upload(params, exact)
    buffers = {} if recipe.privacy else trained.buffers  # statistics of the data are never noised
    norms = {g: sq_norms(s) for g, s in sent.items()}
    good = [n.isfinite() for n in norms.values()] + ([finite(buffers)] if buffers else [])
    keep = torch.stack(good).all(0).cpu()
    for k, client in enumerate(clients):
        if keep[k]:
            client.memory = {
                g: {n: v.to(anchor[n].dtype) for n, v in row(m, k).items()}
                for g, m in remembered.items()
            }
    examples = torch.tensor([float(len(c)) for c in clients])
    figures = {
        "train_loss": trained.loss,
        "examples": examples,
        "visited": _visited(plans),
        "steps": ctx.steps.double(),
    }
    if recipe.privacy:
        sent = recipe.privacy.client(sent, examples, task, [c.id for c in clients])
        norms["delta"] = sq_norms(sent["delta"])
        if recipe.privacy.unit == "client":
            # made zero by the plan, and sent: who reports must not depend on anybody's data
            keep = torch.ones_like(keep)
    figures = _told(recipe, figures | {"update_norm": norms["delta"].sqrt().cpu()})
    kept = slice(None) if keep.all() else keep  # a slice is a view, a mask would copy everything
    update = Update(
        ids=tuple(c.id for k, c in enumerate(clients) if keep[k]),
        sent={g: {n: v[kept] for n, v in s.items()} for g, s in sent.items()},
        buffers={n: v[kept] for n, v in buffers.items()},
        weight=_weights(recipe, examples)[kept],
        metrics={name: v[kept] for name, v in figures.items()},
    )
    return update, _failures(clients, keep)


def _told(recipe: Recipe, figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a client's figures that it may tell."""
    privacy = recipe.privacy
    if privacy and privacy.strict and privacy.per_client:
        # nobody else is trusted: what is not noised does not leave
        return {"update_norm": figures["update_norm"]}
    if privacy and privacy.unit == "client":
        # a server takes a figure that is not finite for a broken message, and would leave the client out
        loss = figures["train_loss"]
        return figures | {"train_loss": torch.where(loss.isfinite(), loss, 0)}
    return figures


def _visited(plans: Sequence[Tensor]) -> Tensor:
    return torch.tensor([float((p >= 0).sum()) for p in plans])


def _weights(recipe: Recipe, examples: Tensor) -> Tensor:
    return examples if recipe.weighting == "examples" else torch.ones_like(examples)


def _failures(clients: Sequence[Client], keep: Tensor) -> list[Failure]:
    lost = [c for c, kept in zip(clients, keep.tolist(), strict=True) if not kept]
    return [Failure(c.id, "nonfinite", "its update is not finite") for c in lost]


def _steps(
    clients: Sequence[Client], task: Task, recipe: Recipe
) -> tuple[list[Tensor], PrivateSteps | None]:
    """Which examples each client sees in which step, and what makes the steps private, if anything."""
    privacy = recipe.privacy
    if not isinstance(privacy, SampleLevel):
        order = [seeds.derive(task.seed, "order", task.round, c.id) for c in clients]
        return [plan(len(c), recipe, s) for c, s in zip(clients, order, strict=True)], None
    batches, noise = (
        [privacy.stream(purpose, task.round, c.id) for c in clients]
        for purpose in ("batches", "noise")
    )
    plans = [privacy.batches(len(c), s) for c, s in zip(clients, batches, strict=True)]
    return plans, PrivateSteps(
        task.privacy["clip"],
        task.privacy["noise"],
        privacy.batch_size,
        noise,
        "stacked" if privacy.mode == "auto" else privacy.mode,
        privacy.max_batch,
    )


def _summed(
    clients: Sequence[Client],
    task: Task,
    recipe: Recipe,
    trained: solvers.Implicit,
    plans: Sequence[Tensor],
) -> tuple[Update, list[Failure]] | None:
    """The weighted mean of clients of whom nobody needs to see each alone; None: somebody does."""
    privacy = recipe.privacy
    norms = trained.sq_norms(upper=privacy is not None).cpu().sqrt()
    examples = torch.tensor([float(len(c)) for c in clients])
    part = privacy.shrink(norms, examples, task) if privacy else torch.ones_like(norms)
    if part is None:
        return None
    keep = norms.isfinite()
    figures = {
        "train_loss": trained.loss,
        "examples": examples,
        "visited": _visited(plans),
        "steps": torch.tensor([float(len(p)) for p in plans]),
        "update_norm": torch.where(keep, norms, 0) * part,
    }
    part = torch.where(keep, part, 0)
    if privacy and privacy.unit == "client":
        keep = torch.ones_like(keep)
    figures = _told(recipe, figures)
    weight = _weights(recipe, examples)[keep]
    share = torch.zeros_like(norms)
    share[keep] = weight.double() / weight.sum()
    delta = trained.weighted_sum(share * part) if keep.any() else {}
    update = Update(
        ids=tuple(c.id for k, c in enumerate(clients) if keep[k]),
        sent={"delta": {n: v.double()[None] for n, v in delta.items()}},
        buffers={},
        weight=weight,
        metrics={name: v[keep] for name, v in figures.items()},
        summed=True,
    )
    return update, _failures(clients, keep)


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
