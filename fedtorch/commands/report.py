"""``fedtorch report``: what came of a run on one page."""

from collections.abc import Sequence

from fedtorch.commands.options import words_and_options
from fedtorch.run import shown
from fedtorch.types import ConfigError


def report(argv: Sequence[str]) -> int:
    """Write ``report.html`` and say where it is."""
    words, given = words_and_options(argv, "report", {"output": True, "against": True})
    if len(words) != 1:
        raise ConfigError(
            f"fedtorch report takes one run folder, but got {len(words)}; --against RUN is for "
            "a second one"
        )
    path = shown.report(words[0], given.get("output"), against=given.get("against"))
    print(f"report: {path} (open it in a browser)")
    return 0
