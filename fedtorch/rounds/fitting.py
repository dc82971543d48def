"""``Server.fit``: rounds with a judge, callbacks and a bar, and an end for which a reason is said."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.history import History
from fedtorch.rounds.judged import Judged
from fedtorch.rounds.observers import Observer, attending
from fedtorch.rounds.progress import Bar, Interrupts


def fitted(
    server: Any,
    rounds: Iterator[Metrics],
    last: int,
    judge: Judged | None,
    callbacks: Sequence[Observer],
    progress: bool,
) -> History:
    """Take ``rounds`` up to number ``last``; the server's history has them even where this is interrupted.

    Raises ConfigError, before any training, where a callback cannot do its part.
    """
    history = History()
    scores: Metrics = {"round": server.round_number} | (judge.look() if judge else {})
    if judge and not server.round_number:
        history.append(scores)
    with (
        closing(Bar(last, progress)) as bar,
        Interrupts(bar.say) as interrupts,
        attending(server, [judge] if judge else [], callbacks, last, scores) as notes,
    ):
        bar.say(*notes)
        server.history += history
        for figures in rounds:
            history.append(figures)
            server.history.append(figures)
            bar.round(figures)
            if interrupts.asked:
                break
        bar.close()
        if server.stopped:
            bar.say(server.stopped)
        elif server.round_number < last and not interrupts.asked:
            bar.say(f"round {server.round_number}: the privacy budget has no room for another")
    if interrupts.asked:
        raise KeyboardInterrupt
    return history
