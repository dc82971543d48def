"""``fedtorch audit``: whether a run's privacy claim stands up to an attack."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from fedtorch.commands.options import words_and_options
from fedtorch.commands.runs import print_damaged
from fedtorch.commands.train import train_module
from fedtorch.privacy.findings import Findings
from fedtorch.run import cli, objects, results, trust
from fedtorch.run.folder import MADE_BY
from fedtorch.types import ClaimRefuted, ConfigError

TRUST = trust.FLAG.removeprefix("--")
TWIN = "audit"
"""Folder, in the run's, of the same run with canaries."""


def audit(argv: Sequence[str]) -> int:
    """Say what the run's audit has found, or train it once more with canaries; 1 if that refutes it."""
    takes = {"canaries": True, "guesses": True, "json": False, TRUST: False}
    words, given = words_and_options(argv, "audit", takes)
    if len(words) != 1:
        raise ConfigError(f"fedtorch audit takes one run folder, but got {len(words)}")
    options: dict[str, str] = {k: given[k] for k in ("canaries", "guesses") if k in given}
    print_damaged([run := results.load(words[0])])
    found = _kept(run.folder) or _kept(run.folder / TWIN)
    if found is None or options:
        found = _twin(run, options, TRUST in given, "json" in given)
    if "json" in given:
        print(json.dumps(found.table(), indent=2))
    else:
        print(f"privacy: epsilon at most {found.at_most:.3f} (accountant, any attack)")
        print("\n".join(found.words()))
    return int(found.refuted)


def _kept(folder: Path) -> Findings | None:
    """What an audit in this run has found; None: there was none."""
    try:
        table = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))["audit"]
        return Findings.read(table)
    except (OSError, KeyError):
        return None
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{folder / 'privacy.json'} is damaged: {e}") from e


def _twin(run: results.Saved, options: dict[str, str], trusted: bool, aside: bool) -> Findings:
    """The same run once more, with canaries, in a folder of its own inside the run's."""
    if MADE_BY in run.options:
        raise ConfigError(
            f"the run in {run.folder} was made in Python, where its model is: put fedtorch.Audit() among "
            "the observers of its Server"
        )
    if isinstance(run.options.get("sites"), list):
        raise ConfigError(
            f"the run in {run.folder} is a federation's, whose sites alone have its data: audit a "
            "simulation of it, fedtorch train --audit"
        )
    train, file = train_module(), run.folder / "config.toml"
    table: dict[str, Any] = cli.read(file) | {"audit": {"name": "on", **options}}
    known = trusted or trust.remembered(file)
    trust.check({"model": train.Config.model} | table, {}, f"the run in {run.folder}", known)
    names = (TWIN, *(f"{TWIN}-{n}" for n in range(2, 1000)))
    folder = next(run.folder / n for n in names if not (run.folder / n).exists())
    config = objects.construct(train.Config, table | {"run_dir": str(folder), "resume": False})
    print(
        "note: the run is trained once more, with canaries: whoever sees both has seen two releases, and "
        "their epsilons add up",
        file=sys.stderr,
    )
    with redirect_stdout(sys.stderr if aside else sys.stdout), suppress(ClaimRefuted):
        train.train(config)
    found = _kept(folder)
    if found is None:
        raise ConfigError(f"{folder} has no audit: no round was trained")
    return found
