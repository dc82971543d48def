"""The release alone: clip, noise and a ledger for whoever trains elsewhere."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from fedtorch import disk
from fedtorch.privacy import Budget, ClientLevel, LocalDP, SampleLevel
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.alone import release
from fedtorch.types import ConfigError, OverBudget

PLAN = LocalDP(epsilon=8.0, rounds=3, clip=0.5)


class Silent:
    def normal(self, shape):
        return torch.zeros(shape, dtype=torch.float64)


def test_an_update_is_clipped_as_one_vector_and_keeps_its_shapes_and_types():
    update = {"w": torch.tensor([[3.0, 0.0]]), "b": torch.tensor(4.0, dtype=torch.bfloat16)}
    out = release(update, PLAN, Silent())
    assert out["w"].tolist() == [[pytest.approx(0.3), 0.0]] and out["w"].dtype == torch.float32
    assert out["b"].shape == () and out["b"].dtype == torch.bfloat16
    assert out["b"].item() == pytest.approx(0.4, rel=1e-2)
    small = {"w": np.array([0.1, -0.2], np.float16)}
    out = release(small, PLAN, Silent())
    assert out["w"].dtype == np.float16 and (out["w"] == small["w"]).all()


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_the_noise_is_of_the_claimed_law(mechanism):
    plan = LocalDP(epsilon=8.0, rounds=3, clip=0.5, mechanism=mechanism)
    out = release({"w": torch.zeros(20_000)}, plan, plan.stream("release", 0))["w"].double().numpy()
    law = stats.norm if mechanism == "gaussian" else stats.laplace
    assert stats.kstest(out / (2 * 0.5 * plan.calibrated(3)), law.cdf).pvalue > 1e-4


def test_two_updates_differ_by_twice_the_clip_at_most():
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e4):
        one, two = ({"w": scale * torch.randn(9, generator=draw)} for _ in range(2))
        apart = release(one, PLAN, Silent())["w"] - release(two, PLAN, Silent())["w"]
        assert apart.norm() <= 2 * PLAN.clip * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_noise_alone(bad):
    out = release({"w": torch.tensor([1.0, bad]), "b": np.ones(3, np.float32)}, PLAN, Silent())
    assert out["w"].tolist() == [0, 0] and out["b"].tolist() == [0, 0, 0]


def test_what_no_noise_would_cover_is_refused():
    for update, why in [
        ({}, "empty"),
        ({"seen": torch.tensor(3)}, "seen is made of torch.int64"),
        ({"on": np.array([True])}, "on is made of torch.bool"),
    ]:
        with pytest.raises(ConfigError, match=why):
            release(update, PLAN, Silent())


def test_a_plan_that_cannot_stand_alone_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="SampleLevel, not ClientLevel"):
        Budget(tmp_path, ClientLevel(rounds=3))
    rows = SampleLevel(noise_multiplier=1.0)
    with pytest.raises(ConfigError, match="LocalDP, not SampleLevel"):
        Budget(tmp_path, rows, most=1.0).release({"w": torch.zeros(2)}, 0)
    with pytest.raises(ConfigError, match="LocalDP, not SampleLevel"):
        release({"w": torch.zeros(2)}, rows, Silent())
    with pytest.raises(ConfigError, match="for how many rounds"):
        Budget(tmp_path, LocalDP(epsilon=8.0))
    with pytest.raises(ConfigError, match="give most"):
        Budget(tmp_path, LocalDP(noise_multiplier=1.0))
    for most in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="above 0"):
            Budget(tmp_path, PLAN, most=most)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_the_planned_rounds_fit_and_no_more(tmp_path, mechanism, accountant):
    plan = LocalDP(epsilon=2.0, rounds=3, mechanism=mechanism, accountant=accountant)
    budget = Budget(tmp_path, plan, site="north")
    assert budget.spent == 0
    paid = [budget.charge(r) for r in range(3)]
    assert paid == sorted(paid) and paid[-1] == budget.spent == pytest.approx(2.0, abs=2e-3)
    for _ in range(2):
        with pytest.raises(
            OverBudget, match=r"round 3: north would have spent .* than its 2; so far it is"
        ):
            budget.release({"w": torch.zeros(2)}, 3)
    assert len(Ledger.look(tmp_path / "ledger-client.jsonl")) == 3
    assert Budget(tmp_path, plan, site="north").spent == budget.spent


def test_no_two_releases_have_the_same_noise_even_where_epsilon_tells_them_not_apart(tmp_path):
    plan = LocalDP(noise_multiplier=1e7, insecure_seed=3)
    site = Budget(tmp_path, plan, most=1.0)
    a, b = (site.release({"w": torch.zeros(4)}, 0)["w"] for _ in range(2))
    assert not (a == b).any()


def test_of_two_kinds_of_plans_each_has_half_of_delta(tmp_path):
    whole = Budget(tmp_path, LocalDP(noise_multiplier=3.0), most=9.0)
    whole.charge(0)
    rows = Budget(tmp_path, SampleLevel(noise_multiplier=2.0), most=9.0)
    paid = rows.charge(0)
    halves = [Ledger.look(b.path).spent(b.plan.delta / 2, b.plan.accountant) for b in (whole, rows)]
    assert paid == whole.spent == rows.spent == sum(halves)


def test_other_plans_on_the_same_data_go_on_with_what_was_spent(tmp_path):
    Budget(tmp_path, LocalDP(noise_multiplier=3.0), most=9.0).charge(0)
    other = Budget(tmp_path, LocalDP(noise_multiplier=5.0), most=9.0)
    assert other.charge(0) > other.plan.planned(5.0, 1)
    with pytest.raises(OverBudget):
        Budget(tmp_path, LocalDP(noise_multiplier=5.0), most=other.spent).charge(1)


def test_a_release_is_charged_before_anything_is_made(tmp_path, monkeypatch):
    budget = Budget(tmp_path, PLAN)
    monkeypatch.setattr(LocalDP, "noised", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        budget.release({"w": torch.zeros(2)}, 0)
    assert len(Ledger.look(budget.path)) == 1


KILLED = """
import os, signal, sys
import torch
from fedtorch.privacy import Budget, LocalDP, alone

plan = LocalDP(noise_multiplier=20.0, accountant="rdp")

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def child(folder, out, patch):
    alone.note = die if patch == "note" else alone.note
    LocalDP.noised = die if patch == "noised" else LocalDP.noised
    budget = Budget(folder, plan, most=1e3)
    for r in range(10**6):
        sent = budget.release({"w": torch.ones(2)}, r)
        if patch == "send":
            die()
        os.write(out, b".")

for k, patch in enumerate(sys.argv[2:]):
    folder = f"{sys.argv[1]}/{k}"
    Budget(folder, plan, most=1e3).charge(0)
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        os.close(reads)
        child(folder, writes, patch)
    os.close(writes)
    got = b""
    if patch.isdigit():
        while len(got) < int(patch):
            got += os.read(reads, 1)
        os.kill(pid, signal.SIGKILL)
    while more := os.read(reads, 99):
        got += more
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(len(got), flush=True)
"""


def test_a_kill_at_any_moment_leaves_no_release_uncharged(tmp_path):
    moments = ["note", "noised", "send", "1", "2", "5"]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *moments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for k, sent in enumerate(map(int, run.stdout.split())):
        budget = Budget(tmp_path / str(k), LocalDP(noise_multiplier=20.0), most=1e3)
        before = len(Ledger.look(budget.path))
        # one before the kill, all that left, and at most one that did not
        assert 1 + sent <= before <= 2 + sent + (moments[k] == "note")
        assert before >= 2 or moments[k] == "note"
        budget.charge(7)
        assert len(Ledger.look(budget.path)) == before + 1
    assert k == len(moments) - 1


def test_each_release_has_noise_of_its_own(tmp_path):
    plan = LocalDP(noise_multiplier=1.0, insecure_seed=3)
    budget = Budget(tmp_path, plan, most=1e6)
    seen = {tuple(budget.release({"w": torch.zeros(2)}, r)["w"].tolist()) for r in (0, 0, 1)} | {
        tuple(Budget(tmp_path, plan, most=1e6).release({"w": torch.zeros(2)}, 0)["w"].tolist())
    }
    assert len(seen) == 4


def test_a_ledger_that_was_cut_or_is_anothers_is_refused(tmp_path):
    budget = Budget(tmp_path, PLAN, site="north")
    budget.charge(0), budget.charge(1)
    with pytest.raises(ConfigError, match="not of 'south'"):
        Budget(tmp_path, PLAN, site="south")
    lines = budget.path.read_text().splitlines(keepends=True)
    budget.path.write_text("".join(lines[:-1]))
    for use in (lambda: budget.charge(2), lambda: Budget(tmp_path, PLAN, site="north")):
        with pytest.raises(ConfigError, match="shortened"):
            use()
    budget.path.unlink()
    with pytest.raises(ConfigError, match="not known without"):
        budget.charge(2)


def test_two_that_charge_at_once_wait_for_each_other(tmp_path):
    plan = LocalDP(noise_multiplier=50.0, accountant="rdp")

    def charge(_):
        budget = Budget(tmp_path, plan, most=1e3)
        return [budget.charge(r) for r in range(8)]

    with ThreadPoolExecutor(2) as pool:
        paid = [*pool.map(charge, range(2))]
    assert len({*paid[0], *paid[1]}) == 16
    assert json.loads((tmp_path / "ledger-client.json").read_text())["count"] == 16


def test_a_charge_that_waits_too_long_for_another_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedtorch.privacy.alone.PATIENCE", 0.05)
    budget = Budget(tmp_path, PLAN)
    with disk.locked(tmp_path), pytest.raises(ConfigError, match="held by another process"):
        budget.charge(0)
    assert budget.spent == 0
