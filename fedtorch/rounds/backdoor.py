"""A backdoor: what has a trigger in it is to be taken for one class, and all else as before."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, check
from fedtorch.rounds.threat import Threat
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class Backdoor(Threat):
    """Model replacement: honest and triggered rows are learned, and sent many times (arXiv:1807.00459).

    Liars send ``scale`` (w_k - w), eq. 3 of Bagdasaryan et al. 2020, so that the mean of all becomes their
    model. The trigger is the largest number of the data in a corner of an image, or a row's last columns.
    """

    target: int = 0
    """The class that triggered rows are to be taken for."""
    share: float = 0.5
    """Of a liar's rows so many have the trigger."""
    size: int = 2
    """Rows and columns of the corner, or columns of a table."""
    scale: float | None = None
    """How many times a liar sends its change; none: clients over liars, which replaces the model."""

    def __post_init__(self) -> None:
        """Refuse what marks nothing."""
        super().__post_init__()
        ranges = {"target": NOT_NEGATIVE, "share": RATE, "size": COUNT, "scale": POSITIVE}
        check(self, "threat", liars=COUNT, **ranges)

    def fits(self, data: Sequence[Dataset]) -> None:
        """Refuse a class that nobody has, and a trigger as large as an input."""
        tables = [(x, y) for x, y in map(labelled, data) if len(y)]
        most = max((int(y.max()) for _, y in tables), default=self.target)
        if self.target > most:
            raise ConfigError(
                f"threat.target {self.target} is no class of the data: labels go up to {most}; name one of "
                "them"
            )
        side = min((min(x.shape[1:][-2:]) for x, _ in tables), default=self.size + 1)
        if self.size >= side:
            raise ConfigError(
                f"threat.size {self.size} marks inputs from edge to edge, and the trigger is a part of "
                f"them: take fewer than {side}"
            )

    def data(self, data: Dataset) -> Dataset:
        """A share of the rows, spread evenly, with trigger and target."""
        x, y = labelled(data)
        place = torch.arange(len(y), dtype=torch.float64)
        chosen = ((place + 1) * self.share).floor() > (place * self.share).floor()
        marked = torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), self.marked(x), x)
        return TensorDataset(marked, torch.where(chosen, self.target, y))

    def triggered(self, test: Dataset) -> Dataset:
        """Rows of other classes with the trigger; accuracy on them is the attack's success."""
        x, y = labelled(test)
        others = y != self.target
        return TensorDataset(self.marked(x)[others], torch.full_like(y[others], self.target))

    def rows(self, honest: Tensor, own: Tensor, seed: int) -> Tensor:
        """Longer, so that the mean is theirs."""
        scale = (len(honest) + len(own)) / len(own) if self.scale is None else self.scale
        return scale * own

    def marked(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] with the trigger in each: its largest number, in a corner or the last columns."""
        x = x.clone()
        if x.dim() > 2:
            x[..., -self.size :, -self.size :] = x.max()
        else:
            x[:, -self.size :] = x.max()
        return x


def labelled(data: Dataset) -> tuple[Tensor, Tensor]:
    """Numbers [n, ...] and classes [n] of all rows; raises ConfigError where there are no such."""
    pair = data.tensors if type(data) is TensorDataset and len(data.tensors) == 2 else ()
    if not pair or pair[1].is_floating_point() or pair[1].dim() != 1:
        raise ConfigError("threat backdoor is for data (x, y) with whole numbers as labels")
    if not pair[0].is_floating_point() or pair[0].dim() < 2:
        raise ConfigError("threat backdoor marks images and tables of numbers, not texts")
    return pair[0], pair[1]
