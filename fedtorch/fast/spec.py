"""What the dense part of a model is made of; only names, so that workers can be sent it."""

from dataclasses import dataclass

from torch import Tensor

from fedtorch.fast.activations import Activation
from fedtorch.training.dropout import Dropout
from fedtorch.types import Params


@dataclass(frozen=True)
class Linear:
    """A linear layer by the names of its parameters."""

    weight: str
    bias: str | None
    shape: tuple[int, int]
    """(outputs, inputs)."""

    def named(self, weight: Tensor, bias: Tensor | None) -> Params:
        """Parameters (or a stack of them) under the model's own names."""
        return {self.weight: weight} | ({} if bias is None or not self.bias else {self.bias: bias})


Part = Linear | Activation | Dropout
"""Of the dense part."""
