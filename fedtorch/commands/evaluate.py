"""``fedtorch eval``: figures of a trained model, by client, and what is taken for what."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from fedtorch.commands.options import words_and_options
from fedtorch.commands.runs import print_damaged
from fedtorch.commands.use import TRUST, note, trained
from fedtorch.data import partition
from fedtorch.privacy.run import mark
from fedtorch.recipe import Recipe
from fedtorch.run import (
    by_client,
    checkpoint,
    cli,
    compared,
    files,
    objects,
    results,
    setup,
    steps,
    trust,
)
from fedtorch.run.console import show_table
from fedtorch.run.folder import MADE_BY
from fedtorch.training.evaluate import Judge, evaluate, evaluate_clients
from fedtorch.training.losses import Loss
from fedtorch.training.personal import GROUP
from fedtorch.training.predict import confusion
from fedtorch.types import ConfigError

Figures = dict[str, Any]

PATH = "dataset.path"

MATRIX_CLASSES = 20
"""Classes up to which the matrix is a table on a screen."""


def evaluate_run(argv: Sequence[str]) -> int:
    """Loss and metrics on the test set, and on the clients' validation data where there is some."""
    takes = {"json": False, PATH: True, TRUST: False}
    words, given = words_and_options(argv, "eval", takes)
    if len(words) != 1:
        raise ConfigError(f"fedtorch eval takes one run folder, but got {len(words)}")
    run, as_json = results.load(words[0]), "json" in given
    if MADE_BY in run.options:
        return recorded(run, as_json, "the run was made in Python, where its model and data are")
    if isinstance(run.options.get("sites"), list):
        return federation(run, as_json, TRUST in given, given.get(PATH, ""))
    return simulated(words[0], as_json, TRUST in given, given.get(PATH, ""))


def simulated(folder: str, as_json: bool, trusted: bool, place: str = "") -> int:
    """A run of ``fedtorch train``, whose data and model are here; the data in ``place``, if they moved."""
    run = trained(folder, trusted, judged=True, path=place)
    config, data = run.config, run.data
    loss, _ = setup.loss_and_metrics(data.kind, config.loss, config.metrics)
    step = steps.function_named("step", config.step) if config.step else None
    recipe = Recipe(loss=loss) if step is None else Recipe(step=step)
    asked = config.eval_step, data.kind, config.metrics, run.model, data.test
    metrics, judge = steps.judging(recipe, *asked)
    figures = judged(run.model, data.test, metrics, judge)
    table: list[dict[str, Any]] = []
    private = config.privacy
    # the clients' own rows are not covered
    if config.validation and not (private and private.strict):
        ids, parts = partition(data, config.partition, config.clients, config.seed)
        clients = setup.clients(data, ids, parts, config.validation, config.seed)
        own = {}
        # each client with what it keeps, which the last checkpoint has
        if config.strategy.personal:
            saved = checkpoint.load(Path(folder) / "checkpoints")["memory"]
            own = {i: m[GROUP] for i, m in saved.items() if GROUP in m}
        each = evaluate_clients(run.model, clients, metrics, own, judge, told=note)
        of_clients = by_client.figures(each)
        figures |= mark(private, of_clients) if private else of_clients
        table = by_client.rows(each, metrics, len(each))
    counts = None if config.step else confusion(run.model, data.test, data.kind)
    names = data.preparation.classes
    found = None if counts is None else compared.of_counts(counts.tolist(), names)
    tell_figures(figures, found, as_json)
    if table and not as_json:
        show_clients(table, private is not None)
    return 0


def judged(
    model: nn.Module, test: Dataset, metrics: Mapping[str, Loss], judge: Judge | None
) -> Figures:
    """Figures of the test set."""
    return {f"test_{k}": v for k, v in evaluate(model, test, metrics, step=judge).items()}


def federation(run: results.Saved, as_json: bool, trusted: bool, place: str = "") -> int:
    """A run of ``fedtorch serve``: judged on the server's own test data; without such as written down."""
    from fedtorch.sites import serve  # gRPC and certificates come with it
    from fedtorch.sites.options import ServeConfig

    if run.options.get("dataset") in (None, "null"):
        return recorded(run, as_json, "the server of these sites has no test data of its own")
    print_damaged([run])
    path = run.folder / "config.toml"
    table = cli.read(path)
    table = cli.merge(table, {"dataset": {"path": place}}) if place else table
    known = trusted or trust.remembered(path)
    trust.check({"model": ServeConfig.model} | table, {}, f"the run in {run.folder}", known)
    config = objects.construct(ServeConfig, table)
    plan = replace(serve.make_plan(config, ""), **serve.known(run.folder, True))
    model, recipe = plan.build()
    files.read_model(run.folder, model, "serve")
    model.eval()
    own = serve.own_data(config, plan)
    test = serve.own_test(own, plan)
    assert own is not None and test is not None
    figures = judged(model, test, *plan.judging(recipe, model, test))
    counts = None if config.step else confusion(model, test, config.kind)
    found = None if counts is None else compared.of_counts(counts.tolist(), own.preparation.classes)
    tell_figures(figures, found, as_json)
    if not as_json:
        show_sites(run)
    return 0


def recorded(run: results.Saved, as_json: bool, why: str) -> int:
    """What a run wrote down of its last round, which nothing here can judge again: ``why`` not."""
    print_damaged([run])
    kept = run.summary.get("model_of_round")
    last = next((m for m in run.history if m["round"] == kept), run.history.last())
    figures = {k: v for k, v in last.items() if "test_" in k or "validation_" in k}
    note(f"{why}: these are the figures of round {last.get('round', 0)} as it wrote them down")
    tell_figures(figures, compared.matrix(run), as_json)
    scores = compared.last_scores(run)
    if scores and not as_json:
        names = dict.fromkeys(k for s in scores.values() for k in s)
        whole = {i: {k: s.get(k, math.nan) for k in names} for i, s in scores.items()}
        show_clients(
            by_client.rows(whole, {}, len(whole)), "nonprivate_validation_by_client" in last
        )
    elif not as_json:
        show_sites(run)
    return 0


def tell_figures(figures: Figures, found: compared.Matrix | None, as_json: bool) -> None:
    """Figures a line each and the confusion matrix below, or all as JSON."""
    if as_json:
        plain = {k: None if v != v else v for k, v in figures.items()}
        matrix = {"confusion": {"classes": found.names, "counts": found.counts}} if found else {}
        print(json.dumps(plain | matrix))
        return
    told = {k.replace("_", " "): v for k, v in figures.items() if isinstance(v, float)}
    width = max(map(len, told), default=0)
    for k, v in told.items():
        print(f"{k:<{width}} {by_client.word(v)}")
    if found is None:
        return
    if len(found.names) > MATRIX_CLASSES:
        print("most often taken for another class, on the test set")
        worst = found.mistakes(10)
        show_table([{"class": a, "taken for": b, "times": n} for a, b, n in worst])
        return
    print(
        "what is taken for what on the test set: a row for what it is, a column for what it is taken for"
    )
    rows = zip(found.names, found.counts, strict=True)
    show_table(
        [
            {"is": n, **{f"{c} ": v or "" for c, v in zip(found.names, row, strict=True)}}
            for n, row in rows
        ]
    )


def show_clients(table: Sequence[Mapping[str, Any]], private: bool) -> None:
    """A line for each client, by name."""
    print(by_client.title(private))
    show_table(table)


def show_sites(run: results.Saved) -> None:
    """A line for each site, by name: in how many rounds it reported, and what travelled."""
    if rows := compared.of_sites(run):
        print("sites")
        show_table(rows)
