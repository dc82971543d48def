"""Parameters that modules use themselves, as tokens and positions are: each example is given its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedtorch.privacy.formulas import GRADIENTS

Owned = list[tuple[nn.Module, str, Tensor]]
"""Modules, and what of their parameters they use themselves, by name."""


def own_parameters(model: nn.Module) -> Owned:
    """Trained ones [1, ...] of modules that are none of torch's, as tokens and positions are."""
    return [
        (m, name, p)
        for m in model.modules()
        if not type(m).__module__.startswith("torch.nn.") and type(m) not in GRADIENTS
        for name, p in m.named_parameters(recurse=False)
        if p.requires_grad and p.dim() > 2 and len(p) == 1
    ]


@contextmanager
def each_its_own(owned: Owned, many: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every example has such parameters of its own, which take part in a forward as one for all does.

    What a module does with them is not seen: where it is something else, the first trial finds it.
    """
    leaves = [(p, p.detach().expand(many, *p.shape[1:]).requires_grad_()) for _, _, p in owned]
    try:
        for (m, name, _), (_, leaf) in zip(owned, leaves, strict=True):
            vars(m)[name] = leaf  # before what the module keeps under that name
        yield leaves
    finally:
        for m, name, _ in owned:
            vars(m).pop(name, None)
