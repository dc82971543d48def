"""``fedtorch new NAME``: a folder with model, data, options, test and notebook, that trains at once."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtorch.commands.options import words_and_options
from fedtorch.types import ConfigError

TEMPLATE = Path(__file__).parent / "template"
END = ".tmpl"

CELLS = (
    ("markdown", "# @name@\n\nThe same run from Python, without privacy: `run.toml` has a plan, and so "
     "may a `Recipe(privacy=...)`."),
    ("code", "import torch\nfrom data import load\nfrom models.mine import build\n\n"
     "from fedtorch import BestModel, EarlyStopping, Recipe, Server, divide\n\n"
     "torch.manual_seed(0)\ndata = load()\nclients, test = divide(data, validation=0.2)\nclients"),
    ("code", "model = build(data.facts[\"in_features\"], data.facts[\"num_outputs\"])\n"
     "server = Server(model, clients, Recipe(lr=0.1))\n"
     "history = server.fit(20, test, callbacks=[EarlyStopping(patience=4), BestModel()])\nhistory"),
    ("code", "history.plot()"),
    ("code", "server.evaluate_clients()"),
)  # fmt: skip
"""Of the notebook: what each is, and what stands in it."""


def new(argv: Sequence[str]) -> int:
    """Write the folder; raises ConfigError where there is something already."""
    words, _ = words_and_options(argv, "new", {})
    if len(words) != 1:
        raise ConfigError(f"fedtorch new takes the name of a new folder, but got {len(words)}")
    folder = Path(words[0]).expanduser()
    if not re.fullmatch(r"[A-Za-z][\w.-]*", folder.name):
        raise ConfigError(f"{folder.name!r} is no name: letters, digits, - and _, a letter first")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already: choose another name, or empty it")
    try:
        for name, text in files(folder.name).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written: {e.strerror}") from e
    print(f"{folder} has data.py, models/mine.py, run.toml, tests, a notebook and a README")
    print(f"train: cd {folder} && fedtorch train --config run.toml --trust-code")
    return 0


def files(name: str) -> dict[str, str]:
    """What is written for a project of that name, by path."""
    found = {
        str(p.relative_to(TEMPLATE)).removesuffix(END): p.read_text(encoding="utf-8")
        for p in sorted(TEMPLATE.rglob(f"*{END}"))
    }
    found[".gitignore"] = found.pop("gitignore")
    found["look.ipynb"] = notebook()
    return {where: text.replace("@name@", name) for where, text in found.items()}


def notebook() -> str:
    """The cells as a notebook that nobody has run yet."""
    cells = []
    for number, (kind, text) in enumerate(CELLS):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": text,
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    table = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(table, indent=1) + "\n"
