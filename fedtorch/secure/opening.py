"""Secrets from shares that some may have lied about: what they must fit tells who."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, islice

from fedtorch.secure import shamir
from fedtorch.secure.primitives import KEY
from fedtorch.secure.refused import Refused

TRIES = 500
"""Sets of helpers that are tried before a secret is given up."""


@dataclass
class Joiner:
    """Puts secrets together, all of the same helpers where it can: their weights are worked out once."""

    threshold: int
    liars: dict[int, int] = field(default_factory=dict)
    """Who gave a share that is not on the others' polynomial, and whose it was."""
    _weights: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """Of each set of helpers that was used."""

    def join(
        self, owner: int, shares: Mapping[int, bytes], fits: Callable[[bytes], bool]
    ) -> bytes | None:
        """The owner's secret that ``fits``, from any shares that give it; None where none do."""
        values = {h: shamir.from_bytes(s) for h, s in shares.items()}
        for tries, helpers in enumerate(self._choices(sorted(values))):
            secret = shamir.combine(self._of(helpers), [values[h] for h in helpers])
            found = secret.to_bytes(shamir.SIZE, "big")
            if not found[0] and fits(found[-KEY:]):
                if tries:
                    self._name(owner, helpers, values)
                return found[-KEY:]
        return None

    def _of(self, helpers: tuple[int, ...]) -> list[int]:
        if helpers not in self._weights:
            self._weights[helpers] = shamir.weights(helpers)
        return self._weights[helpers]

    def _choices(self, helpers: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """First those who have not lied before, then without each one, then without each two, and so on."""
        order = [h for h in helpers if h not in self.liars]
        order += [h for h in helpers if h in self.liars]
        spare = len(order) - self.threshold
        left_out = chain.from_iterable(combinations(order, k) for k in range(spare + 1))
        for out in islice(left_out, TRIES):
            yield tuple(h for h in order if h not in out)[: self.threshold]

    def _name(self, owner: int, helpers: tuple[int, ...], values: Mapping[int, int]) -> None:
        right = [values[h] for h in helpers]
        for other in values.keys() - {*helpers} - self.liars.keys():
            if shamir.combine(shamir.weights(helpers, other + 1), right) != values[other]:
                self.liars[other] = owner


def unjoined(owners: Sequence[str], all_of_them: bool) -> Refused:
    """Why shares that fit nothing end a round: of one alone, it is most likely the one who dealt them."""
    listed = ", ".join(owners)
    if all_of_them:
        why = "somebody who opened shares gave wrong ones"
    else:
        why = "whoever dealt them, or somebody who opened them, has lied"
    return Refused("shares", f"the shares of {listed} do not give what was committed to: {why}")
