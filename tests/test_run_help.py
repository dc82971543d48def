"""What ``--help`` says of a command, a topic, an option, a choice."""

import dataclasses
import os
import re

import pytest

from fedtorch.commands.train import train_module
from fedtorch.options import find
from fedtorch.run.help import RUN_TOPICS, SITE, help_text
from fedtorch.run.names import CHOICES
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.types import ConfigError

Config = train_module().Config
COMMANDS = [(Config, RUN_TOPICS), (ServeConfig, RUN_TOPICS), (SiteConfig, SITE)]


def said(*asked: str) -> str:
    return help_text(Config, "fedtorch train", RUN_TOPICS, asked)


@pytest.mark.parametrize("cls, topics", COMMANDS, ids=["train", "serve", "site"])
def test_every_option_is_of_one_topic_and_has_a_line_with_its_default(cls, topics, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = [n for names in topics.values() for n in names]
    names = {f.name for f in dataclasses.fields(cls) if not f.name.endswith("_args")}
    assert names <= {*listed} and len(listed) == len({*listed})
    lines = help_text(cls, "fedtorch x", topics).splitlines()
    assert max(map(len, lines)) <= 88
    for name in names:
        flag = f"--{name.replace('_', '-')}"
        (line,) = (t for t in lines if t.startswith(f"  {flag} "))
        assert len(line) <= 80 and len(line.split("  ")[-1]) > 5, line


def test_everything_is_told_when_asked_for(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = said("all")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for choice, names in CHOICES.items():
        for name, path in names.items():
            assert f"{name}: " in text
            for f in dataclasses.fields(find(path)):
                if f"{choice}.{f.name}" not in CHOICES:
                    assert f"--{choice}.{f.name.replace('_', '-')}" in text
    for option in ("pace", "threat", "privacy", "engine", "participation", "channel"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"  --{option}"))
        about = " ".join(lines[start : start + 6])
        assert not [name for name in CHOICES[option] if name not in about], option


@pytest.mark.parametrize(
    "asked, there, absent",
    [
        ("privacy", "--privacy.sample-rate 0.2", "--strategy"),
        ("--privacy", "--privacy.adaptive.quantile 0.5", "--strategy"),
        ("data", "--dataset.target", "--rounds"),
        ("dataset", "--dataset.target", "--partition"),
        ("fedprox", "--strategy.mu 0.01", "--strategy.q "),
        ("strategy.fedprox", "--strategy.mu 0.01", "--strategy.q "),
        ("all", "size to arrive", "``"),
        ("strategy.server", "--strategy.server.beta1 0.9", "--strategy.mu"),
        ("server_lr", "--strategy.server.lr", "--rounds"),
        ("strategy.mu", "--strategy.mu 1", "--strategy.q "),
        ("epsilon", "--privacy.epsilon null", "--rounds"),
        ("learning-rate", "--lr null", "--rounds"),
        ("quantile", "--privacy.adaptive.quantile", "--privacy.adaptive.lr"),
    ],
)
def test_a_word_is_told_about_with_all_that_is_below_it(asked, there, absent):
    text = said(asked)
    assert there in text and absent not in text


@pytest.mark.parametrize(("cls", "topics"), [(ServeConfig, RUN_TOPICS), (SiteConfig, SITE)])
def test_a_federation_is_told_of_no_engine_that_it_refuses(cls, topics):
    text = help_text(cls, "fedtorch x", topics, ["engine"])
    assert "flower: Calls" in text and not re.search("local:|processes:|ray:", text)
    assert "local" not in help_text(cls, "fedtorch x", topics).split("--engine")[1].splitlines()[0]
    with pytest.raises(ConfigError, match="has no 'ray'"):
        help_text(cls, "fedtorch x", topics, ["ray"])


def test_options_that_all_names_have_are_told_once():
    others = ("scaffold", "pfedme", "qfedavg", "feddyn")  # of which each has another default
    assert said("strategy").count("--strategy.weighting") == 1 + len(others)


def test_a_word_that_there_is_not_brings_what_comes_near():
    with pytest.raises(ConfigError, match="has no 'privcy' to tell about; did you mean privacy"):
        said("privcy")


@pytest.mark.parametrize("command", ["train", "serve", "site"])
def test_a_reader_of_help_may_go_away(command, monkeypatch, capfd):
    from fedtorch.__main__ import main

    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    before = os.dup(1)
    try:
        assert main([command, "--help"]) == 0
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert capfd.readouterr().err == ""
