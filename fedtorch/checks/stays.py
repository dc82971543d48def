"""What training changes of a model and no client sends: buffers of whole numbers, and frozen weights."""

import torch
from torch import nn

from fedtorch.tree import same
from fedtorch.types import ConfigError, Params


def stays(model: nn.Module, before: Params) -> tuple[str, ...]:
    """A sentence for buffers that changed and have no mean; raises ConfigError for frozen weights."""
    for k, p in model.named_parameters():
        if not (p.requires_grad or bool(same(before[k], p.detach()).all())):
            raise ConfigError(
                f"parameter {k} of model {type(model).__name__} takes no gradient and is changed as the "
                "model runs, and the server would never have what clients make of it: make it a buffer "
                "(register_buffer), whose mean is taken"
            )
    found = [
        k
        for k, b in model.named_buffers()
        if not b.is_floating_point() and k in before and not torch.equal(b, before[k])
        if not k.endswith("num_batches_tracked")
    ]
    if not found:
        return ()
    kind = str(model.get_buffer(found[0]).dtype).removeprefix("torch.")
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"buffer {found[0]} ({kind}){more} changes as clients train and is not averaged: each starts "
        "from the server's, which stays as it is (a buffer of floats would be averaged)",
    )
