"""Who looks on at training: pictures, records, scores and callbacks of a user's own."""

from collections.abc import Mapping
from typing import Any

from fedtorch.rounds.figures import Metrics
from fedtorch.types import Released


class Observer:
    """Looks on; what a method that is not overridden would show passes by.

    Observers are called in the order in which ``Server(observers=[...])`` has them. What they are shown is
    for looking, not for changing, and what a client has kept to itself is shown to none of them.
    """

    def sent(self, released: Released) -> None:
        """Work of some clients has arrived: what their privacy plan let go, and nothing else."""

    def round(self, figures: Metrics) -> Mapping[str, Any] | None:
        """A round is over. Figures that are returned join the round's, for later observers too.

        Of an observer that has ``sent`` they are marked, or left out, as those of clients that no guarantee
        covers (``Server.mark``).
        """


def looks(observer: Observer) -> bool:
    """Whether it is to be shown the work of clients."""
    return type(observer).sent is not Observer.sent
