"""The command line: every command answers, bad input is one sentence and exit status 2."""

import ast
import gc
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtorch.__main__ import COMMANDS, main, run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_function(command):
    module, _, name = COMMANDS[command][1].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, (text, _) in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"fedtorch {command}" in out and not err
    assert main(["help", command]) == 0 and capsys.readouterr().out == out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyzzy"], "unknown command 'xyzzy'; there are train, "),
        (["--hlep"], "unknown command '--hlep'; did you mean help?"),
        (["models", "--jsn"], "it has --json; did you mean --json?"),
        (["keys"], "fedtorch keys takes one folder, but got 0: fedtorch keys FOLDER --server"),
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


@pytest.mark.parametrize("command", ["strategies", "aggregators", "channels", "paces", "threats"])
def test_each_algorithm_comes_with_its_paper(command, capsys):
    assert main([command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    without = [
        name for name, text in table.items() if not re.search(r"\d{4}\.\d{5}| 20\d\d\)", text)
    ]
    assert without == (["mean"] if command == "aggregators" else [])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_a_process_of_its_own_does_not_search_what_it_imported_for_garbage(monkeypatch, capsys):
    order = []
    monkeypatch.setattr(gc, "freeze", lambda: order.append(capsys.readouterr().out))
    monkeypatch.setattr(sys, "argv", ["fedtorch", "version"])
    assert run() == 0 and order == [""]  # once, and before the command
    assert capsys.readouterr().out.strip()[0].isdigit()


PRESSED = "raise KeyboardInterrupt\n"
LOST = """import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
raise ImportError("half read")
"""
"""As the compiled part of NumPy does with an exception."""


HEARD = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""What runs tests may ignore Ctrl-C; a copy of it, before exec, may be ended by threads of gRPC."""


@pytest.mark.parametrize("torch", [PRESSED, LOST])
@pytest.mark.parametrize("how", [["-m", "fedtorch", "version"], [str(ROOT / "train.py")]])
def test_ctrl_c_while_torch_is_read_is_one_line(how, torch, tmp_path):
    (tmp_path / "torch.py").write_text(torch)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", HEARD, *how], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "fedtorch: stopped\n")


def test_nothing_else_is_read_before_ctrl_c_is_taken_over():
    body = ast.parse((ROOT / "fedtorch" / "__init__.py").read_text()).body
    before = itertools.takewhile(lambda node: not isinstance(node, ast.With), body)
    imports = [ast.unparse(n) for n in before if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert imports == ["import sys", "from fedtorch.run.interrupts import Reading"]


def test_ctrl_c_while_a_program_imports_fedtorch_is_its_own(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ask = "try:\n    import fedtorch\nexcept KeyboardInterrupt:\n    print('heard')"
    done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (
            OSError(28, "No space left on device", "a.txt"),
            2,
            "fedtorch: a.txt: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "fedtorch: stopped"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(error, code, said, monkeypatch, capsys, tmp_path):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)  # where the run's folder is made before it fails
    monkeypatch.setattr("fedtorch.commands.listing.version", fail)
    assert main(["version"]) == code
    monkeypatch.setattr("fedtorch.run.folder.start", fail)
    assert main(["train", "--privacy", "none", "--rounds", "1"]) == code
    assert capsys.readouterr().err.splitlines() == [said, said]


def test_a_reader_that_is_gone_does_not_pass_for_a_trained_run(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("fedtorch.commands.train.main", fail)
    assert main(["train"]) == 1
    assert "nobody reads" in capsys.readouterr().err


def test_modules_are_found_where_they_stood_before_there_were_rooms():
    for name, attr in (
        ("losses", "accuracy"),
        ("history", "History"),
        ("optimizers", "ServerAdam"),
    ):
        assert hasattr(importlib.import_module(f"fedtorch.{name}"), attr)
