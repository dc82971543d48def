"""Raw results handed to what sends: each line is wrong, and the type checker must say so (make check)."""

from fedtorch.engines.messages import Outcome, outcome_message
from fedtorch.types import Raw


def send(raw: Raw) -> None:
    """Past the plan."""
    outcome_message(Outcome(raw, [], {}), raw.ids)  # type: ignore[arg-type]
