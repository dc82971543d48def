"""The command line: every command answers, bad input is one sentence and exit status 2."""

import gc
import importlib
import json
import sys

import pytest

from fedtorch.__main__ import COMMANDS, main, run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_function(command):
    module, _, name = COMMANDS[command][1].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, (text, _) in COMMANDS.items())


@pytest.mark.parametrize(
    "argv, said",
    [
        (["trian"], "unknown command 'trian'; there are train, "),
        (["models", "--yaml"], "fedtorch models has no option --yaml; it has --json"),
        (["models", "--json=1"], "--json takes no value"),
        (["datasets", "mnist"], "takes no argument, but got 'mnist'"),
    ],
)
def test_bad_input_is_one_sentence(argv, said, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "command, name", [("models", "cnn"), ("datasets", "digits"), ("strategies", "fedavg")]
)
def test_lists_have_a_line_each(command, name, capsys):
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert len(table) == len(lines) and all(table.values())
    assert any(line.split()[0] == name for line in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_a_process_of_its_own_does_not_search_what_it_imported_for_garbage(monkeypatch, capsys):
    order = []
    monkeypatch.setattr(gc, "freeze", lambda: order.append(capsys.readouterr().out))
    monkeypatch.setattr(sys, "argv", ["fedtorch", "version"])
    assert run() == 0 and order == [""]  # once, and before the command
    assert capsys.readouterr().out.strip()[0].isdigit()
