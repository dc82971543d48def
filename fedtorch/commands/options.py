"""Arguments of the small commands: a few words and ``--switches``; anything else is refused by name."""

from collections.abc import Iterable, Sequence

from fedtorch.options import near
from fedtorch.types import ConfigError


def only(argv: Sequence[str], command: str, switches: Iterable[str] = ()) -> set[str]:
    """The switches given to a command that takes no words; raises ConfigError for anything else."""
    words, given = words_and_options(argv, command, dict.fromkeys(switches, False))
    if words:
        raise ConfigError(f"fedtorch {command} takes no argument, but got {words[0]!r}")
    return set(given)


def words_and_options(
    argv: Sequence[str], command: str, takes: dict[str, bool]
) -> tuple[list[str], dict[str, str]]:
    """Plain words, and options by name; ``takes`` says of each option whether it needs a value."""
    words: list[str] = []
    given: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, eq, value = word[2:].partition("=")
        if name not in takes:
            known = ", ".join(f"--{n}" for n in takes) or "none"
            hint = near(name, takes).replace("mean ", "mean --").replace(" or ", " or --")
            raise ConfigError(f"fedtorch {command} has no option --{name}; it has {known}{hint}")
        if takes[name] and not eq:
            if not rest:
                raise ConfigError(f"fedtorch {command}: --{name} needs a value")
            value = rest.pop(0)
        elif eq and not takes[name]:
            raise ConfigError(f"fedtorch {command}: --{name} takes no value")
        given[name] = value
    return words, given
