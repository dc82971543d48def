"""FedBABU: the head stays as it was drawn, so that clients agree on the body."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fedtorch.strategies.base import Strategy
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class FedBABU(Strategy):
    """FedAvg of the body, the head frozen at its random start (Oh et al. 2022, arXiv:2106.06042, Alg. 1).

    In the end each client fine-tunes for itself, head and all: ``finetune_steps``.
    """

    head: tuple[str, ...] = ("head.*",)
    """The head's weights, by name."""

    def prepare(self, model: nn.Module) -> "FedBABU":
        """Freeze the head; raises ConfigError where there is none, or nothing else."""
        names = [k for k, _ in model.named_parameters()]
        found = self._found(names)
        if not found or len(found) == len(names):
            which = "every weight" if found else "no weight"
            layers = {k.rpartition(".")[0] for k in names}
            fix = f"name the last layer's, such as {names[-1].rpartition('.')[0]}.*"
            fix = fix if len(layers) > 1 else "a model of one layer has no body: use fedavg"
            raise ConfigError(
                f"strategy.head {', '.join(self.head)} fits {which} that model {type(model).__name__} "
                f"trains: it has {', '.join(names[:6])}{', ...' if names[6:] else ''}; {fix}"
            )
        for name in found:
            model.get_parameter(name).requires_grad_(False)
        return self

    def thaw(self, model: nn.Module) -> None:
        """Head and all."""
        for name in self._found([k for k, _ in model.named_parameters()]):
            model.get_parameter(name).requires_grad_(True)

    def _found(self, names: list[str]) -> list[str]:
        return [k for k in names if any(fnmatchcase(k, pattern) for pattern in self.head)]
