"""The ``fedtorch`` command, the same as ``python -m fedtorch``: a table of what it can do."""

import gc
import importlib
import sys
from collections.abc import Sequence

from fedtorch import disk
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
    "eval": ("a trained model on the test set", "fedtorch.commands.use:evaluate_run"),
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

TAKES = {
    "new": "NAME",
    "runs": "[FOLDER] [--json]",
    "compare": "RUN RUN [--json] [--png FILE]",
    "eval": "RUN [--json] [--trust-code]",
    "predict": "RUN FILE [--json] [--length N] [--trust-code]",
    "models": "[--json]",
    "datasets": "[--json]",
    "strategies": "[--json]",
    "aggregators": "[--json]",
    "channels": "[--json]",
    "completion": "bash|zsh",
    "version": "",
}
"""What the small commands take; the others have a help of their own."""


def usage() -> str:
    """What there is, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items()]
    more = "fedtorch COMMAND --help says what a command takes."
    return "\n".join(["usage: fedtorch COMMAND [options]", "", *lines, "", more])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 done, 1 a client's own code failed, 2 the request cannot be done."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    command = {"--version": "version"}.get(command, command)
    try:
        if command not in COMMANDS:
            raise ConfigError(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
        about, place = COMMANDS[command]
        if command in TAKES and not {"-h", "--help"}.isdisjoint(rest):
            print(f"usage: fedtorch {command} {TAKES[command]}".rstrip() + f"\n\n{about}")
            return 0
        module, _, name = place.partition(":")
        return int(getattr(importlib.import_module(module), name)(rest))
    except (ConfigError, ClientError) as e:
        print(f"fedtorch: {e}", file=sys.stderr)
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
