"""What K clients sent of one group, as vectors, read in blocks of columns; and distances between them.

All of it in float64 would be several copies of K models. A rule needs either a few columns at a time, or
no more than how far the vectors are from each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedtorch.types import Params, Stack

CELLS = 1 << 19
"""Numbers of a block in float64: what a rule needs beside the updates stays small."""

CANCELS = 1e6
"""How much longer, squared, than their distances vectors may be: ten digits of float64 are left."""


TRIED = 1 << 10
"""Columns of each name that tell whether a vector is far from all others."""


@dataclass(frozen=True)
class Table:
    """Vectors of clients, or mixtures of them, and one more to which a rule may compare them."""

    parts: dict[str, list[Tensor]]
    """By name, as they arrived: each [k, ...]."""
    order: Tensor
    """Places of the clients that count, in the order of their ids."""
    reference: Params | None = None
    """In float64; what it lacks is zero."""
    mix: Tensor | None = None
    """[rows, clients]: each row is that mixture of clients; none: each client is a row."""
    before: "Table | None" = None
    """The clients that were mixed."""

    def __len__(self) -> int:
        """Rows, without the reference."""
        return len(self.order) if self.mix is None else len(self.mix)

    def blocks(self, first: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Some columns of one name at a time: [rows + 1, columns] in float64, the reference last.

        ``first``: so many columns of each name and no more.
        """
        count = len(self.order)
        width = max(1, CELLS // (count + 1))
        for name, parts in self.parts.items():
            flat = [row for p in parts for row in p.reshape(len(p), p[0].numel())]
            rows = [flat[k] for k in self.order]
            beside = (self.reference or {}).get(name, torch.zeros(len(rows[0]))).reshape(-1)
            end = len(rows[0]) if first is None else min(first, len(rows[0]))
            for at in range(0, end, width):
                to = min(at + width, end)
                block = torch.zeros(count + 1, to - at, dtype=torch.float64)
                for into, row in zip(block, rows, strict=False):
                    into.copy_(row[at:to])
                block[-1] = beside[at:to]
                if self.mix is not None:
                    block = torch.cat([self.mix @ block[:-1], block[-1:]])
                yield name, block

    def each(self, make: Callable[[Tensor], Tensor]) -> Params:
        """What ``make`` makes of every block, put together: [rows + 1, columns] -> [columns]."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        for name, block in self.blocks():
            found[name].append(make(block))
        empty = torch.zeros(0, dtype=torch.float64)
        return {
            n: torch.cat([empty, *f]).view(self.parts[n][0].shape[1:]) for n, f in found.items()
        }

    def mixed(self, mix: Tensor) -> "Table":
        """Mixtures of these clients in their place; each row of ``mix`` sums to 1."""
        return Table(self.parts, self.order, self.reference, mix, self)

    def whole(self) -> Stack:
        """All rows at once, [rows, ...] in float64."""
        rows = {n: torch.cat(parts)[self.order].double() for n, parts in self.parts.items()}
        if self.mix is None:
            return rows
        mix = self.mix
        return {n: torch.tensordot(mix, v, 1) for n, v in rows.items()}

    @cached_property
    def points(self) -> Tensor:
        """Rows and reference as points of few axes, [rows + 1, axes], that lie to each other as they do.

        A scalar product loses a distance among long vectors, so one of the rows is taken off first; where
        that one was far from the others, one in their middle.
        """
        if self.before is not None and self.mix is not None:
            points = self.before.points
            return torch.cat([self.mix @ points[:-1], points[-1:]])
        origin = _better(0, self._products(0, TRIED))  # a look at some columns spares a second pass
        products = self._products(origin)
        if (middle := _better(origin, products)) != origin:
            products = self._products(middle)
        length = products.diagonal().clamp(min=0).sqrt()
        scale = torch.where(length > 0, length, 1)  # a long row must not cost the short ones digits
        value, vector = torch.linalg.eigh(products / scale / scale[:, None])
        found: Tensor = length[:, None] * vector * value.clamp(min=0).sqrt()
        return found

    def _products(self, origin: int, first: int | None = None) -> Tensor:
        total = torch.zeros(len(self) + 1, len(self) + 1, dtype=torch.float64)
        for _, block in self.blocks(first):
            block -= block[origin].clone()
            total.addmm_(block, block.T)
        return total


def _better(origin: int, products: Tensor) -> int:
    """The row to take off: one in the middle where ``origin`` is far from it, else ``origin``."""
    apart = squares(products)
    middle = int(apart.median(1).values.argmin())
    return middle if apart[origin, middle] > CANCELS * apart[middle].median() else origin


def squares(products: Tensor) -> Tensor:
    """Scalar products [n, n] -> squared distances."""
    own = products.diagonal()
    return (own + own[:, None] - 2 * products).clamp(min=0)


def distances(points: Tensor) -> Tensor:
    """Between all pairs, [n, n], by subtraction."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
