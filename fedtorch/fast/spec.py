"""What the dense part of a model is made of; only names, so that workers can be sent it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fedtorch.masks import Dropout
from fedtorch.types import Params

aten = torch.ops.aten


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


@dataclass(frozen=True)
class Activation:
    """A function of each number, or each row, alone; only its name, so that workers can be sent it."""

    name: str
    approximate: str = "none"

    def forward(self, z: Tensor) -> Tensor:
        """The function."""
        if self.name == "GELU":
            return cast(Tensor, aten.gelu(z, approximate=self.approximate))
        return FORWARD[self.name](z)

    def backward(self, d: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of its result ``a`` -> gradient of ``z``."""
        if self.name == "GELU":
            return cast(Tensor, aten.gelu_backward(d, z, approximate=self.approximate))
        return BACKWARD[self.name](d, z, a)


Part = Linear | Activation | Dropout
"""Of the dense part."""

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "SiLU": aten.silu,
    "Softmax": lambda z: z.softmax(-1),
    "LogSoftmax": lambda z: z.log_softmax(-1),
}

BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ReLU": lambda d, z, a: aten.threshold_backward.default(d, a, 0),
    "Tanh": lambda d, z, a: aten.tanh_backward(d, a),
    "Sigmoid": lambda d, z, a: aten.sigmoid_backward(d, a),
    "SiLU": lambda d, z, a: aten.silu_backward(d, z),
    "Softmax": lambda d, z, a: aten._softmax_backward_data(d, a, -1, a.dtype),
    "LogSoftmax": lambda d, z, a: aten._log_softmax_backward_data(d, a, -1, a.dtype),
}
