"""What of a server's model travels: what is trained, and what else clients were not given so."""

from collections.abc import Iterable

import torch
from torch import nn

from fedtorch.engines.messages import digest
from fedtorch.training.module import snapshot, to
from fedtorch.tree import alike
from fedtorch.types import Params

CPU = torch.device("cpu")


class Weights:
    """A model's parameters and buffers on the CPU, wherever it is, beside those that it was handed with.

    A buffer that a forward made is nobody's; of one that it made larger, the first is.
    """

    def __init__(self, model: nn.Module, sent: Iterable[str]) -> None:
        """``sent``: names of what is trained, and of running statistics, as they are about to move."""
        self.model, self.sent = model, {*sent}
        self.first = to(snapshot(model), CPU)
        self._digests: dict[tuple[str, ...], str] = {}

    def now(self) -> Params:
        """As they are, not copied where the model is on the CPU."""
        model = (*self.model.named_parameters(), *self.model.named_buffers())
        now = {k: v.detach().to(CPU) for k, v in model}
        return {k: now[k] if now[k].shape == v.shape else v for k, v in self.first.items()}

    def travel(self) -> Params:
        """A copy of what clients do not have with the model."""
        now, first = self.now(), self.first
        return {k: v.clone() for k, v in now.items() if k in self.sent or not alike(v, first[k])}

    def rest(self, model: Params) -> str:
        """Digest of the model as it was handed over, but for what ``model`` has."""
        rest = tuple(k for k in self.first if k not in model)
        if rest not in self._digests:  # they are the same from round to round
            self._digests[rest] = digest({k: self.first[k] for k in rest})
        return self._digests[rest]
