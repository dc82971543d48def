"""Clients: data that stays with its owner. ``training/local_update.py`` is what they do with it."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Sampler

from fedtorch.options import fit
from fedtorch.training.batches import Collate, Collated, Drawn, drawn
from fedtorch.training.datasets import Loader, as_dataset, taken_apart
from fedtorch.types import ConfigError, Params


class Client:
    """One data owner: an id, data that stays here, and memory of a run that never leaves.

    ``data`` is ``(x, y)`` with one row for each example (tensors, NumPy arrays, DataFrames, nestings of
    them), any map-style dataset, or a DataLoader, which is taken apart. ``validation``, of the same kinds,
    is held out of training.
    """

    def __init__(
        self,
        id: str,
        data: Any,
        validation: Any = None,
        *,
        collate: Collate | None = None,
        sampler: Drawn | None = None,
        num_workers: int = 0,
        persons: Sequence[str] | None = None,
    ) -> None:
        """What a DataLoader has, of the client's own.

        ``collate``: a list of examples -> a batch, for examples of unequal size. ``sampler``: ``fn(seed,
        round)`` -> places of the examples that each pass of a visit takes, in order, cut into batches; the
        client weighs as many examples as it has all the same. ``num_workers``: processes that read ahead;
        a dataset that draws at random draws other numbers with them, the same for any number of them.
        ``persons``: whose each example is, by names that mean the same at all clients; the privacy report
        then has what all examples of one person cost together.
        Raises ConfigError when there is no data or its length is unknown.
        """
        self.id = str(fit("the id of a client, which comes before its data,", id, str | int))
        owner = f"client {id!r}"
        # of a DataLoader what it reads, and how
        self.loader: Loader | None = None
        """What the data came in, if it was a DataLoader."""
        if isinstance(data, DataLoader):
            self.loader = found = taken_apart(data, owner)
            if collate is not None and found.collate is not None:
                raise ConfigError(
                    f"{owner}: its DataLoader has a collate_fn already: give one of the two"
                )
            if sampler is not None and found.sampler is not None:
                raise ConfigError(
                    f"{owner}: its DataLoader has a sampler already: give one of the two"
                )
            data, collate = found.dataset, collate or found.collate
            sampler, num_workers = sampler or found.sampler, num_workers or found.num_workers
        if sampler is not None and not (callable(sampler) or isinstance(sampler, Sampler)):
            raise ConfigError(
                f"{owner}: its sampler must be fn(seed, round) -> places of examples, or a torch Sampler, "
                f"got {type(sampler).__name__}"
            )
        # its examples, and those that it holds back
        self.data = as_dataset(data, owner, collate, num_workers)
        if validation is not None:
            own = collate if not isinstance(validation, DataLoader | Collated) else None
            validation = as_dataset(validation, owner, own)
        self.validation = validation
        # whose they are
        self.persons = None if persons is None else _names(persons, owner)
        if self.persons is not None and len(self.persons) != len(self):
            raise ConfigError(
                f"{owner}: persons must name one for each of its {len(self)} examples, got "
                f"{len(self.persons)}"
            )
        self.sampler = sampler
        self.memory: dict[str, Params] = {}

    def apart(self) -> "Client":
        """The same owner for another run, which shares the data and remembers nothing of this one."""
        made = copy.copy(self)
        made.memory = {}
        return made

    def __len__(self) -> int:
        """Number of training examples."""
        return len(self.data)  # type: ignore[arg-type]

    def taken(self) -> int:
        """Number of examples that the first pass takes: all, but for a sampler's."""
        n = len(self)
        return n if self.sampler is None else len(drawn(self.sampler, n, 0, 0))

    def __repr__(self) -> str:
        """Id and size, never data."""
        return f"Client({self.id!r}, {len(self)} examples)"


def _names(persons: Any, owner: str) -> list[str]:
    """Whose each example is, from a list, an array or a column; raises ConfigError for what is no name."""
    found = persons if isinstance(persons, str) else getattr(persons, "tolist", lambda: persons)()
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise ConfigError(
            f"{owner}: persons must be a list of names, one for each example, got {persons!r:.50}"
        )
    found = list(found)
    for one in found:
        if not isinstance(one, str | int) and not (isinstance(one, float) and one.is_integer()):
            raise ConfigError(
                f"{owner}: persons must be texts or whole numbers, that mean the same at all clients, got "
                f"{one!r:.50}"
            )
    return [str(one) for one in found]
