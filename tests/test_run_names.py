import dataclasses

from fedtorch.commands.train import train_module
from fedtorch.options import find, typed
from fedtorch.rounds.buffered import Asynchronous, Buffered
from fedtorch.run.names import ALIASES, CALLED, CHOICES, MEANT, NEAR, OFF
from fedtorch.run.objects import choose

Config = train_module().Config


def test_every_choice_can_be_imported_and_is_a_frozen_dataclass():
    for names in CHOICES.values():
        for path in names.values():
            assert dataclasses.fields(find(path)) is not None
            assert find(path).__dataclass_params__.frozen


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


def test_what_others_say_stands_for_something_that_there_is():
    options = {f.name for f in dataclasses.fields(Config)}
    for other, ours in ALIASES.items():
        top, _, below = ours.partition(".")
        assert top in options and other not in options, other
        choice, _, name = ours.rpartition(".")
        if below and choice in CHOICES:
            classes = map(find, CHOICES[choice].values())
            has = any(name in {f.name for f in dataclasses.fields(c)} for c in classes)
            assert has or ours in CHOICES, ours
    assert CALLED["learning-rate"] == "lr" and CALLED["max-grad-norm"] == "clip"
    for choice, meant in MEANT.items():
        for other, (name, inner) in meant.items():
            assert other not in CHOICES[choice] and name in CHOICES[choice]
            assert all(v in CHOICES[f"{choice}.{k}"] for k, v in inner.items())
    for choice, words in NEAR.items():
        for other, said in words.items():
            assert other not in CHOICES[choice] and other not in OFF
            assert said.replace(" or ", " ").split()[0] in CHOICES[choice]
