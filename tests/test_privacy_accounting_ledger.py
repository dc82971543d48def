"""The ledger: what it charges, and that no charge can be lost, changed or taken back."""

import errno
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtorch import disk
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.journal import Journal
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.types import ConfigError

STEP = Event("gaussian", 2.0, 0.1, 5)
FULL = Event("gaussian", 8.0)
DELTA = 1e-5


def journalled(path: Path, rounds: int = 3) -> Ledger:
    ledger = Ledger(path)
    for r in range(rounds):
        ledger.charge(r, STEP, ["a", "b"] if r % 2 else ["a"])
    return ledger


def test_rounds_add_up_over_the_whole_run() -> None:
    ledger = Ledger(unit="client")
    seen = []
    for r in range(4):
        ledger.charge(r, STEP)
        seen.append(ledger.spent(DELTA))
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    assert seen[-1] == epsilon([Event("gaussian", 2.0, 0.1, 20)], DELTA)


def test_clients_hold_different_data_so_the_run_costs_the_largest() -> None:
    ledger = Ledger()
    ledger.charge(0, STEP, ["a", "b"])
    ledger.charge(1, STEP, ["a"])
    ledger.charge(1, FULL, ["c"])
    by_client = ledger.spent_by_client(DELTA)
    assert by_client == {
        "a": epsilon([STEP, STEP], DELTA),
        "b": epsilon([STEP], DELTA),
        "c": epsilon([FULL], DELTA),
    }
    assert ledger.spent(DELTA) == max(by_client.values())


def test_what_is_charged_to_everyone_adds_to_each_client() -> None:
    ledger = Ledger()
    assert ledger.spent(DELTA) == 0
    ledger.charge(0, FULL)
    assert ledger.spent(DELTA) == epsilon([FULL], DELTA)
    ledger.charge(0, STEP, ["a"])
    assert ledger.spent(DELTA) == epsilon([FULL, STEP], DELTA)
    assert ledger.spent_by_client(DELTA) == {"a": epsilon([FULL, STEP], DELTA)}


def test_asking_does_not_charge() -> None:
    ledger = Ledger()
    ledger.charge(0, STEP, ["a"])
    before = ledger.spent(DELTA)
    for clients in (["a"], ["b"], None, []):
        asked = ledger.would_spend([STEP], clients, DELTA)
        twin = Ledger()
        twin.charge(0, STEP, ["a"])
        twin.charge(1, STEP, clients)
        assert asked == twin.spent(DELTA) >= before
    assert ledger.spent(DELTA) == before
    assert len(ledger) == 1


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_budget_is_kept_to_the_last_round_that_fits(accountant: str) -> None:
    event = Event("gaussian", 1.0, 0.05, 20)
    budget = epsilon([Event("gaussian", 1.0, 0.05, 100)], DELTA, accountant)
    ledger, rounds = Ledger(), 0
    while ledger.fits([event], ["a"], budget, DELTA, accountant):
        ledger.charge(rounds, event, ["a"])
        rounds += 1
    assert rounds == 5
    assert ledger.spent(DELTA, accountant) == budget
    assert ledger.fits([event], ["b"], budget, DELTA, accountant)  # b has not spent anything


def test_thousands_of_clients_are_priced_by_their_history() -> None:
    ledger = Ledger()
    for r in range(20):
        ledger.charge(r, STEP, [str(i) for i in range(r * 50, 3000)])
    start = time.process_time()
    most = ledger.spent(DELTA)
    assert time.process_time() - start < 3
    assert most == epsilon([Event("gaussian", 2.0, 0.1, 100)], DELTA)
    assert len(set(ledger.spent_by_client(DELTA).values())) == 20


def test_a_client_is_not_charged_twice_by_one_entry() -> None:
    with pytest.raises(ConfigError, match="charged twice"):
        Ledger().charge(0, STEP, ["a", "a"])


def test_units() -> None:
    with pytest.raises(ConfigError, match="unit must be example or client, got 'sample'"):
        Ledger(unit="sample")
    assert Ledger(unit="client").charge(0, STEP).unit == "client"


def test_an_entry_cannot_be_changed() -> None:
    entry = Ledger().charge(0, STEP)
    with pytest.raises(AttributeError):
        entry.round = 5  # type: ignore[misc]


def test_in_memory_the_checkpoint_carries_everything() -> None:
    ledger = Ledger()
    ledger.charge(0, STEP, ["a"])
    ledger.charge(0, FULL)
    state = json.loads(json.dumps(ledger.state_dict()))
    again = Ledger.resume(None, state)
    assert again.entries == ledger.entries
    assert again.spent(DELTA) == ledger.spent(DELTA)
    state["entries"][0]["noise"] = 20.0
    with pytest.raises(ConfigError, match="checkpoint's privacy ledger was edited: entry 1"):
        Ledger.resume(None, state)
    state["entries"] = state["entries"][1:]
    with pytest.raises(ConfigError, match="shortened: it holds 1 entries, the checkpoint 2"):
        Ledger.resume(None, state)


def test_a_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = journalled(path)
    state = ledger.state_dict()
    assert "entries" not in state  # the journal has them
    again = Ledger.resume(path, json.loads(json.dumps(state)))
    assert again.entries == ledger.entries
    again.charge(3, FULL)
    assert [e.round for e in Ledger.resume(path, state).entries] == [0, 1, 2, 3]


def test_rounds_after_the_checkpoint_stay_charged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = journalled(path)
    state = ledger.state_dict()
    ledger.charge(3, STEP, ["a"])
    resumed = Ledger.resume(path, state)
    assert resumed.spent(DELTA) == ledger.spent(DELTA)
    resumed.charge(3, STEP, ["a"])  # the round is trained again, with fresh noise: a second release
    assert len(resumed) == 5


def cut_entry(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def no_entries(lines: list[bytes]) -> list[bytes]:
    return lines[:1]


def less_steps(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"steps": 5', b'"steps": 1'), *lines[2:]]


def last_less(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1].replace(b'"noise": 2.0', b'"noise": 9.0')]


def other_client(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b'"b"', b'"z"'), *lines[3:]]


def dropped_middle(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], *lines[3:], lines[2]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def garbage(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b"garbage", *lines[3:]]


def rehashed(lines: list[bytes]) -> list[bytes]:
    # a forger who knows how digests are made still cannot meet the checkpoint's
    forged = Ledger()
    forged.header = json.loads(lines[0])
    forged._reset(forged.header, None)
    out = [lines[0]]
    for line in lines[1:]:
        old = json.loads(line)
        entry = forged.charge(old["round"], Event("gaussian", 50.0), old["clients"])
        out.append(json.dumps(entry.body() | {"digest": entry.digest}).encode())
    return out


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (cut_entry, "shortened: it holds 2 entries, the checkpoint 3"),
        (no_entries, "shortened: it holds 0 entries"),
        (less_steps, "edited: entry 1 does not match its digest"),
        (last_less, "edited: entry 3 does not match its digest"),
        (other_client, "edited: entry 2"),
        (dropped_middle, "edited: entry 2"),
        (swapped, "edited: entry 1"),
        (garbage, "edited: entry 2"),
        (rehashed, "edited: its first 3 entries are not the checkpoint's"),
    ],
)
def test_tampering_is_refused(
    tmp_path: Path, tamper: Callable[[list[bytes]], list[bytes]], reason: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    state = journalled(path).state_dict()
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(tamper(lines)) + b"\n")
    with pytest.raises(ConfigError, match=reason) as e:
        Ledger.resume(path, state)
    assert str(path) in str(e.value)


def test_a_missing_or_foreign_journal_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger.jsonl", tmp_path / "other.jsonl"
    state = journalled(path).state_dict()
    journalled(other)
    with pytest.raises(ConfigError, match=r"other\.jsonl is another run's"):
        Ledger.resume(other, state)
    path.unlink()
    with pytest.raises(ConfigError, match=r"ledger\.jsonl cannot be read \(No such file"):
        Ledger.resume(path, state)
    with pytest.raises(ConfigError, match="cannot be resumed without it"):
        Ledger.resume(None, state)
    for nothing in (None, {}):
        with pytest.raises(ConfigError, match="no privacy ledger"):
            Ledger.resume(other, nothing)


def test_a_new_run_does_not_write_over_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(path)
    Ledger(path)  # nothing was charged to the first: nothing is lost
    journalled(tmp_path / "used.jsonl")
    with pytest.raises(ConfigError, match="is another run's"):
        Ledger(tmp_path / "used.jsonl")


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, -2])
def test_a_last_line_cut_short_by_a_kill_is_dropped(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = journalled(path)
    state = ledger.state_dict()
    before = path.read_bytes()
    ledger.charge(3, FULL)
    line = path.read_bytes()[len(before) :]
    length = int(kept * len(line)) if 0 < kept < 1 else int(kept) % len(line)
    path.write_bytes(before + line[:length])
    resumed = Ledger.resume(path, state)
    assert path.read_bytes() == before
    assert len(resumed) == 3
    resumed.charge(3, FULL)
    assert path.read_bytes() == before + line


def test_a_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = journalled(path)
    state = ledger.state_dict()
    ledger.charge(3, FULL)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    resumed = Ledger.resume(path, state)
    assert path.read_bytes() == whole
    assert resumed.entries == ledger.entries


def test_a_cut_line_that_the_checkpoint_knows_is_a_shortened_journal(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    state = journalled(path).state_dict()
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="shortened"):
        Ledger.resume(path, state)


def test_two_processes_do_not_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = journalled(path)
    second = Ledger.resume(path, first.state_dict())
    second.charge(3, STEP, ["a"])
    with pytest.raises(ConfigError, match="only one process may write it"):
        first.charge(3, STEP, ["a"])
    assert len(first) == 3  # what could not be written was not charged, and so must not be released


def test_a_journal_that_cannot_be_written_stops_the_round(tmp_path: Path) -> None:
    ledger = journalled(tmp_path / "ledger.jsonl")
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        ledger.charge(3, STEP)
    assert len(ledger) == 3
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal.create(tmp_path, {})


def test_the_line_is_synced_before_charge_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = journalled(tmp_path / "ledger.jsonl")
    synced: list[int] = []

    def fsync(number: int) -> None:
        synced.append(os.fstat(number).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger.charge(3, STEP)
    assert synced == [(tmp_path / "ledger.jsonl").stat().st_size]


CHILD = """
import json, sys
from pathlib import Path
from fedtorch.privacy.accounting import Event
from fedtorch.privacy.accounting.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print(json.dumps(ledger.state_dict()), flush=True)
for r in range(100000):
    ledger.charge(r, Event("gaussian", 2.0, 0.1, 5), ["a", "b"])
    print("released", r, flush=True)
"""


def test_kill_dash_nine_never_loses_a_release(tmp_path: Path) -> None:
    after = 20
    path = tmp_path / "ledger.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    state: dict[str, Any] = json.loads(child.stdout.readline())
    for _ in range(after):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read().splitlines()
    child.stdout.close()
    child.wait()
    released = after + sum(line.startswith("released") for line in rest)
    resumed = Ledger.resume(path, state)
    assert released <= len(resumed) <= released + 1
    assert resumed.spent(DELTA, "rdp") >= epsilon(
        [Event("gaussian", 2.0, 0.1, 5 * released)], DELTA, "rdp"
    )


CHARGES = st.lists(
    st.tuples(
        st.builds(
            Event,
            st.just("gaussian"),
            st.sampled_from([1.0, 3.0]),
            st.sampled_from([0.1, 1.0]),
            st.integers(1, 9),
        ),
        st.none() | st.lists(st.sampled_from("abc"), unique=True),
    ),
    max_size=5,
)


@settings(max_examples=25, deadline=None)
@given(CHARGES, st.integers(0, 5))
def test_epsilon_never_falls_and_entries_never_change(
    tmp_path_factory: pytest.TempPathFactory, charges: list[Any], saved_after: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger, state, epsilons = Ledger(path), None, [0.0]
    for number, (event, clients) in enumerate(charges):
        if number == saved_after:
            state = ledger.state_dict()
        before = list(ledger.entries)
        expected = ledger.would_spend([event], clients, DELTA)
        ledger.charge(number, event, clients)
        assert ledger.entries[: len(before)] == before
        assert ledger.spent(DELTA) == expected
        epsilons.append(expected)
    assert all(b >= a * (1 - 1e-6) for a, b in itertools.pairwise(epsilons))
    resumed = Ledger.resume(path, state or ledger.state_dict())
    assert resumed.entries == ledger.entries
    assert resumed.spent(DELTA) == epsilons[-1]


def _charges(path, saved, barrier, out):
    ledger = Ledger.resume(path, saved)
    barrier.wait()
    try:
        ledger.charge(1, Event("gaussian", 1.0, 0.1, 5), ["a"])
        out.put("charged")
    except ConfigError as e:
        out.put(str(e))


def test_of_two_processes_that_charge_one_journal_one_is_told(tmp_path):
    context = multiprocessing.get_context("fork")
    for k in range(6):
        path = tmp_path / f"{k}.jsonl"
        ledger = Ledger(path)
        ledger.charge(0, Event("gaussian", 1.0, 0.1, 5), ["a"])
        saved, out, barrier = ledger.state_dict(), context.Queue(), context.Barrier(2)
        both = [context.Process(target=_charges, args=(path, saved, barrier, out)) for _ in "ab"]
        [p.start() for p in both]
        said = sorted(out.get(timeout=30) for _ in both)
        [p.join() for p in both]
        assert said[0] == "charged" and "only one" in said[1], said
        assert len(Ledger.resume(path, saved)) == 2


def test_a_journal_that_another_holds_is_not_written(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    with path.open("r+b") as file, disk.held(file):
        with pytest.raises(ConfigError, match="is being written by another process; only one may"):
            ledger.charge(0, Event("gaussian", 1.0))
        with pytest.raises(ConfigError, match="is being written by another process"):
            Ledger(path)
    ledger.charge(0, Event("gaussian", 1.0))
    assert len(Ledger.resume(path, ledger.state_dict())) == 1


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(number: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(disk, "_take", refuse)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.charge(0, Event("gaussian", 1.0))
    assert len(Ledger.resume(tmp_path / "ledger.jsonl", ledger.state_dict())) == 1
