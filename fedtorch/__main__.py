"""The ``fedtorch`` command, the same as ``python -m fedtorch``: a table of what it can do."""

import gc
import importlib
import sys
from collections.abc import Sequence

from fedtorch import disk
from fedtorch.options import as_typed, near
from fedtorch.run.interrupts import begun
from fedtorch.types import ClientError, ConfigError

COMMANDS = {
    "train": ("train a model over many clients", "fedtorch.commands.train:main"),
    "new": (
        "a folder with a model, data and options that trains at once",
        "fedtorch.commands.new:new",
    ),
    "serve": ("run the server of a federation of sites", "fedtorch.commands.sites:serve"),
    "site": ("take part in a federation with your own data", "fedtorch.commands.sites:site"),
    "keys": ("make certificates and keys for a trial", "fedtorch.commands.sites:keys"),
    "runs": (
        "table of the runs in a folder: results, epsilon, time",
        "fedtorch.commands.runs:runs",
    ),
    "compare": ("two runs: options that differ, results", "fedtorch.commands.runs:compare"),
    "report": (
        "one page of a run: curves, clients, privacy, what differs from another",
        "fedtorch.commands.report:report",
    ),
    "eval": ("a trained model on the test set", "fedtorch.commands.evaluate:evaluate_run"),
    "audit": (
        "test the privacy claim of a run by canaries",
        "fedtorch.commands.audited:audit",
    ),
    "attack": (
        "what updates or the model of a run give away of its data",
        "fedtorch.commands.attacked:attack",
    ),
    "predict": ("a trained model on a file of examples", "fedtorch.commands.use:predict"),
    "models": ("models that --model can name", "fedtorch.commands.listing:models"),
    "datasets": ("datasets that --dataset can name", "fedtorch.commands.listing:datasets"),
    "strategies": ("strategies that --strategy can name", "fedtorch.commands.listing:strategies"),
    "aggregators": (
        "aggregators that --aggregator can name",
        "fedtorch.commands.listing:aggregators",
    ),
    "channels": (
        "stages of the channel that --channel can name",
        "fedtorch.commands.listing:channels",
    ),
    "paces": ("paces that --pace can name", "fedtorch.commands.listing:paces"),
    "threats": ("liars that --threat can name", "fedtorch.commands.listing:threats"),
    "epsilon": ("what a private run with given noise costs", "fedtorch.commands.privacy:epsilon"),
    "noise": ("noise of a run that may cost a given epsilon", "fedtorch.commands.privacy:noise"),
    "plan": ("table of epsilon over rounds and noises", "fedtorch.commands.privacy:plan"),
    "completion": (
        "completion for bash or zsh, to be sourced",
        "fedtorch.commands.listing:completion",
    ),
    "version": ("the version installed", "fedtorch.commands.listing:version"),
}
"""Command -> one line of help and where its function is: arguments in, exit status out.

The module is imported when the command is run, so that no command waits for another's imports.
"""

JSON = {"--json": "print JSON, for a program"}
TRUST_HELP = {"--trust-code": "import code that only the run's config names"}

TAKES: dict[str, tuple[str, dict[str, str]]] = {
    "new": ("NAME", {}),
    "runs": (
        "[FOLDER]",
        {
            "--sort COLUMN": "the best first, by accuracy, epsilon, seconds, an option",
            "--where A=B,C>D": "only such runs: strategy=fedprox,accuracy>0.9",
            **JSON,
        },
    ),
    "compare": ("RUN RUN", {**JSON, "--png FILE": "draw the curves into this file"}),
    "report": (
        "RUN",
        {
            "--output PATH": "where to write it (report.html in the run's folder)",
            "--against RUN": "a second run: what differs in options, results and clients",
        },
    ),
    "eval": (
        "RUN",
        {"--dataset.path PATH": "where the data lie, if they have moved", **JSON, **TRUST_HELP},
    ),
    "audit": (
        "RUN",
        {
            "--canaries N": "train it once more with so many canaries (1,000)",
            "--guesses SHARE": "of which so many are guessed (0.2)",
            **JSON,
            **TRUST_HELP,
        },
    ),
    "attack": (
        "gradient|membership RUN",
        {
            "--clients N": "gradient: so many clients (10; 2 where each takes seconds)",
            "--examples N": "gradient: examples in each client's batch (1)",
            "--steps N": "gradient: local steps on that batch (1)",
            "--epsilon E": "gradient: of the private twin of a run without a plan (8)",
            "--way WAY": "gradient: divide, match or auto",
            "--shadows N": "membership: shadow models (16)",
            **JSON,
            **TRUST_HELP,
        },
    ),
    "predict": (
        "RUN FILE",
        {
            **JSON,
            "--length N": "characters that a model of texts goes on writing (200)",
            **TRUST_HELP,
        },
    ),
    "models": ("", JSON),
    "datasets": ("", JSON),
    "strategies": ("", JSON),
    "aggregators": ("", JSON),
    "channels": ("", JSON),
    "paces": ("", JSON),
    "threats": ("", JSON),
    "completion": ("bash|zsh", {}),
    "version": ("", {}),
    "keys": (
        "FOLDER",
        {
            "--server HOST[,HOST]": "names of the server, for its certificate",
            "--sites NAME[,NAME]": "the sites",
            "--days N": "how long the certificates hold (365)",
            "--he": "a common key of the sites too, for aggregator he",
        },
    ),
}
"""What the small commands take; the others have a help of their own."""


def help_of(command: str) -> str:
    """A small command's usage, what it does, and a line for each option."""
    words, options = TAKES[command]
    shown = [f"  {name:<22} {text}" for name, text in options.items()]
    usage = " ".join(
        filter(None, [f"usage: fedtorch {command}", words, "[options]" * bool(options)])
    )
    return "\n".join([usage, "", COMMANDS[command][0], *([""] if shown else []), *shown])


def usage() -> str:
    """What there is, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items()]
    more = (
        "fedtorch COMMAND --help says what it takes; fedtorch train --help privacy tells of a part"
    )
    return "\n".join(["usage: fedtorch COMMAND [options]", "", *lines, "", more])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 done, 1 a client's own code failed, 2 the request cannot be done."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help", *rest[1:]]
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    command = {"--version": "version"}.get(command, command)
    try:
        if command not in COMMANDS:
            hint = (
                near(command.lstrip("-"), [*COMMANDS, "help"])
                or f"; there are {', '.join(COMMANDS)}"
            )
            raise ConfigError(f"unknown command {command!r}{hint}")
        place = COMMANDS[command][1]
        if command in TAKES and not {"-h", "--help"}.isdisjoint(rest):
            print(help_of(command))
            return 0
        module, _, name = place.partition(":")
        act = getattr(importlib.import_module(module), name)
        begun()
        return int(act(rest))
    except (ConfigError, ClientError) as e:
        print(f"fedtorch: {as_typed(str(e), rest)}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except BrokenPipeError:  # the reader (head, less) has seen enough
        if command in ("train", "serve", "site"):
            print("fedtorch: stopped, nobody reads what it says any more", file=sys.stderr)
            return 1
        sys.stderr.close()
        return 0
    except OSError as e:
        print(f"fedtorch: {disk.reason(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedtorch: stopped", file=sys.stderr)
        return 130


def run() -> int:
    """The same as a process of its own, whose half million objects of torch stay to the end.

    Frozen, they are not searched for garbage again and again, at the exit too, which would take half a
    second of a short run.
    """
    gc.freeze()
    return main()


if __name__ == "__main__":
    sys.exit(run())
