"""What depends on the clients' data alone, and is kept from round to round."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch.fast.ops import Lean, Matrix, Ops
from fedtorch.fast.tuning import AGAIN, CHUNKS_KEPT, LEFT_OUT, SPARSE_RATE
from fedtorch.training.module import channels_last
from fedtorch.tree import exact_sq_norms, nbytes


@dataclass(frozen=True)
class Part:
    """One client's examples, and what is found of them once for all chunks that it is in."""

    x: Tensor
    """[n, in]."""
    ops: Ops

    @cached_property
    def used(self) -> Tensor:
        """Which inputs are not 0 in all examples, [in]."""
        return self.x.abs().amax(0) != 0

    @cached_property
    def filled(self) -> int:
        """Numbers that are not 0."""
        return int(self.x.count_nonzero())

    @cached_property
    def finite(self) -> bool:
        """As of ``Rows``."""
        return bool(self.x.square().sum(1).isfinite().all())

    @cached_property
    def pair(self) -> tuple[Lean, Lean] | None:
        """The examples, and the same transposed, without zeros."""
        found = [self.ops.sparse(x, x.numel() + 1) for x in (self.x, self.x.T)]
        return (found[0], found[1]) if found[0] and found[1] else None


@dataclass(frozen=True)
class Below:
    """Matrices one below the other."""

    parts: Sequence[Matrix]

    def times(self, dense: Tensor, start: Tensor | None = None) -> Tensor:
        """Each with all of the other."""
        dense = dense.contiguous()  # a transposed weight would be written out for each of them
        return torch.cat([part.times(dense, start) for part in self.parts])


@dataclass(frozen=True)
class Beside:
    """Matrices side by side, of so many columns each."""

    parts: Sequence[Lean]
    columns: Sequence[int]

    def times(self, dense: Tensor, start: Tensor | None = None) -> Tensor:
        """Each with its rows of the other, added up in the order of one matrix."""
        first, *rest = zip(self.parts, dense.split([*self.columns]), strict=True)
        out = first[0].times(first[1], start)
        for part, rows in rest:
            part.add_to(out, rows)
        return out


@dataclass(frozen=True)
class Rows:
    """The examples of a chunk of clients, one below the other."""

    tables: Sequence[Tensor]
    """Each client's, [n, ...], wherever they are."""
    y: Tensor
    """All labels."""
    sizes: tuple[int, ...]
    """Examples of each client."""
    ops: Ops = field(default_factory=Ops)
    parts: tuple[Part, ...] = ()
    """Each client's by themselves."""
    often: bool = False
    """Whether they come together often: a chunk that comes once is not worth a look at all of it."""

    @cached_property
    def x(self) -> Tensor:
        """[N, ...]: all examples, written out where something asks for them as one."""
        return torch.cat([*self.tables]).to(self.y.device)

    @cached_property
    def flat(self) -> Tensor:
        """[N, in]."""
        return self.x.flatten(1)

    @property
    def width(self) -> int:
        """Inputs of an example."""
        return self.tables[0][0].numel()

    @cached_property
    def starts(self) -> Tensor:
        """Each client's first row, [K, 1], on the CPU."""
        return torch.tensor([0, *accumulate(self.sizes[:-1])])[:, None]

    @cached_property
    def classes(self) -> int:
        """How many classes there are at least, of which each label is one; 0: labels are something else.

        One of -100 is none, as cross entropy leaves it out.
        """
        plain = self.y.dtype == torch.int64 and self.y.dim() == 1
        return int(self.y.max()) + 1 if plain and bool((self.y >= 0).all()) else 0

    @cached_property
    def images(self) -> Tensor:
        """The examples as convolutions want them."""
        return channels_last(self.x)

    @cached_property
    def used(self) -> Tensor | None:
        """Places of inputs that are not 0 in some example; None: to leave out the others would not pay."""
        if self.parts:
            used = torch.stack([p.used for p in self.parts]).any(0).nonzero()[:, 0]
        else:
            used = self.flat.abs().amax(0).nonzero()[:, 0]
        return used if len(used) <= self.width * (1 - LEFT_OUT) else None

    @cached_property
    def slim(self) -> Tensor:
        """[N, used inputs]."""
        return self.flat if self.used is None else self.flat.index_select(1, self.used)

    @cached_property
    def half(self) -> Tensor:
        """The same in bfloat16."""
        return self.slim.bfloat16()

    @cached_property
    def sparse(self) -> tuple[Matrix, Matrix] | None:
        """The examples, and the same transposed, where products are faster without each single zero.

        Only of finite examples: what is not finite must not meet rows that stay out, even as zeros.
        """
        columns = self.width if self.used is None else len(self.used)
        most = len(self.y) * columns / SPARSE_RATE
        if self.parts and self.finite and not self.often:
            few = sum(p.filled for p in self.parts) < most
            pairs = [p.pair for p in self.parts if few and p.pair]
            if len(pairs) < len(self.parts):
                return None
            return Below([x for x, _ in pairs]), Beside([t for _, t in pairs], self.sizes)
        pair = [self.finite and self.ops.sparse(x, most) for x in (self.flat, self.flat.T)]
        return (pair[0], pair[1]) if pair[0] and pair[1] else None

    def near(self, weight: Tensor) -> Tensor:
        """What of a weight [out, in] meets anything but zeros."""
        return weight if self.used is None else weight.index_select(1, self.used)

    def back(self, D: Tensor, half: bool, stay: Tensor | None = None) -> Tensor:
        """D^T X for D [N, out], [out, in]; ``half``: in bfloat16.

        ``stay``: only with these rows, as the others, of which D's are 0, may not be finite.
        """
        if self.sparse is not None:
            return self.sparse[1].times(D).T.contiguous()
        x = self.half if half else self.slim
        D, x = (D, x) if stay is None else (D[stay], x[stay])
        product = (D.bfloat16().T @ x).float() if half else D.T @ x
        if self.used is None:
            return product
        out = product.new_zeros(len(product), self.flat.shape[1])
        return out.scatter_(1, self.used.expand_as(product), product)

    @cached_property
    def finite(self) -> bool:
        """Whether all products of examples are finite: one that is not would spread to all others.

        By Cauchy and Schwarz they are where the squares are.
        """
        if self.parts:
            return all(p.finite for p in self.parts)
        return bool(self.flat.square().sum(1).isfinite().all())

    @cached_property
    def sq_lengths(self) -> Tensor:
        """Squared norm of each example, [N], float64."""
        return exact_sq_norms(self.x)

    @cached_property
    def most(self) -> int:
        """Examples of the largest client."""
        return max(self.sizes)

    @cached_property
    def place(self) -> Tensor | None:
        """Where each example stands in [K * most], [N]; None where all clients are equally large."""
        if len(set(self.sizes)) == 1:
            return None
        at = torch.cat([k * self.most + torch.arange(n) for k, n in enumerate(self.sizes)])
        return at.to(self.y.device)

    def spread(self, flat: Tensor) -> Tensor:
        """[N, ...] -> [K, most, ...], zero where a client has no example."""
        K = len(self.sizes)
        if self.place is None:
            return flat.view(K, self.most, *flat.shape[1:])
        out = flat.new_zeros(K * self.most, *flat.shape[1:])
        return out.index_copy_(0, self.place, flat).view(K, self.most, *flat.shape[1:])

    def gather(self, spread: Tensor) -> Tensor:
        """[K, most, ...] -> [N, ...]."""
        flat = spread.flatten(0, 1)
        return flat if self.place is None else flat[self.place]


def taken(table: Tensor, index: Tensor) -> Tensor:
    """Rows of [N, ...] at [K, T], [K, T, ...]; plain indexing takes five times as long."""
    return table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])


@dataclass
class Kept:
    """Chunks of data and Gram matrices, each kept while its client's tensors are what they were."""

    used: int = 0
    chunks: dict[tuple[int, ...], tuple[list[Tensor], list[int], Rows]] = field(
        default_factory=dict
    )
    times: Counter[int] = field(default_factory=Counter)
    """How often each chunk has come, by a hash: there may be as many as rounds. No bits hang on it."""
    grams: "Made" = field(default_factory=dict)
    bases: "Made" = field(default_factory=dict)
    parts: dict[int, tuple[Tensor, int, Part]] = field(default_factory=dict)
    """By the id of a client's examples, with those and their version."""

    turned: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)
    """Weights of the last call with several models, with their versions, and transposed."""

    def __getstate__(self) -> dict[str, object]:
        """A worker is sent none of it: data stays where it is."""
        return Kept().__dict__

    def rows(
        self, datasets: Sequence[Dataset], device: torch.device, ops: Ops | None = None
    ) -> Rows:
        """The examples of these clients; by torch where no ``ops`` are given."""
        tables = [d.tensors for d in cast(Sequence[TensorDataset], datasets)]
        parts = [t for table in tables for t in table]
        key, versions = tuple(map(id, parts)), [*map(version, parts)]
        found, at = self.chunks.get(key), hash(key)
        times = self.times[at] = self.times[at] + 1
        if found and found[1] == versions:
            if times == AGAIN and found[2].parts:  # one matrix from now on, with the same bits
                self.chunks[key] = parts, versions, replace(found[2], often=True)
            return self.chunks[key][2]
        x, y = (tuple(t[i] for t in tables) for i in (0, 1))
        # how it is computed with must not depend on what came before: a resumed run begins with nothing
        whole = ops or Ops()
        each = tuple(self._part(t[0], device, whole) for t in tables) if len(tables) > 1 else ()
        sizes = tuple(len(t) for t in x)
        rows = Rows(x, torch.cat(y).to(device), sizes, whole, each)
        # who takes part by chance comes together once
        if found or (times > 1 and self._room(3 * nbytes(x))):
            self.chunks[key] = parts, versions, rows
        return rows

    def _part(self, x: Tensor, device: torch.device, ops: Ops) -> Part:
        found = self.parts.get(id(x))
        if found and found[1] == version(x) and type(found[2].ops) is type(ops):
            return found[2]
        part = Part(x.flatten(1).to(device), ops)
        if found or self._room(x.numel() * x.element_size()):
            self.parts[id(x)] = x, version(x), part
        return part

    def transposed(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights written out by columns; of models that are under way most come again."""
        before = {id(w): t for w, at, t in self.turned if at == version(w)}
        found = [before[id(w)] if id(w) in before else w.T.contiguous() for w in weights]
        few = nbytes(found) <= CHUNKS_KEPT
        versions = [version(w) for w in weights]
        self.turned = [*zip(weights, versions, found, strict=True)] if few else []
        return found

    def gram(self, dataset: Dataset, bias: bool, device: torch.device) -> Tensor:
        """Products of a client's examples with each other, [n, n]; the bias is a column of ones."""
        return self._once(self.grams, dataset, device, lambda x: ((x @ x.T).add_(float(bias)),))[0]

    def basis(self, dataset: Dataset, bias: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """Householder's X^T = Q R of a client's rows: an orthonormal Q [in (+ 1), m] and R [m, n]."""

        def factors(x: Tensor) -> tuple[Tensor, ...]:
            wide = torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x
            return tuple(torch.linalg.qr(wide.T))

        q, r = self._once(self.bases, dataset, device, factors)
        return q, r

    def stacked(self, matrices: Sequence[Tensor], rows: Rows) -> Tensor:
        """A matrix of each client as one tensor, padded with zeros where a client has fewer examples."""
        if rows.place is None:
            return torch.stack(list(matrices))
        size = [max(m.shape[i] for m in matrices) for i in (0, 1)]
        out = matrices[0].new_zeros(len(matrices), *size)
        for k, m in enumerate(matrices):
            out[k, : m.shape[0], : m.shape[1]] = m
        return out

    def _once(
        self,
        kept: "Made",
        dataset: Dataset,
        device: torch.device,
        make: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        x = cast(TensorDataset, dataset).tensors[0]
        found = kept.get(id(x))
        if found and found[1] == version(x):
            return found[2]
        made = make(x.flatten(1).to(device))
        if found or self._room(sum(m.numel() * m.element_size() for m in made)):
            kept[id(x)] = x, version(x), made
        return made

    def _room(self, size: int) -> bool:
        if self.used + size > CHUNKS_KEPT:  # made anew in every visit
            return False
        self.used += size
        return True


Made = dict[int, tuple[Tensor, int, tuple[Tensor, ...]]]
"""By a tensor's id: the tensor, its version, and what was made of it."""


def version(t: Tensor) -> int:
    """Counts the changes made to a tensor in place; inference tensors cannot be changed."""
    return 0 if t.is_inference() else t._version
