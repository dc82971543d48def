"""Which weights and buffers of a model stay with each client, and which are everybody's."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fedtorch.types import ConfigError, Params

GROUP = "personal"
"""The group of a client's memory that holds them."""


def personal(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Trainable weights and float buffers that the patterns name.

    A pattern is one of names ("head.*") or, after "@", of a kind of layer: "@BatchNorm" are all weights
    and statistics of such layers, whatever they are called. Raises ConfigError where one names nothing, or
    where nothing is left to be averaged.
    """
    if not patterns:
        return set()
    if isinstance(patterns, str):
        raise ConfigError(
            f"strategy.personal is a list of names, and {patterns!r} is one name: give ({patterns!r},)"
        )
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    floats = {k for k, b in model.named_buffers() if b.is_floating_point()}
    found: set[str] = set()
    for pattern in patterns:
        names = {k for k in trained | floats if _fits(model, k, pattern)}
        if not names:
            raise ConfigError(_unfitting(model, pattern))
        found |= names
    if not trained - found:
        raise ConfigError(
            "strategy.personal fits every weight that is trained, so that nothing would be averaged: name "
            "fewer layers"
        )
    return found


def shared(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the trainable weights that are everybody's."""
    own = personal(model, patterns)
    return [k for k, p in model.named_parameters() if p.requires_grad and k not in own]


def given(model: nn.Module, patterns: Sequence[str] = ()) -> Params:
    """Parameters and buffers of a working copy, as visits find them; what tasks bring is not copied."""
    brought = {*shared(model, patterns)}
    both = (*model.named_parameters(), *model.named_buffers())
    return {k: v.detach() if k in brought else v.detach().clone() for k, v in both}


def _unfitting(model: nn.Module, pattern: str) -> str:
    """Why a pattern names nothing, and what would."""
    trained = [k for k, p in model.named_parameters() if p.requires_grad]
    layers = [*dict.fromkeys(f"{k.rpartition('.')[0]}.*" if "." in k else k for k in trained)]
    what = f"it has {', '.join(trained[:6])}{', ...' if trained[6:] else ''}"
    if pattern.startswith("@"):
        kinds = dict.fromkeys(type(m).__name__ for m in model.modules() if not [*m.children()])
        what = f"its layers are {', '.join(kinds)}"
    fix = "use strategy fedavg"
    if len(layers) > 1:
        fix = (
            f"name in strategy.personal what stays with its client, such as {layers[0]!r} (first layer) "
            f"or {layers[-1]!r} (last), or {fix}"
        )
    return (
        f"strategy.personal {pattern!r} fits nothing that model {type(model).__name__} trains: {what}; "
        f"{fix}"
    )


def _fits(model: nn.Module, name: str, pattern: str) -> bool:
    if not pattern.startswith("@"):
        return fnmatchcase(name, pattern)
    kinds = type(model.get_submodule(name.rpartition(".")[0])).__mro__
    return any(c.__name__.lstrip("_").startswith(pattern[1:]) for c in kinds)
