"""How a site takes part in sums of which nobody sees one site's update: under masks, or encrypted."""

from pathlib import Path

from torch import nn

from fedtorch.engines.wire import Message, MessageError
from fedtorch.recipe import Recipe
from fedtorch.secure.aggregator import Secure
from fedtorch.secure.he import HE
from fedtorch.secure.refused import Refused
from fedtorch.sites.masks import Masks, Party
from fedtorch.sites.offer import Plan
from fedtorch.sites.openings import Openings
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.reports import Reader
from fedtorch.sites.sealed import Sealing, read_secret
from fedtorch.sites.state import Answered
from fedtorch.sites.sums import Sums, check_apart
from fedtorch.types import ConfigError, Task


class Parties:
    """What such sums need of a site beside its data, in the run that it has joined."""

    def __init__(self, config: SiteConfig, folder: Path, answered: Answered) -> None:
        """No run is joined yet."""
        self.config, self.folder, self.answered = config, folder, answered
        self.openings: Openings | None = None
        """Sums that this site let be opened, once a run has such sums."""
        self.masks: Masks | None = None
        self.sums: Sums | None = None
        """Of a run with secure aggregation."""
        self.encrypted: Reader | None = None
        """Of a run with homomorphic encryption."""

    @property
    def any(self) -> bool:
        """Whether the run has such sums."""
        return self.sums is not None or self.encrypted is not None

    def join(self, plan: Plan, recipe: Recipe, model: nn.Module) -> None:
        """Get ready for the plan's sums; raises ConfigError where this site wants others, or has no key."""
        self.sums = self.encrypted = None
        if isinstance(plan.aggregator, Secure | HE):
            check_apart(plan)
            begun = self.answered.summed() and not self.config.lost_state
            self.openings = self.openings or Openings(self.folder, begun)
        if isinstance(plan.aggregator, Secure):
            assert self.openings is not None
            self.masks = self.masks or Masks(self.config, self.openings)
            self.sums = Sums(Reader.of(recipe, model, 0), plan.aggregator)
        elif isinstance(plan.aggregator, HE) and not self.config.require_secure:
            read_secret(self.config)
            self.encrypted = Reader.of(recipe, model, 0)
        elif self.config.require_secure:
            raise ConfigError(
                f"the run aggregates by {type(plan.aggregator).__name__}, and this site's "
                "require_secure asks for aggregator secure, under which no one site can help the server "
                "to see what this one sends"
            )

    def part(self, message: Message, run: str, task: Task) -> Party | Sealing | None:
        """This site's part in a round, before it trains for it; None where the run has no such sums."""
        if self.encrypted is not None and self.openings is not None:
            return Sealing(self.config, self.openings, self.encrypted, message, run, task)
        if self.sums is None:
            return None
        assert self.masks is not None  # with the sums
        try:
            return Party(self.masks, self.sums, message, run, task)
        except Refused as e:
            raise MessageError(f"round {task.round + 1}: {e}") from e
