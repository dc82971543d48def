"""Names that there are, ``fedtorch models``, ``strategies`` and the like; version and completion."""

import ast
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import fedtorch
from fedtorch.commands.options import only, words_and_options
from fedtorch.commands.train import train_module
from fedtorch.options import find
from fedtorch.run import zoo
from fedtorch.run.names import CHOICES
from fedtorch.types import ConfigError

SCRIPT = """_fedtorch() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=
  if (( COMP_CWORD == 1 )); then words="@commands@"
  else case $before in
@choices@
    *) if [[ $word == -* && ${COMP_WORDS[1]} == train ]]; then words="@options@"; fi ;;
  esac; fi
  COMPREPLY=()
  if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$word")); fi
}
complete -o default -F _fedtorch fedtorch"""


def models(argv: Sequence[str]) -> int:
    """Every file of the model folders and its first line."""
    found = {name: zoo.file(name) for name in zoo.names()}
    return show({name: first_line(path) for name, path in found.items() if path}, argv, "models")


def datasets(argv: Sequence[str]) -> int:
    """Every dataset by its short name."""
    return show(described("dataset"), argv, "datasets")


def strategies(argv: Sequence[str]) -> int:
    """Every strategy by its short name."""
    return show(described("strategy"), argv, "strategies")


def aggregators(argv: Sequence[str]) -> int:
    """Every aggregator by its short name."""
    return show(described("aggregator"), argv, "aggregators")


def channels(argv: Sequence[str]) -> int:
    """Every stage of a channel by its short name."""
    return show(described("channel"), argv, "channels")


def paces(argv: Sequence[str]) -> int:
    """Every pace by its short name."""
    return show(described("pace"), argv, "paces")


def threats(argv: Sequence[str]) -> int:
    """Every threat by its short name."""
    return show(described("threat"), argv, "threats")


def version(argv: Sequence[str]) -> int:
    """The version installed."""
    only(argv, "version")
    print(fedtorch.__version__)
    return 0


def described(choice: str) -> dict[str, str]:
    """Short name -> the first line of the class's docstring."""
    classes = {name: find(path) for name, path in CHOICES[choice].items()}
    return {n: (inspect.getdoc(c) or "").partition("\n")[0] for n, c in classes.items()}


def first_line(path: Path) -> str:
    """First line of a file's docstring, read without running the file."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError, OSError) as e:
        return f"cannot be read: {e}"
    return (text or "").partition("\n")[0]


def show(table: Mapping[str, str], argv: Sequence[str], command: str) -> int:
    """Aligned lines, or one JSON object with ``--json``."""
    if "json" in only(argv, command, {"json"}):
        print(json.dumps(table, indent=2))
        return 0
    width = max(map(len, table), default=0)
    for name, text in table.items():
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def completion(argv: Sequence[str]) -> int:
    """Print the script; ``source <(fedtorch completion bash)`` turns it on."""
    words, _ = words_and_options(argv, "completion", {})
    if words not in (["bash"], ["zsh"]):
        raise ConfigError("fedtorch completion takes bash or zsh")
    if words == ["zsh"]:  # zsh runs bash's scripts itself
        print("autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit")
    print(script())
    return 0


def script() -> str:
    """The bash script, with the names there are now."""
    names = [f.name for f in fields(train_module().Config) if not f.name.endswith("_args")]
    options = [
        f"--{n.replace('_', '-')}" for n in (*names, "config", "trust_code", "sweep", "help")
    ]
    choices = "\n".join(
        f'    --{name}) words="{" ".join(values)}" ;;' for name, values in CHOICES.items()
    )
    commands = import_module("fedtorch.__main__").COMMANDS
    filled = SCRIPT.replace("@commands@", " ".join(commands)).replace("@choices@", choices)
    return filled.replace("@options@", " ".join(options))
