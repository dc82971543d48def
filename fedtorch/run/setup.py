"""From names and numbers of a config to the clients, loss and metrics of a run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torch.utils.data import Dataset

from fedtorch.checks.outputs import metrics_fit
from fedtorch.client import Client
from fedtorch.data import Partition, prepared
from fedtorch.data import partition as cut
from fedtorch.data.base import Data, subset
from fedtorch.data.content import coins
from fedtorch.data.prepared import Prepared
from fedtorch.options import find, near
from fedtorch.privacy import Nothing, Privacy, columns
from fedtorch.run import files
from fedtorch.server import Server
from fedtorch.training import losses
from fedtorch.training.evaluate import Judge, evaluate, evaluate_clients
from fedtorch.training.losses import Loss
from fedtorch.training.metrics import NAMES, known
from fedtorch.types import ConfigError


def settled(
    data: Data, ids: Sequence[str], parts: Sequence[Tensor], plan: Privacy, kept: Prepared | None
) -> Data:
    """The data as they are trained on: scaled by statistics of ``plan``, where they ask for some.

    ``kept``: the preparation of the run that goes on, which is taken in their place: nothing is released
    twice. Raises ConfigError where rows that a plan protects decided of the preparation.
    """
    if plan.claims:
        prepared.covered(data.preparation)
    if data.asks is None:
        if plan.statistics_noise:
            raise ConfigError(
                "privacy.statistics_noise pays for statistics of columns, but the data ask for none: leave "
                "it out, or give --dataset.standardize private"
            )
        return data
    if not plan.claims:
        raise ConfigError(
            "dataset.standardize private needs a privacy plan, which pays for it; without one give "
            "--dataset.standardize true"
        )
    if kept is not None:
        return data.asks.settled(kept.preparation)
    asks, rows = data.asks, [data.asks.rows[part.numpy()] for part in parts]
    center, width, warning = columns.released(plan, asks.kind, asks.bounds, rows, ids)
    return asks.answer(center.tolist(), width.tolist(), warning)


def divide(
    data: Data,
    partition: Partition | None = None,
    count: int | None = None,
    *,
    plan: Privacy = Nothing(),
    validation: float = 0.0,
    seed: int = 0,
) -> tuple[list[Client], Dataset]:
    """Clients and the central test set of loaded data, cut as the command cuts them.

    ``count``: number of clients. ``plan``: the recipe's, where the data are to be scaled by private
    statistics (``standardize="private"``). Each call releases them, and the ``Server`` charges once: divide
    once for each server. Raises ConfigError where the data cannot be cut so.
    """
    ids, parts = cut(data, partition, count, seed)
    data = settled(data, ids, parts, plan, None)
    return clients(data, ids, parts, validation, seed, plan.claims), data.test


def clients(
    data: Data,
    ids: Sequence[str],
    parts: Sequence[Tensor],
    validation: float,
    seed: int,
    private: bool = False,
) -> list[Client]:
    """Cut the training data into clients, each with its own validation share if asked.

    About ``validation`` of a client's examples are held out, each by a coin of its own (``content``). A
    client whose every coin falls so trains on all of them and has no validation data, but not in a
    ``private`` run, where one more example may move no other: ConfigError.
    """
    out = coins(data.train, seed, "validation") < validation if validation else None
    made = []
    for name, index in zip(ids, parts, strict=True):
        held = None
        if out is not None:
            kept, held_out = index[~out[index]], index[out[index]]
            if len(kept) and len(held_out):
                index, held = kept, subset(data.train, held_out)
            elif private and not len(kept):
                raise ConfigError(
                    f"client {name}: all of its {len(index)} examples fall into its validation share of "
                    f"{validation:g}, and none is left to train on: take fewer clients, a smaller "
                    "--validation or another --seed"
                )
        own = [data.persons[i] for i in index.tolist()] if data.persons else None
        made.append(Client(name, subset(data.train, index), held, persons=own))
    return made


def loss_and_metrics(kind: str, loss: str, metrics: Sequence[str]) -> tuple[Loss, dict[str, Loss]]:
    """The loss, and the metrics by name with the loss among them; ``auto`` follows the data's kind."""
    default_loss, default_metric = losses.DEFAULTS[kind]
    loss = default_loss if loss == "auto" else loss
    made = losses.LOSSES.get(loss) or imported("loss", loss, losses.LOSSES)
    names = [default_metric if m == "auto" else m for m in metrics]
    chosen = {n.rpartition(":")[2]: known(n) or imported("metric", n, NAMES) for n in names}
    return made, {"loss": made, **chosen}


def imported(role: str, name: str, others: Iterable[str]) -> Loss:
    """A loss or metric of a user's own: a function, or a class such as torch.nn:HuberLoss made once."""
    if ":" not in name and "." not in name:
        raise ConfigError(
            f"unknown {role} {name!r}; there are {', '.join(others)}, or give package.module:function"
            f"{near(name, others)}"
        )
    found = find(name)
    fits = issubclass(found, nn.Module) if isinstance(found, type) else callable(found)
    if not fits:
        raise ConfigError(
            f"{name!r} is no {role}: it must be a function or a subclass of nn.Module"
        )
    return cast(Loss, found() if isinstance(found, type) else found)


def check(
    server: Server,
    data: Data,
    clients: Sequence[Client],
    metrics: Mapping[str, Loss],
    judge: Judge | None = None,
) -> None:
    """Refuse, before anything is trained, a model that cannot be saved and metrics that do not fit."""
    files.savable(server.model)
    if judge is not None:
        evaluate(server.model, data.test, metrics, step=judge)
        return
    if whole := metrics_fit(server.model, data.test, metrics):
        evaluate(server.model, data.test, whole)
        evaluate_clients(server.model, clients, whole, told=lambda why: None)
