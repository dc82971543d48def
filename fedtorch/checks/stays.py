"""What training changes of a model and no client sends: whole numbers, frozen weights, generators."""

import random

import torch
from torch import nn

from fedtorch.tree import same
from fedtorch.types import ConfigError, Params


def stays(model: nn.Module, before: Params) -> tuple[str, ...]:
    """A sentence for statistics that lose their count, and for buffers that changed and have no mean.

    Raises ConfigError for frozen weights that changed.
    """
    for k, p in model.named_parameters():
        if not (p.requires_grad or bool(same(before[k], p.detach()).all())):
            raise ConfigError(
                f"parameter {k} of model {type(model).__name__} takes no gradient and is changed as the "
                "model runs, and the server would never have what clients make of it: make it a buffer "
                "(register_buffer), whose mean is taken"
            )
    moved = [
        k
        for k, b in model.named_buffers()
        if not b.is_floating_point() and k in before and not torch.equal(b, before[k])
    ]
    counts = [k for k in moved if k.endswith("num_batches_tracked")]
    return (
        *_cumulative(model, counts),
        *_not_averaged(model, [k for k in moved if k not in counts]),
    )


def _cumulative(model: nn.Module, counts: list[str]) -> tuple[str, ...]:
    """A sentence for statistics that weigh by a count which is the server's in every visit."""
    owners = ((k.rpartition(".")[0], k) for k in counts)
    named = [(n, model.get_submodule(n)) for n, _ in owners]
    found = [(n, m) for n, m in named if getattr(m, "momentum", 0.0) is None]
    if not found:
        return ()
    (name, layer), more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"layer {name or 'the model'} ({type(layer).__name__}){more} has momentum=None, and the count that "
        "weighs its batches begins anew in each visit: its statistics are those of the last round alone, "
        "and no mean over all rounds (with momentum=0.1 they follow)",
    )


def _not_averaged(model: nn.Module, found: list[str]) -> tuple[str, ...]:
    if not found:
        return ()
    kind = str(model.get_buffer(found[0]).dtype).removeprefix("torch.")
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"buffer {found[0]} ({kind}){more} changes as clients train and is not averaged: each starts "
        "from the server's, which stays as it is (a buffer of floats would be averaged)",
    )


def is_generator(value: object) -> bool:
    """Whether it draws random numbers by a state of its own."""
    numpys = type(value).__module__.startswith("numpy.random")  # whose import is for some alone
    return numpys or isinstance(value, (torch.Generator, random.Random))


def generators(model: nn.Module) -> tuple[str, ...]:
    """A sentence for a generator of random numbers that the model keeps, which no seed begins anew."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if is_generator(value):
                where = f"layer {name or 'the model'} ({type(module).__name__})"
                return (
                    f"attribute {key} of {where} draws random numbers from where the last client left it, "
                    "and a resumed run begins it anew: torch.randn and its like are seeded for each visit",
                )
    return ()
