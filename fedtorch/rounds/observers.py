"""Who looks on at training: pictures, records, scores and callbacks of a user's own."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedtorch.rounds.figures import Metrics
from fedtorch.types import Params, Released, Task

State = dict[str, Any]


class Observer:
    """Looks on; what a method that is not overridden would show passes by.

    Observers are called in the order in which ``Server(observers=[...])`` has them, and behind them those
    that one ``fit(callbacks=[...])`` brings. What they are shown is for looking, not for changing, and what
    a client has kept to itself is shown to none of them.
    """

    late: bool = False
    """Whether it comes behind all that are not, as who saves what they remember."""
    enough: str = ""
    """Why no round is to follow, in a sentence; empty: training goes on."""
    harmless: ClassVar[bool] = False
    """Whether what it returns says nothing of data, whatever it was shown: it is of coins and noise."""

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Training begins: the Server, the number of the last round, and scores of the model as it is.

        Raises ConfigError where it cannot do its part; returns what is to be said of it, if anything.
        """

    def sent(self, released: Released) -> None:
        """Work of some clients has arrived: what their privacy plan let go, and nothing else."""

    def join(self, total: Any, task: Task) -> None:
        """Where the server adds the noise: the sum of a round is there, and canary clients may join it.

        It is the one place where anybody sees a sum before its noise, for an audit at the server that is
        trusted with it.
        """

    def noised(self, mean: Mapping[str, Params]) -> None:
        """What the server's noise has left of that sum, by group, before anything is made of it."""

    def round(self, figures: Metrics) -> Mapping[str, Any] | None:
        """A round is over. Figures that are returned join the round's, for later observers too.

        Of an observer that has ``sent`` or ``join`` they are marked, or left out, as those of clients that
        no guarantee covers (``Server.mark``), unless they are ``harmless``.
        """

    def finish(self, server: Any) -> None:
        """The last round is over, for whatever reason; not called where training failed."""

    def close(self) -> None:
        """Let go of what ``begin`` took, such as files; called however training ended."""

    def state_dict(self) -> State:
        """What it needs to go on as if there had been no break; it travels in the server's."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Go on from ``state_dict()``."""


def looks(observer: Observer) -> bool:
    """Whether it is to be shown the work of clients."""
    return type(observer).sent is not Observer.sent


def tells(observer: Observer) -> bool:
    """Whether its figures may say what no guarantee covers: it was shown clients' work, or their sum."""
    return (looks(observer) or type(observer).join is not Observer.join) and not observer.harmless


def over(server: Any, rounds: int) -> bool:
    """Whether no round follows: so many are trained, or the privacy budget has no room for another."""
    return server.round_number >= rounds or not server.within_budget()


def tell(
    observers: Iterable[Observer], figures: Metrics, mark: Callable[[Metrics], Metrics]
) -> Metrics:
    """Show them the figures of a round, one after another; what they return joins them."""
    for observer in observers:
        own = observer.round(figures) or {}
        figures |= mark(dict(own)) if tells(observer) else own
    return figures


def asks_to_stop(observers: Iterable[Observer]) -> str:
    """Why no round is to follow, as the first of them says it; empty: none of them does."""
    return next((o.enough for o in observers if o.enough), "")


@dataclass
class Remembered:
    """What observers remember, by name, while they are not there."""

    left: dict[str, State] = field(default_factory=dict)
    """As those of an earlier fit left it."""
    waiting: dict[str, State] = field(default_factory=dict)
    """That of a checkpoint, until who is named so comes."""
    enough: str = ""
    """Why the rounds before were the last."""

    def of(self, observers: Sequence[Observer]) -> dict[str, State]:
        """All of it, with what those who are there remember now."""
        return self.waiting | self.left | _states(observers)

    def hand(self, observers: Sequence[Observer]) -> None:
        """Give back what a checkpoint holds."""
        for name, observer in named(observers).items():
            if name in self.waiting:
                observer.load_state_dict(self.waiting.pop(name))


def _states(observers: Sequence[Observer]) -> dict[str, State]:
    return {n: s for n, o in named(observers).items() if (s := o.state_dict())}


def named(observers: Sequence[Observer]) -> dict[str, Observer]:
    """By the names of their classes; the second of a class has a number."""
    seen, found = Counter[str](), {}
    for observer in observers:
        name = type(observer).__name__
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} {seen[name]}"] = observer
    return found


@contextmanager
def attending(
    server: Any,
    first: Sequence[Observer],
    callbacks: Sequence[Observer],
    rounds: int,
    scores: Metrics,
) -> Iterator[list[str]]:
    """From before the first round until after the last, with callbacks beside the server's observers.

    ``first`` come before, ``callbacks`` behind the others. Gives what they have to say.
    """
    observers, remembered = server.observers, server.remembered
    own = [*observers]
    observers[:] = sorted([*first, *own, *callbacks], key=lambda o: o.late)
    begun: list[Observer] = []
    try:
        remembered.hand(observers)
        remembered.enough = ""
        said = []
        for observer in observers:
            begun.append(observer)
            said.append(observer.begin(server, rounds, scores))
        try:
            yield [words for words in said if words]
        except GeneratorExit:  # who takes rounds one by one has had enough
            _finish(observers, server)
            raise
        _finish(observers, server)
    finally:
        for observer in begun:
            observer.close()
        remembered.left = _states(observers) or remembered.left
        remembered.enough = asks_to_stop(observers)
        brought = [*first, *callbacks]
        observers[:] = [o for o in observers if not any(o is b for b in brought)]


def _finish(observers: Sequence[Observer], server: Any) -> None:
    for observer in observers:
        observer.finish(server)
