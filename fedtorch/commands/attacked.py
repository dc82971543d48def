"""``fedtorch attack``: what somebody who sees a run's updates or its model can find out of its data."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.attacks.gradient import GradientAttack, invert
from fedtorch.attacks.membership import MembershipAttack, Train, infer
from fedtorch.commands.options import words_and_options
from fedtorch.commands.train import train_module
from fedtorch.commands.use import TRUST, Trained, note, trained
from fedtorch.data import partition
from fedtorch.data.base import subset
from fedtorch.options import near
from fedtorch.run import attacked, objects, results, setup
from fedtorch.run.console import show_table
from fedtorch.run.sections import from_json
from fedtorch.server import Server
from fedtorch.training.losses import Loss
from fedtorch.types import ConfigError

OPTIONS: dict[str, type] = {"gradient": GradientAttack, "membership": MembershipAttack}


def attack(argv: Sequence[str]) -> int:
    """Attack a run by one way; say what was found and where the pictures are."""
    names = {f.name: True for kind in OPTIONS.values() for f in fields(kind)}
    words, given = words_and_options(argv, "attack", names | {"json": False, TRUST: False})
    if len(words) != 2 or words[0] not in OPTIONS:
        hint = near(words[0], OPTIONS) if words and words[0] not in OPTIONS else ""
        raise ConfigError(
            "fedtorch attack takes gradient or membership, and a run folder: fedtorch attack gradient "
            f"RUN{hint}"
        )
    name, folder = words
    table = {k: v for k, v in given.items() if k in names}
    takes = [f.name for f in fields(OPTIONS[name])]
    if odd := [k for k in table if k not in takes]:
        raise ConfigError(
            f"fedtorch attack {name} has no option --{odd[0]}; it has "
            f"{', '.join(f'--{k}' for k in takes)}"
        )
    options = objects.construct(OPTIONS[name], table, "attack")
    if isinstance(results.load(folder).options.get("sites"), list):
        raise ConfigError(
            f"the run in {folder} is a federation's, whose sites alone have its data: a site attacks a "
            "simulation of its own data, fedtorch train"
        )
    run = trained(folder, TRUST in given, again=True)
    plan = run.config.plan
    note(f"this attack reads the raw examples of the run, and what it writes is {attacked.OWNERS}")
    found = (_gradient if name == "gradient" else _membership)(run, Path(folder), options)
    figures, png, rows, said = found
    path = attacked.write(
        Path(folder), name, figures, png, _curves(figures), plan, run.config.tracking
    )
    if "json" in given:
        print(json.dumps(figures, indent=2))
        return 0
    show_table(rows)
    for line in said:
        print(line)
    print(f"picture: {path}")
    return 0


Found = tuple[dict[str, Any], bytes, list[dict[str, Any]], list[str]]
"""Figures, picture, rows of a table, and what else is to be said."""


def _gradient(run: Trained, folder: Path, options: GradientAttack) -> Found:
    config, data = run.config, run.data
    ids, parts = partition(data, config.partition, config.clients, config.seed)
    clients = setup.clients(data, ids, parts, 0.0, config.seed)
    # the first round is the one to look at: from the weights that the run has started from
    model = train_module().make_model(config, data)
    found = invert(model, clients, config.recipe(_loss(run)), options, seed=config.seed)
    said = [f"note: {n}" for n in found.notes]
    if found.mean_off is not None:
        said.append(
            f"under masks one message is noise, and the mean opened is right to {found.mean_off:.1g}"
        )
    table = found.table()
    return table, attacked.gradient_picture(found), attacked.gradient_rows(table), said


def _membership(run: Trained, folder: Path, options: MembershipAttack) -> Found:
    config, data = run.config, run.data
    if config.strategy.keeps:
        raise ConfigError(
            "attack membership asks the model that all clients share, and the run's strategy has clients "
            "keep parts of it, or models of their own: attack a run of another strategy"
        )
    ids, parts = partition(data, config.partition, config.clients, config.seed)
    rows = torch.cat([*parts]).sort().values
    began, models = time.perf_counter(), options.shadows + 1

    def told(done: int) -> None:
        if done == 1:
            seconds = models * (time.perf_counter() - began)
            note(f"{models} models are trained as the run was, in about {seconds:,.0f} s")

    found = infer(
        retrained(run, ids, parts, rows), subset(data.train, rows), data.test, data.kind, options,
        own=run.model, seed=config.seed, told=told,
    )  # fmt: skip
    table = found.table()
    most = from_json(folder / "privacy.json").get("true_positives_at_1_percent_false_ones_at_most")
    claimed = isinstance(most, int | float) and config.plan.unit == "example"
    said = [
        f"right on members {found.train:.3f}, on others {found.test:.3f}; the attacker is "
        f"{table['who_sees_what']}"
    ]
    if claimed:
        table["any_attack_finds_at_most"] = most
        said.append(
            f"any attack finds at most {most:.3f} at 1 % false alarms (accountant): this one being weaker "
            "proves nothing"
        )
    elif config.plan.claims:
        said.append(
            "the plan hides whole clients; the attack asks after single examples, which is less"
        )
    return table, attacked.membership_picture(found), attacked.membership_rows(table), said


def retrained(run: Trained, ids: Sequence[str], parts: Sequence[Tensor], rows: Tensor) -> Train:
    """Trains the run's federation anew on some of its examples; a client that has none of them is away."""
    config, data = run.config, run.data
    loss, metrics = setup.loss_and_metrics(data.kind, config.loss, config.metrics)

    def one(inside: np.ndarray, seed: int) -> nn.Module:
        there = torch.zeros(len(data.train), dtype=torch.bool)  # type: ignore[arg-type]
        there[rows[torch.from_numpy(inside)]] = True
        own = [(i, p[there[p]]) for i, p in zip(ids, parts, strict=True) if there[p].any()]
        names, kept = [i for i, _ in own], [p for _, p in own]
        server = Server(
            train_module().make_model(config, data),
            setup.clients(data, names, kept, 0.0, config.seed),
            config.recipe(loss),
            participation=config.participation,
            pace=config.pace,
            schedule=config.schedule,
            engine=config.engine,
            seed=seed,
            threat=config.threat,
        )
        watched = config.callbacks()
        test, asked = (data.test, metrics) if watched else (None, None)
        with closing(server):
            server.fit(config.rounds, test, asked, callbacks=watched, progress=False)
        return server.model

    def train(inside: np.ndarray, seed: int) -> Iterator[nn.Module]:
        for k, row in enumerate(inside):
            yield one(row, seeds.derive(seed, "attack", k))

    return train


def _loss(run: Trained) -> Loss:
    return setup.loss_and_metrics(run.data.kind, run.config.loss, run.config.metrics)[0]


def _curves(table: dict[str, Any]) -> dict[str, float]:
    """Figures for TensorBoard, of a table."""
    if table["attack"] == "gradient":
        return {f"psnr_{k}": v["psnr_median"] for k, v in table["views"].items()}
    kinds = {"": table["attacks"], "_own_model": table["own_model"]}
    return {
        f"{name.lower()}_{k}{end}": v
        for end, attacks in kinds.items()
        for name, figures in attacks.items()
        for k, v in figures.items()
    }
