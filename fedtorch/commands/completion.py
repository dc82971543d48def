"""``fedtorch completion bash|zsh``: a script that completes commands, options and choices."""

from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module

from fedtorch.commands.options import words_and_options
from fedtorch.commands.train import train_module
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


def main(argv: Sequence[str]) -> int:
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
