"""kill -9 of a site and of the server while hospitals train, and that each check of it can fail.

The trial that ``benchmarks.hospitals`` publishes with four, with three of them in eight rounds over made-up
tables of the same format.
"""

import copy
import json
import os

import numpy as np
import pytest
import tomli_w

from benchmarks import hospitals_checks as checks
from benchmarks.heart import HOSPITALS
from benchmarks.hospitals import AS_DOWNLOADED, RUNS, Trial, run
from fedtorch import report
from fedtorch.engines import wire

pytestmark = pytest.mark.timeout(300)
ROUNDS = 8
NAMES = ("cleveland", "hungarian", "va")
"""Each is a process; one is killed, one held back, and more than one does a round again."""


def make_tables(folder) -> None:
    """Four files like UCI's: 14 columns, of which 2 and 6 are categories and 10 to 12 mostly missing."""
    draw = np.random.default_rng(0)
    for name, rows in zip(HOSPITALS, (80, 60, 40, 50), strict=True):
        table = draw.normal(size=(rows, 14)).round(3)
        table[:, 2], table[:, 6] = np.arange(rows) % 4 + 1, np.arange(rows) % 3
        table[:, 13] = table[:, 0] > 0
        lines = [
            ",".join("NaN" if k in (10, 11, 12) else f"{v:g}" for k, v in enumerate(r))
            for r in table
        ]
        (folder / f"processed.{name}.data").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A private trial with a site and the server killed, and in which rounds they were."""
    data = tmp_path_factory.mktemp("tables")
    make_tables(data)
    parties = {"names": NAMES, "minimum": len(NAMES)}
    place = tmp_path_factory.mktemp("hospitals")
    trial = Trial(place, ROUNDS, strace=False, scaled=True, **parties)
    try:
        trial.prepare(data, RUNS["private"])
        killed = run(trial)
    finally:
        trial.close()
    assert all(p.poll() is not None for p in trial.processes.values())
    return trial, data, killed


def test_hospitals_train_over_tls_through_kill_9(done):
    trial, data, killed = done
    told = [*checks.everything(trial, data, killed)]
    assert f"training ended at round {ROUNDS}, each round counted once" in told
    assert any(t.startswith("server opened no hospital's file (audit hook") for t in told)
    assert sum("ledger: " in t for t in told) == 1 + len(NAMES)
    figures = json.loads((trial.folder / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert figures["nonprivate_site_va_reported"] == 1 and figures["nonprivate_site_va_seconds"] > 0
    assert not [k for k in figures if k.startswith("site_")]
    page = report(trial.folder / "run").read_text()
    assert "Sites" in page and ">cleveland</th>" in page and "At most: epsilon" in page
    assert page.count("Not private") == 1


def test_an_opened_table_is_noticed(done):
    trial, data, _ = done
    names = ("server", "cleveland")
    before = [(trial.folder / "notes" / n / "opened.txt").read_text() for n in names]
    for name, text in zip(names, before, strict=True):
        notes = trial.folder / "notes" / name / "opened.txt"
        for path in (trial.rows("va"), data / "processed.va.data"):
            notes.write_text(f"{text}{path.resolve()}\n")
            with pytest.raises(checks.Broken, match=f"{name} opened nobody else's file"):
                checks.who_opened_what(trial, name, data)
        notes.write_text("")
        with pytest.raises(checks.Broken, match="awake"):
            checks.who_opened_what(trial, name, data)
        notes.write_text(text)


def test_rows_and_strange_numbers_in_a_message_are_noticed(done):
    trial, _, _ = done
    messages = trial.received()
    row = checks.numbers(trial.rows("va"))[3]
    for kind in (np.float32, np.float64):
        hidden = [*messages, {"method": "fetch", "data": b"..." + row.astype(kind).tobytes()}]
        with pytest.raises(checks.Broken, match="no row of va"):
            checks.no_row_arrived(hidden, {"va": checks.numbers(trial.rows("va"))})
    at = next(k for k, m in enumerate(messages) if m["method"] == "report")
    for group, why in (("rows", "only an update"), ("metrics", "only known figures")):
        changed = copy.deepcopy(messages)
        report = wire.decode(changed[at]["data"])
        report.groups.setdefault(group, {})["x"] = next(iter(report.groups[""].values()))
        changed[at]["data"] = wire.encode(report)
        with pytest.raises(checks.Broken, match=why):
            checks.only_updates_arrived(changed, 18)
    with pytest.raises(checks.Broken, match="model's size"):
        checks.only_updates_arrived(messages, 17)
    changed = [m | {"method": "fetch"} for m in messages]
    with pytest.raises(checks.Broken, match="no tensor"):
        checks.only_updates_arrived(changed, 18)


def test_lost_charges_and_noise_used_twice_are_noticed(done):
    trial, _, killed = done
    messages, folder = trial.received(), trial.folder
    ledger = folder / "va/state/ledger-example.jsonl"
    text = ledger.read_text()
    lines = text.splitlines(keepends=True)
    for changed in (lines[:-1], [*lines, lines[-1]]):
        ledger.write_text("".join(changed))
        with pytest.raises(checks.Broken, match="va's ledger"):
            checks.site_ledger(folder, "va", ROUNDS, messages, killed)
    ledger.write_text(text)
    with pytest.raises(checks.Broken, match="the server's ledger"):
        checks.server_ledger(folder, ROUNDS, trial.names, {"server": killed["server"] + 1})
    first: dict[tuple[str, int], dict] = {}
    for m in messages:
        if m["method"] == "report":
            message = wire.decode(m["data"])
            groups = first.setdefault((m["site"], message.facts["round"]), message.groups)
            m["data"] = wire.encode(wire.Message("report", message.facts, groups))
    with pytest.raises(checks.Broken, match="other noise"):
        checks.noise_is_fresh(messages, killed)


def test_a_round_that_is_missing_or_counted_twice_is_noticed(done):
    trial, _, _ = done
    with pytest.raises(checks.Broken, match="each round counted once"):
        checks.rounds_are_complete(trial.folder, ROUNDS - 1)
    path = trial.folder / "run/metrics.jsonl"
    text = path.read_text()
    path.write_text(text + json.dumps({"round": ROUNDS}) + "\n")
    with pytest.raises(checks.Broken, match="each round counted once"):
        checks.rounds_are_complete(trial.folder, ROUNDS)
    path.write_text(text)


def test_a_server_that_reads_a_table_is_caught(done):
    """The negative control: this server is given a hospital's table to test its model on."""
    trial, data, _ = done
    other = Trial(
        trial.folder / "control", 1, strace=False, scaled=True, port=trial.port, names=trial.names
    )
    for name in ("control", *(f"control/{n}" for n in trial.names)):
        (trial.folder / name).mkdir()
    os.link(trial.rows("va"), other.rows("va"))
    text = (trial.folder / "serve.toml").read_text().replace("minimum = 3", "minimum = 4")
    own = {"dataset": {"name": "csv", "path": str(other.rows("va")), **AS_DOWNLOADED}}
    (other.folder / "serve.toml").write_text(
        text.replace(str(trial.folder / "run"), str(other.folder / "run")) + tomli_w.dumps(own)
    )
    other.start("server")
    # it reads the table, then finds minimum too large
    assert other.processes["server"].wait(60) == 2
    notes = other.folder / "notes/server/opened.txt"
    notes.write_text(notes.read_text() + str(other.folder.resolve() / "run/metrics.jsonl\n"))
    with pytest.raises(checks.Broken, match="server opened nobody else's file"):
        checks.who_opened_what(other, "server", data)
