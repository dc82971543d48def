import dataclasses

from fedtorch.commands.train import train_module
from fedtorch.options import find, typed
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.run.names import CHOICES, help_text
from fedtorch.run.objects import choose

Config = train_module().Config
HELP = help_text(Config, "fedtorch train")


def test_every_choice_can_be_imported_and_is_a_frozen_dataclass():
    for names in CHOICES.values():
        for path in names.values():
            assert dataclasses.fields(find(path)) is not None
            assert find(path).__dataclass_params__.frozen


def test_help_names_every_option_with_its_default_and_a_sentence():
    lines = HELP.splitlines()
    for f in dataclasses.fields(Config):
        if f.name.endswith("_args"):
            continue
        flag = f"  --{f.name.replace('_', '-')}"
        at = next(i for i, line in enumerate(lines) if line == flag or line.startswith(f"{flag} "))
        assert lines[at + 1].strip(), f"{f.name} has no text"


def test_a_short_list_of_choices_leaves_none_out():
    lines = HELP.splitlines()
    for option in ("pace", "threat", "privacy", "engine", "participation", "channel"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  --{option} "))
        end = next(i for i, line in enumerate(lines) if i > at and line.startswith(" " * 12))
        text = " ".join(lines[at:end])
        assert not [name for name in CHOICES[option] if name not in text], option


def test_help_names_every_choice_with_its_options():
    for choice, names in CHOICES.items():
        for name, path in names.items():
            assert name in HELP
            for f in dataclasses.fields(find(path)):
                if f"{choice}.{f.name}" not in CHOICES:
                    assert f"--{choice}.{f.name}" in HELP


def test_messages_spell_a_choice_as_options_do():
    written = {
        find(path): name
        for choice in (
            "strategy",
            "aggregator",
            "aggregator.pre",
            "pace",
            "threat",
            "participation",
        )
        for name, path in CHOICES[choice].items()
    }
    found = {name: typed(object.__new__(kind)) for kind, name in written.items()}
    assert {n: w for n, w in found.items() if n != w} == {"lg": "lgfedavg"}


def test_paces_go_by_the_names_of_their_papers_too():
    assert choose("pace", {"name": "fedbuff", "size": 3}) == Buffered(size=3)
    assert choose("pace", "FedAsync") == Asynchronous()


def test_help_fits_a_terminal():
    assert max(map(len, HELP.splitlines())) <= 100
