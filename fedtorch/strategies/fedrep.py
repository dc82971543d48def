"""FedRep: each client fits its own head first, then helps with the body that all share."""

from dataclasses import dataclass

from fedtorch.options import COUNT, check
from fedtorch.strategies.base import Solve, Strategy
from fedtorch.types import Context, Stack


@dataclass(frozen=True, kw_only=True)
class FedRep(Strategy):
    """Steps of the head with the body frozen, then of the body (Collins et al. 2021, arXiv:2102.07078).

    epochs or steps of the run are those of the body.
    """

    personal: tuple[str, ...] = ("head.*",)
    """The head's weights, by name."""
    head_epochs: int = 1
    """Passes over a client's data in which the head trains."""
    head_steps: int | None = None
    """Local steps of the head, in place of passes."""

    def __post_init__(self) -> None:
        """Refuse what is no number of steps."""
        check(self, "strategy", head_epochs=COUNT, head_steps=COUNT)

    def train(self, solve: Solve, ctx: Context) -> tuple[object, dict[str, Stack]]:
        """The head, then the body from there."""
        first = solve(rests=[*ctx.anchor], epochs=self.head_epochs, steps=self.head_steps)
        weights, buffers = first.rows()
        now = weights | buffers
        return solve(start={k: now[k] for k in ctx.own}, rests=[*ctx.own]), {}
