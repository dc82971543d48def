"""Arithmetic on ``dict[str, Tensor]``, with or without the leading client axis."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.types import Params, Stack

SHORT = 1 << 14
"""Numbers a row up to which all rows go in one call."""

IN_CACHE = 1 << 16
"""Numbers at a time that pass through memory once."""

SQUARES = 128
"""Numbers of a row whose squares float32 adds up, so that the sum errs by a few millionths at most."""


def tmap(fn: Callable[..., Tensor], *trees: Params) -> Params:
    """Apply ``fn`` name by name; every tree must hold the names of the first."""
    return {k: fn(*(t[k] for t in trees)) for k in trees[0]}


def stack(trees: Sequence[Params]) -> Stack:
    """K models -> one stack, [K, ...]."""
    return {k: torch.stack([t[k] for t in trees]) for k in trees[0]}


def expand(params: Params) -> Stack:
    """One model -> a view with a client axis of 1, which broadcasts against any K."""
    return {k: v.unsqueeze(0) for k, v in params.items()}


def row(tree: Stack, k: int) -> Params:
    """Client k of a stack."""
    return {name: v[k] for name, v in tree.items()}


def vector(values: Sequence[float] | np.ndarray, dtype: type = np.float64) -> Tensor:
    """A number for each client, [K]: as ``torch.tensor``, whose first call of a round takes 40 us."""
    return torch.from_numpy(np.array(values, dtype))


def place(t: Tensor) -> int:
    """Where the memory begins that it is a part of."""
    return t.untyped_storage().data_ptr()


def split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Params:
    """[..., numbers] -> tensors by name, [..., shape], that share its memory."""
    parts, lead = flat.split([s.numel() for s in shapes.values()], -1), flat.shape[:-1]
    return {n: p.view(lead + s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


def per_client(values: Tensor, like: Tensor) -> Tensor:
    """[K] -> [K, 1, ...] so that it broadcasts over ``like`` [K, ...]."""
    return values.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


def sq_norms(tree: Stack) -> Tensor:
    """Squared L2 norm of each client's tensors together, [K], in float64."""
    return torch.stack([dots(v.double()) for v in tree.values()]).sum(0)


def same(new: Tensor, old: Tensor) -> Tensor:
    """True where two tensors hold the same number; NaN equals NaN."""
    return (new == old) | (new.isnan() & old.isnan())


def alike(new: Tensor, old: Tensor) -> bool:
    """Whether two tensors of one shape hold the same."""
    return torch.equal(new, old) or bool(same(new, old).all())


def moving(stack: Stack, start: Params) -> Stack:
    """Those of the tensors [K, ...] that are not as they were at the start for every client."""
    start = _beside(start, stack)
    return {k: v for k, v in stack.items() if not alike(v, start[k].expand_as(v))}


def settled(stack: Stack, start: Params) -> Tensor:
    """Whether every number of client k is finite or as it was: a constant may be infinite, as masks are."""
    good, start = finite_per_client(stack), _beside(start, stack)
    if good.all():
        return good
    return finite_per_client({k: torch.where(same(v, start[k]), 0, v) for k, v in stack.items()})


def _beside(start: Params, stack: Stack) -> Params:
    return {k: start[k].to(v.device) for k, v in stack.items()}


def has_float64(device: torch.device) -> bool:
    """Whether the device knows float64; Apple's MPS does not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def near(tree: Params) -> Params:
    """The same tensors where float64 can be had: on the CPU, if their device has none."""
    first = next(iter(tree.values()), None)
    if first is None or has_float64(first.device):
        return tree
    return {k: v.cpu() for k, v in tree.items()}


def to_float64(tree: Params) -> Params:
    """The same numbers in float64."""
    return {k: v.double() for k, v in tree.items()}


def finite_per_client(tree: Stack) -> Tensor:
    """Whether every number of client k is finite, [K] bool.

    NaN and infinity survive a sum of squares, and no such sum of finite float32 numbers overflows float64;
    isfinite() on every number takes forty times as long.
    """
    if all(v.dtype == torch.float32 for v in tree.values()):
        # where the sum does not overflow float32 either, as nearly always, nothing has to be converted
        good = torch.stack([dots(v) for v in tree.values()]).isfinite().all(0)
        if good.all():
            return good
    return sq_norms(tree).isfinite()


def all_finite(params: Params) -> bool:
    """Whether every number of one model is finite."""
    flat = [v.flatten() for v in params.values()]
    # as above: nearly always the squares do not overflow, and nothing more is to be done
    return all(math.isfinite(float(v.dot(v))) for v in flat if v.is_floating_point()) or all(
        bool(v.isfinite().all()) for v in flat
    )


def add_weighted(total: Params, tree: Stack, weight: Tensor) -> None:
    """Add ``weight[k] * tree[k]`` for every client k to ``total``, in place and in float64."""
    for name, v in tree.items():
        if len(v) == 1:  # without a matrix product, and without zeros to begin with
            _add_row(total, name, v[0], float(weight))
            continue
        if name not in total:
            total[name] = torch.zeros(v.shape[1:], dtype=torch.float64, device=v.device)
        total[name].view(-1).addmv_(_rows(v.double()).T, weight.double().to(v.device))


def _add_row(total: Params, name: str, v: Tensor, weight: float) -> None:
    if name not in total:
        total[name] = v.to(torch.float64, copy=True).mul_(weight)
        return
    into, new = [total[name]], [v]
    plain = v.is_contiguous() and into[0].is_contiguous()
    if plain and v.numel() > IN_CACHE:  # by parts that stay in cache
        into, new = [[*t.view(-1).split(IN_CACHE)] for t in (into[0], v)]
    for a, b in zip(into, new, strict=True):
        a.add_(b.to(torch.float64, copy=True).mul_(weight))


def dots(v: Tensor) -> Tensor:
    """Squared norm of each client's tensor [K, ...], in its own precision."""
    # a dot product reads each number once and writes none: half the time of vector_norm. One call for all
    # rows is slower on long ones, and much faster on the short ones of a bias
    rows = _rows(v)
    if rows.shape[1] < SHORT:
        return cast(Tensor, torch.linalg.vecdot(rows, rows))
    return torch.stack([r.dot(r) for r in rows])


def exact_sq_norms(*parts: Tensor) -> Tensor:
    """Squared L2 norm of each row of [n, ...], [n], in float64, and none that is less than it is.

    Of several tensors it is that of a row of all. Of float32 none vanishes or overflows. On the CPU where
    the device has no float64.
    """
    near = [v if has_float64(v.device) else v.cpu() for v in parts]
    rows = [v.reshape(len(v), math.prod(v.shape[1:])) for v in near]  # there may be none
    found, long = [], []
    for r in rows:
        if r.dtype == torch.float32 and r.device.type == "cpu" and r.shape[1] >= SHORT // 16:
            long.append(r)
        else:
            found.append(_sq_norms(r))
    if long:
        found.append(_long_sq_norms(long))
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def _sq_norms(rows: Tensor) -> Tensor:
    if rows.dtype == torch.float64 or rows.shape[1] < SHORT // 16:
        rows = rows.double()
        return cast(Tensor, torch.linalg.vecdot(rows, rows))
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)).square()


def _long_sq_norms(parts: Sequence[Tensor]) -> Tensor:
    """By blocks in float32, which takes a quarter of the time that conversion does."""
    cuts = [(r, r.shape[1] // SQUARES * SQUARES) for r in parts]
    blocks = [
        torch.linalg.vector_norm(r[:, :m].unflatten(1, (-1, SQUARES)), dim=2) for r, m in cuts
    ]
    found: Tensor = torch.cat(blocks, 1).double().square_().sum(1)
    # each sum of a block may be that much too small, with its root, and with what vanished
    found = found * (1 + (SQUARES + 6) * 2.0**-24)
    if rest := [r[:, m:] for r, m in cuts if m < r.shape[1]]:
        found += torch.cat(rest, 1).double().square_().sum(1)
    # below it what vanished may count, and above float32's largest there is no square
    lost = sum(r.shape[1] for r in parts) * torch.finfo(torch.float32).tiny * 2.0**24
    kept = (found > lost) & found.isfinite()
    if not bool(kept.all()):
        for k in (~kept).nonzero().flatten().tolist():
            found[k] = sum(r.dot(r) for r in (part[k].double() for part in parts))
    return found


def scaled_rows(v: Tensor, factors: Tensor, clean: bool = False) -> Tensor:
    """Rows of [..., q] times their factors [...]; whatever a row of factor 0 holds, it becomes 0.

    So does what comes out so small that it has lost digits: rounded up, and multiplied by a large number
    later, it would be longer than the factor allows. ``clean``: no factor is 0, as is known already.
    """
    if not clean and not bool((used := factors > 0).all()):
        v = torch.where(used[..., None], v, 0)
    return F.hardshrink(v * factors[..., None], torch.finfo(v.dtype).tiny)


def _rows(v: Tensor) -> Tensor:
    # flatten(1) fails on [K], the stack of a scalar parameter
    return v.reshape(len(v), -1)


class Apart(list[Any]):
    """Batches of one example each, where a batch of several would not be their rows together."""


def parts(batch: Any) -> list[Any] | None:
    """What a nesting holds, in order: a tuple, list, mapping or dataclass; None: it is no nesting."""
    if isinstance(batch, Mapping):
        return [*batch.values()]
    if isinstance(batch, (tuple, list)):
        return [*batch]
    if is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in fields(batch)]
    return None


def rebuilt(batch: Any, parts: Sequence[Any]) -> Any:
    """A nesting like ``batch`` of other parts, of the same type with whatever else it carries."""
    if isinstance(batch, Mapping) and (
        type(batch) is dict or not isinstance(batch, MutableMapping)
    ):
        return dict(zip(batch, parts, strict=True))
    if isinstance(batch, (tuple, list)):
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    made = copy.copy(batch)
    if isinstance(batch, Mapping):
        for key, part in zip(batch, parts, strict=True):
            made[key] = part
    else:
        for field, part in zip(fields(batch), parts, strict=True):
            object.__setattr__(made, field.name, part)  # also of one that is frozen
    return made


def mapped(fn: Callable[..., Any], batch: Any, *others: Any) -> Any:
    """``fn`` of the tensors at each place of nestings of one build; what is no tensor is the first's."""
    if isinstance(batch, Tensor):
        return fn(batch, *others)
    if not others and type(batch) in (tuple, list):  # (x, y), at every step
        return type(batch)([mapped(fn, part) for part in batch])
    if (inside := parts(batch)) is None:
        return batch
    beside = [parts(other) or [] for other in others]
    return rebuilt(batch, [mapped(fn, *each) for each in zip(inside, *beside, strict=True)])


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of their numbers."""
    return sum(t.numel() * t.element_size() for t in tensors)


def leaves(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, or of a model's output, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    return [t for part in parts(batch) or () for t in leaves(part)]


def filled(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """A nesting like ``batch`` with these tensors in the place of its own."""
    each = iter(tensors)
    return mapped(lambda _: next(each), batch)


def size(batch: Any) -> int:
    """Examples of a batch, by the first tensor in it that has any rows."""
    if isinstance(batch, Apart):
        return len(batch)
    found = next((len(t) for t in leaves(batch) if t.dim()), None)
    return len(batch) if found is None else found


def rows(batch: Any, index: Tensor | slice) -> Any:
    """Some examples of a batch: a tensor, a list of texts, or a nesting of such."""
    if isinstance(batch, Tensor):
        return batch[index] if batch.dim() else batch
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], str):
        return [batch[i] for i in torch.arange(len(batch))[index].tolist()]
    if isinstance(batch, Apart):
        found = [batch[i] for i in torch.arange(len(batch))[index].tolist()]
        return found[0] if len(found) == 1 else Apart(found)
    inside = parts(batch)
    return batch if inside is None else rebuilt(batch, [rows(v, index) for v in inside])


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one: tensors, or nestings of such."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([b if b.dim() else b[None] for b in batches])
    if parts(first) is None:  # a cache, a name: nobody knows what they are together
        return [*batches]
    each = zip(*(parts(b) or () for b in batches), strict=True)
    return rebuilt(first, [joined(p) for p in each])
