"""Cut the training examples into clients: seeded, and lossless (each example exactly once)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.data.base import Data
from fedtorch.options import COUNT, POSITIVE, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Base; ``assign`` gives each example its client."""

    needs_labels = False
    needs_keys = False

    def __post_init__(self) -> None:
        """Refuse a concentration that no Dirichlet has, and clients without shards."""
        check(self, "partition", alpha=POSITIVE, per_client=COUNT)

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Client number of each example, [N]."""
        raise ConfigError(f"{type(self).__name__} does not assign; choose iid, dirichlet, ...")


@dataclass(frozen=True, kw_only=True)
class Iid(Partition):
    """Shuffle and deal out evenly."""

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Sizes differ by one at most."""
        return rng.permutation(np.arange(len(labels)) % clients)


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partition):
    """Each class is spread over clients by its own Dirichlet draw (Hsu et al. 2019, 1909.06335)."""

    alpha: float = 0.5
    """Concentration: small is very skewed, large is iid."""
    needs_labels = True

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Class by class; a client left empty is given one example of the largest."""
        owner = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            index = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, self.alpha))
            owner[index] = np.repeat(np.arange(clients), _whole_sizes(shares, len(index)))
        return _fill_empty(owner, clients)


@dataclass(frozen=True, kw_only=True)
class Shards(Partition):
    """Sort by class, cut into shards, give each client some (McMahan et al. 2017, sec. 3)."""

    per_client: int = 2
    """Shards, and so about the most classes, a client gets."""
    needs_labels = True

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Shards differ in size by one at most."""
        if clients * self.per_client > len(labels):
            raise ConfigError(
                f"{clients} clients x {self.per_client} shards are more than the "
                f"{len(labels)} examples: lower clients or partition.per_client"
            )
        order = rng.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        owners = rng.permutation(np.repeat(np.arange(clients), self.per_client))
        owner = np.empty(len(labels), np.int64)
        for client, shard in zip(owners, np.array_split(order, len(owners)), strict=True):
            owner[shard] = client
        return owner


@dataclass(frozen=True, kw_only=True)
class QuantitySkew(Partition):
    """Sizes follow one Dirichlet draw; labels stay iid (Li et al. 2022, arXiv:2102.02079)."""

    alpha: float = 0.5
    """Concentration: small gives a few clients nearly everything."""

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """A client left empty is given one example of the largest."""
        sizes = _whole_sizes(rng.dirichlet(np.full(clients, self.alpha)), len(labels))
        return _fill_empty(rng.permutation(np.repeat(np.arange(clients), sizes)), clients)


@dataclass(frozen=True, kw_only=True)
class Natural(Partition):
    """By the data's own owners (speakers, hospitals, a client column), each kept whole."""

    needs_keys = True

    def assign(
        self, labels: np.ndarray, keys: Sequence[str], clients: int, rng: np.random.Generator
    ) -> np.ndarray:
        """With fewer clients than owners, owners share: the largest first, to the least loaded."""
        names, index, sizes = np.unique(np.array(keys), return_inverse=True, return_counts=True)
        if clients > len(names):
            raise ConfigError(
                f"{clients} clients asked for, but the data has {len(names)} owners: lower clients, or "
                "take another partition"
            )
        load, of = np.zeros(clients, np.int64), np.empty(len(names), np.int64)
        for n in np.argsort(-sizes, kind="stable"):
            of[n] = load.argmin()
            load[of[n]] += sizes[n]
        return of[index]


def partition(
    data: Data, how: Partition | None, clients: int | None, seed: int
) -> tuple[list[str], list[Tensor]]:
    """Client ids and each one's example indices. Raises ConfigError where ``how`` cannot be done.

    With no ``how``: by owner where the data names owners, else Dirichlet over labels, else iid.
    """
    if how is None:
        how = Natural() if data.keys else Dirichlet() if data.labels is not None else Iid()
    n = len(data.train)  # type: ignore[arg-type]
    name = type(how).__name__.lower()
    if how.needs_labels and data.labels is None:
        raise ConfigError(
            f"partition {name} needs class labels, which {data.name} has not: use iid"
        )
    if how.needs_keys and data.keys is None:
        raise ConfigError(f"partition natural needs owners, and {data.name} names none: use iid")
    if clients is None:
        clients = len(set(data.keys or ())) if how.needs_keys else 10
    if clients < 1:
        raise ConfigError(f"clients must be at least 1, got {clients}")
    if clients > n:
        raise ConfigError(
            f"{clients} clients are more than the {n} training examples: lower clients"
        )
    labels = np.zeros(n, np.int64) if data.labels is None else data.labels.numpy()
    rng = np.random.default_rng(seeds.derive(seed, "partition"))
    owner = how.assign(labels, data.keys or (), clients, rng)
    order = np.argsort(owner, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(owner, minlength=clients))[:-1])
    ids = [str(k) for k in range(clients)]
    if how.needs_keys and data.keys is not None and clients == len(set(data.keys)):
        ids = [str(data.keys[p[0]]) for p in parts]
    return ids, [torch.from_numpy(p) for p in parts]


def _whole_sizes(shares: np.ndarray, n: int) -> np.ndarray:
    # cumulative rounding: sizes are whole, never negative, and add up to n
    return np.diff(np.round(np.cumsum(np.append(0.0, shares)) * n / shares.sum()).astype(np.int64))


def _fill_empty(owner: np.ndarray, clients: int) -> np.ndarray:
    # one sort serves all: the largest gives its examples in their order, and is never one just filled
    sizes = np.bincount(owner, minlength=clients)
    order, next_of = np.argsort(owner, kind="stable"), np.cumsum(sizes) - sizes
    for k in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        owner[order[next_of[largest]]] = k
        next_of[largest] += 1
        sizes[largest] -= 1
        sizes[k] = 1
    return owner
