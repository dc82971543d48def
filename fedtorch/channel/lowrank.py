"""Matrices are sent as the product of two thin ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtorch.channel.base import Stage, Turn
from fedtorch.channel.vectors import uniforms
from fedtorch.options import COUNT, check
from fedtorch.types import Params, Stack

LEFT, RIGHT, WHOLE = "p/", "q/", "whole/"
"""Before a tensor's name: its two factors, or the tensor itself."""


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Stage):
    """Low rank by one power step from the last one (Vogels et al. 2019, arXiv:1905.13727, Alg. 1).

    Each weight M as a matrix [a, b], b all axes but the first: P = orthogonal(M Q), Q <- M' P, and P Q' is
    decoded. A client starts from its last Q (warm start), at first from one that all draw alike. What has
    one axis, or would be no smaller, is sent whole as float32.
    """

    leads: ClassVar[bool] = True

    rank: int = 2
    """Columns of P and Q."""

    def __post_init__(self) -> None:
        """Refuse what is no rank."""
        check(self, "channel", rank=COUNT)

    def coded(self, sent: Stack, turn: Turn) -> Stack:
        """Factors [K, a, r] and [K, b, r], and what is whole, as float32."""
        code: Stack = {}
        for name, v in sent.items():
            if not self._halves(v[0]):
                code[WHOLE + name] = v.float()
                continue
            matrix = v.reshape(len(v), v.shape[1], -1)
            start = turn.memory[RIGHT + name].to(matrix)
            start = torch.where(start.any(1, keepdim=True), start, self._drawn(turn, name, start))
            left = orthogonal(matrix @ start).float()
            code[LEFT + name] = left
            code[RIGHT + name] = (matrix.mT @ left.double()).float()
        return code

    def decoded(self, code: Stack, like: Params, turn: Turn) -> Stack:
        """The products."""
        found = {}
        for name, v in like.items():
            if self._halves(v):
                product = code[LEFT + name].double() @ code[RIGHT + name].double().mT
                found[name] = product.reshape(len(product), *v.shape)
            else:
                found[name] = code[WHOLE + name].double()
        return found

    def first(self, like: Params) -> Params:
        """No column yet: one of zeros is drawn."""
        return {
            RIGHT + n: v.new_zeros(v[0].numel(), self.rank)
            for n, v in like.items()
            if self._halves(v)
        }

    def kept(self, code: Stack) -> Stack:
        """What is sent as the second factor."""
        return {n: v for n, v in code.items() if n.startswith(RIGHT)}

    def _halves(self, v: Tensor) -> bool:
        if v.dim() < 2 or not v.numel():
            return False
        rows, columns = len(v), v[0].numel()
        return self.rank * (rows + columns) < rows * columns

    def _drawn(self, turn: Turn, name: str, like: Tensor) -> Tensor:
        draw = uniforms(turn.within(name).common, like[0].numel())
        return (2 * torch.from_numpy(draw).to(like) - 1).view(like[0].shape)


def orthogonal(matrix: Tensor) -> Tensor:
    """Columns of each [K, a, r] made orthonormal, in order; one that the others make up is zero."""
    columns: list[Tensor] = []
    for column in matrix.unbind(2):
        rest = column
        for _ in range(2):  # once more, for what rounding left
            for other in columns:
                rest = rest - (rest * other).sum(1, keepdim=True) * other
        size = rest.norm(dim=1, keepdim=True)
        real = size > 1e-10 * column.norm(dim=1, keepdim=True)
        columns.append(torch.where(real, rest / size.clamp(min=1e-300), 0))
    return torch.stack(columns, 2)
