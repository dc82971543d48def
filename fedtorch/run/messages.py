"""What a run says to the person who started it: before the first round, and after the last."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtorch.recipe import Recipe
from fedtorch.rounds.progress import amount
from fedtorch.rounds.synchronous import Synchronous
from fedtorch.rounds.threat import Attacked
from fedtorch.run import cli, files, huggingface, trust
from fedtorch.run.audited import found_in
from fedtorch.run.by_client import word
from fedtorch.run.console import Report
from fedtorch.run.names import worded
from fedtorch.run.report import cost, promise, statement, text
from fedtorch.server import Server
from fedtorch.tracking import Record


def introduce(report: Report, opening: str, server: Server, who_has_what: Any = None) -> None:
    """Model, privacy promise, the engine's choices, and who got what, where that is known here."""
    model, private = server.model, server.private
    size = sum(p.numel() for p in model.parameters())
    report.say(f"{opening}, {size:,} parameters, {worded(server.recipe.strategy)}")
    for part in _parts(server):
        report.say(part)
    for line in promise(private) if private else ["no privacy: nothing is noised"]:
        report.say(line)
    for note in server.notes:
        report.say(f"note: {note}")
    kinds = {b.is_floating_point() for b in model.buffers()}
    if kinds:
        kept = " (others keep the server's value)" if False in kinds else ""
        report.say(f"note: float buffers such as BatchNorm statistics are averaged{kept}")
    if server.round_number:
        report.say(f"resumed after round {server.round_number}")
    elif who_has_what is not None and not strict(server):  # who has what is nobody's to know
        report.say(who_has_what)


def _parts(server: Server) -> list[str]:
    """Aggregator, threat, channel and pace, a line each, where they are not the usual ones."""
    recipe, lies = server.recipe, list[str]()
    rule: Any = recipe.aggregator
    if isinstance(rule, Attacked):
        who = ", ".join(rule.who)
        them = f"clients {who} lie" if len(rule.who) > 1 else f"client {who} lies"
        lies = [f"threat {worded(rule.threat)}: {them}"]
        rule = rule.rule
    return [
        *([f"aggregator {worded(rule)}"] if rule != Recipe().aggregator else []),
        *lies,
        *(f"channel {worded(stage)}" for stage in recipe.channel),
        *([f"pace {worded(server.pace)}"] if server.pace != Synchronous() else []),
    ]


def starting_score(
    record: Record, report: Report, scores: Mapping[str, float], server: Server
) -> None:
    """Round 0 of a new run: how good the model is before any training, where there is a test set."""
    if scores and not server.round_number:
        figures: dict[str, Any] = {"round": 0, **{f"test_{k}": v for k, v in scores.items()}}
        record.round(figures)
        report.round(figures)


def strict(server: Server) -> bool:
    """Whether nothing is told but what the privacy guarantee covers."""
    return server.private is not None and server.private.plan.strict


def record_privacy(record: Record, server: Server) -> None:
    """What a private run has spent, for the trackers."""
    if server.private:
        lines = [text(server.private, server.clients), *(f"    {line}" for line in _audit(server))]
        record.text("privacy", "\n".join(lines), server.round_number)


def write_results(report: Report, folder: Path, summary: dict[str, Any], server: Server) -> None:
    """``summary.json`` and ``privacy.json``; one that cannot be written is said, and costs no more.

    Under strict privacy the summary loses how long the run took. It says whether the model ``learned``.
    """
    summary["learned"] = server.moved() if server.round_number else None
    if strict(server):
        summary.pop("seconds", None)
    report.attempt("summary.json", files.write_json, folder / "summary.json", summary)
    if server.private:
        report.attempt("privacy.json", _write_statement, folder / "privacy.json", server)
    report.attempt(files.SUMS, files.write_sums, folder)


def _write_statement(path: Path, server: Server) -> None:
    if server.private:
        found = found_in(server)
        audit = {"audit": found.table()} if found else {}
        files.write_json(path, statement(server.private, server.clients) | audit)


def _audit(server: Server) -> list[str]:
    """What an audit has found, a line each."""
    found = found_in(server)
    return found.words() if found else []


def conclude(
    report: Report,
    folder: Path,
    summary: Mapping[str, Any],
    server: Server,
    why: str,
    go_on: bool = False,
    clients: str = "",
) -> None:
    """Five lines: how good, how private, ``why`` it ended, the best and worst ``clients``, and where it is.

    ``go_on``: the run was stopped, and can be continued.
    """
    state = "stopped, saved" if go_on else "done" if server.moved() else "nothing learned"
    scores = {k: v for k, v in summary.items() if k.startswith("test_") and v is not None}
    figures = [f"{k.replace('_', ' ')} {word(v)}" for k, v in scores.items() if k != "test_loss"]
    figures += [f"test loss {word(v)}" for k, v in scores.items() if k == "test_loss"]
    took = f" in {summary['seconds']:.1f} s" if "seconds" in summary else ""
    report.say("  ".join([f"{state}: {amount(summary['rounds'], 'round')}{took}", *figures]))
    report.say(f"privacy: {cost(server.private, server.clients) if server.private else 'none'}")
    for line in _audit(server) if server.private else []:
        report.say(line)
    report.say(f"ended because {why}{_continued(folder) if go_on else ''}")
    if clients:
        report.say(clients)
    drawn = any(folder.glob("events.out.tfevents.*"))
    watch = f"   watch: tensorboard --logdir {folder.parent}" if drawn else ""
    report.say(f"run folder: {folder} (model.safetensors; fedtorch report draws it){watch}")
    if beside := huggingface.beside_weights(folder):
        report.say(beside)


def _continued(folder: Path) -> str:
    config = folder / "config.toml"
    asked = trust.foreign(cli.read(config)) and not trust.remembered(config)
    flag = f" {trust.FLAG}" if asked else ""
    return f"; continue: fedtorch train --run-dir {folder} --resume{flag}"
