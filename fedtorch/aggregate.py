"""The weighted mean of what clients send, built up as updates arrive."""

from fedtorch.tree import add_weighted
from fedtorch.types import Params, Update


class Mean:
    """Running weighted sums in float64; K updates never have to be held at once."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self.weight = 0.0
        self.sent: dict[str, Params] = {}
        self.buffers: Params = {}

    def add(self, update: Update) -> None:
        """Add the clients of one chunk."""
        self.weight += float(update.weight.sum())
        weight = update.weight.sum()[None] if update.summed else update.weight
        for group, stack in update.sent.items():
            add_weighted(self.sent.setdefault(group, {}), stack, weight)
        add_weighted(self.buffers, update.buffers, weight)

    def sums(self) -> dict[str, Params]:
        """Weighted sum of each sent group, on the CPU."""
        return {g: {k: v.cpu() for k, v in s.items()} for g, s in self.sent.items()}

    def result(self) -> tuple[dict[str, Params], Params]:
        """Mean of each sent group and of the float buffers, on the CPU."""
        return (
            {g: {k: (v / self.weight).cpu() for k, v in s.items()} for g, s in self.sent.items()},
            {k: (v / self.weight).cpu() for k, v in self.buffers.items()},
        )
