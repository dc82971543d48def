"""What the protocol says no with."""


class Refused(RuntimeError):
    """A message or a round that is not taken: which rule it breaks, a sentence, and who broke it."""

    def __init__(self, kind: str, why: str, place: int | None = None) -> None:
        """``kind``: one word; ``place``: in the roster, of who is to blame if that is known."""
        super().__init__(why)
        self.kind, self.place = kind, place
