"""Privacy over a whole run: budget, ledger, resume, what is logged, what is said."""

import copy
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedtorch import Local, Recipe, Server, Uniform, local_update
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel, LocalDP, SampleLevel
from fedtorch.privacy.accounting.events import Event, epsilon
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.run import BudgetSpent
from fedtorch.run.report import statement
from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, Task
from private_case import clients, model, server

QUICK = ["train", "--privacy", "sample", "--privacy.accountant", "rdp", "--tracking", "none"]


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


PLANS = [
    SampleLevel(noise_multiplier=1.0, rounds=6, insecure_seed=3),
    ClientLevel(rate=0.75, noise_multiplier=1.0, rounds=6, insecure_seed=3),
    ClientLevel(noise_multiplier=0.2, adaptive=AdaptiveClip(bit_noise=2.0), rounds=6, insecure_seed=3),
    ClientLevel(noise_multiplier=1.0, bands=Bands(count=2), rounds=6, insecure_seed=3),
    LocalDP(noise_multiplier=1.0, rounds=6, insecure_seed=3),
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: type(p).__name__)
def test_three_rounds_a_resume_and_three_more_give_the_state_of_six(plan):
    who = clients((9, 20, 14, 5, 6, 7))
    whole = server(model(), who, plan)
    for _ in range(6):
        whole.round()
    first = server(model(), who, plan)
    for _ in range(3):
        first.round()
    saved = first.state_dict()
    second = server(model(), who, plan)
    second.load_state_dict(saved)
    assert second.private.spent() == first.private.spent()
    for _ in range(3):
        second.round()
    assert torch.equal(weights(whole), weights(second))
    assert second.private.spent() == whole.private.spent()


def test_noise_is_never_the_same_twice_without_an_insecure_seed():
    plan = SampleLevel(noise_multiplier=1.0, rounds=1)
    runs = [server(model(), clients(), plan, seed=5) for _ in range(2)]
    for run in runs:
        run.round()
    assert not torch.equal(weights(runs[0]), weights(runs[1]))


@pytest.mark.parametrize("solver", ["auto", "fast", "stacked"])
def test_masks_of_dropout_are_a_secret_under_sample_level_privacy(solver):
    # they belong to places in a batch: who knew them would see one example move those of all others
    ends = []
    for seed in (None, None, 7, 7):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
        )
        plan = SampleLevel(noise_multiplier=1e-9, rounds=1, sample_rate=1.0, insecure_seed=seed)
        run = Server(net, clients(), Recipe(privacy=plan), engine=Local(solver=solver), seed=5)
        run.round()
        ends.append(weights(run))
    assert float((ends[0] - ends[1]).norm()) > 1e-3
    assert torch.equal(ends[2], ends[3])


def test_a_round_the_budget_has_no_room_for_is_refused():
    plan = SampleLevel(epsilon=2.0, rounds=2)
    run = server(model(), clients(), plan)
    assert len(list(run.rounds(10))) == 2  # budget stop: the rounds planned, and no more
    assert 1.9 < run.private.spent() <= 2.0
    before = weights(run)
    with pytest.raises(BudgetSpent, match="round 3"):
        run.round()
    assert torch.equal(weights(run), before)
    assert run.private.spent() <= 2.0
    failing = server(model(), clients(), SampleLevel(epsilon=2.0, rounds=2, budget="error"))
    with pytest.raises(BudgetSpent):
        list(failing.rounds(3))


def test_rounds_within_the_plan_cost_no_more_than_the_plan(monkeypatch):
    # at a tiny delta PRV may have no answer for some rounds, where RDP's is above the target
    from fedtorch.privacy.accounting import ledger

    price = ledger.epsilon
    monkeypatch.setattr(ledger, "epsilon", lambda events, *a: 1.0 + price(events, *a))
    run = server(model(), clients(), SampleLevel(epsilon=2.0, rounds=3))
    assert [f["privacy_epsilon"] <= 2.0 for f in run.rounds(10)] == [True] * 3
    other = server(model(), clients(), SampleLevel(epsilon=2.0, rounds=3))
    other.private.ledger.charge(0, Event("gaussian", 9.0), ["c1"])  # not of the plan
    assert len(list(other.rounds(10))) < 3
    assert other.private.spent() == other.private.ledger.spent(1e-5) > 1.0


def test_a_client_that_stayed_away_has_budget_left():
    plan = SampleLevel(epsilon=2.0, rounds=2)
    run = server(model(), clients((9,) * 6), plan, participation=Uniform(cohort_size=1))
    done = len(list(run.rounds(50)))
    assert done > 2
    assert max(run.private.ledger.spent_by_client(plan.delta).values()) <= 2.0


def test_clients_that_drop_out_are_charged():
    from fedtorch import Everyone

    plan = SampleLevel(noise_multiplier=1.0, rounds=2)
    run = server(model(), clients((9,) * 6), plan, participation=Everyone(dropout=0.9))
    run.round()
    assert len(run.private.ledger.spent_by_client(plan.delta)) == 6


def test_figures_outside_the_guarantee_say_so():
    who = clients((9,) * 4)
    figures = server(model(), who, SampleLevel(noise_multiplier=1.0, rounds=1)).round()
    assert "train_loss" not in figures and "nonprivate_train_loss" in figures
    assert "examples" not in figures and "nonprivate_examples" in figures
    assert figures["cohort"] and figures["privacy_epsilon"] > 0
    central = server(model(), who, ClientLevel(noise_multiplier=1.0, rounds=1)).round()
    for name in ("cohort", "clients", "train_loss", "examples", "update_norm", "failed"):
        assert name not in central
        assert f"nonprivate_{name}" in central


@pytest.mark.parametrize("kind", [SampleLevel, ClientLevel, LocalDP])
def test_strict_leaves_out_figures_outside_the_guarantee(kind):
    plan = kind(noise_multiplier=1.0, rounds=1, strict=True)
    figures = server(model(), clients((9,) * 4), plan).round()
    assert not [k for k in figures if k.startswith("nonprivate_")]
    assert "train_loss" not in figures
    assert figures["round"] == 1 and "privacy_epsilon" in figures


@pytest.mark.parametrize("kind", [SampleLevel, LocalDP])
def test_under_strict_a_client_sends_nothing_but_what_is_noised(kind):
    net, who = model(), clients((9, 5))
    task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": 1.0, "noise": 1.0})
    for strict in (False, True):
        recipe = Recipe(privacy=kind(rounds=1, strict=strict))
        chosen = server(copy.deepcopy(net), who, recipe.privacy).session.choice
        for solve in (None, chosen.solver):
            update, _ = local_update(who, task, chosen.recipe, copy.deepcopy(net), solve)
            assert ({"train_loss", "examples"} <= set(update.metrics)) is not strict
            assert not strict or set(update.metrics) == {"update_norm"}
    assert not update.buffers and update.weight.tolist() == [1, 1]


STRICT = {"round", "lr", "step_norm", "privacy_epsilon", "privacy_epsilon_planned"}
STRICT |= {"privacy_noise_multiplier", "privacy_noise_std", "privacy_clip_norm"}
NOISED = {"cohort", "failed", "clients", "dropped", "update_norm", "bytes_down", "bytes_up"}


@pytest.mark.parametrize(
    "kind, told",
    [(SampleLevel, STRICT | NOISED), (LocalDP, STRICT | NOISED), (ClientLevel, STRICT)],
)
def test_strict_figures_are_those_named_and_no_other(kind, told):
    plan = kind(noise_multiplier=1.0, rounds=1, strict=True)
    s = server(model(), clients((9, 20, 14, 7)), plan)
    assert set(s.round()) == told
    assert set(
        s.mark(dict.fromkeys(("round", "round_trips", "seconds_log", "clients_a_day"), 1))
    ) == {"round"}


def test_the_order_of_a_cohort_says_nothing_of_sizes():
    for sizes in ((9, 20, 14), (20, 14, 9), (14, 9, 20)):
        figures = server(
            model(), clients(sizes), SampleLevel(noise_multiplier=1.0, rounds=1, strict=True)
        ).round()
        assert figures["cohort"] == ["c0", "c1", "c2"]


@pytest.mark.parametrize("kind", [SampleLevel, ClientLevel, LocalDP])
def test_strict_notes_do_not_depend_on_the_number_of_examples(kind):
    plan = kind(noise_multiplier=1.0, rounds=1, strict=True, delta=1e-2)
    few, many = (server(model(), clients(sizes), plan).notes for sizes in ((2,) * 4, (400,) * 4))
    assert few == many


def test_a_broken_client_reports_like_any_other():
    who = clients((5, 5, 5))
    who[1].data.tensors[0].fill_(math.nan)
    net = model()
    task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": 1.0, "noise": 1.0})
    chosen = server(net, who, ClientLevel(rounds=1)).session.choice
    for solve in (None, chosen.solver):
        update, failures = local_update(who, task, chosen.recipe, copy.deepcopy(net), solve)
        assert len(update.ids) == 3 and not failures
        for tree in (*update.sent.values(), update.metrics):
            assert all(v.isfinite().all() for v in tree.values())


def test_a_resume_after_lost_rounds_starts_correlated_noise_anew(tmp_path):
    plan = ClientLevel(noise_multiplier=1.0, bands=Bands(count=2), rounds=8)
    who = clients((9, 20, 14, 5, 6, 7))
    first = server(model(), who, plan)
    first.private.ledger = Ledger(tmp_path / "ledger.jsonl", "client")
    for _ in range(3):
        first.round()
    saved = first.state_dict()

    def resumed():
        run = server(model(), who, plan)
        ledger = Ledger.resume(tmp_path / "ledger.jsonl", saved["privacy"]["ledger"])
        run.load_state_dict(saved, ledger)
        return run.private.state["past"]

    assert len(resumed()) == 1  # nothing was lost: the noise goes on
    first.round()  # released, and then the process is killed before it is saved
    assert resumed() == []


def test_noise_taken_back_twice_would_cost_more_than_is_charged():
    """Why it starts anew: squared sensitivity of what was seen, against the releases charged."""
    bands, rounds, kept = Bands(count=4), 12, 5
    c = bands.coefficients()
    dense = sum(
        torch.diag(torch.full((rounds - i,), x, dtype=torch.float64), -i) for i, x in enumerate(c)
    )
    again = torch.cat([dense[: kept + 1], dense[kept:]])  # round 5 was released twice
    afresh = torch.zeros(rounds + 1, rounds + 1, dtype=torch.float64)
    afresh[: kept + 1, : kept + 1] = dense[: kept + 1, : kept + 1]
    afresh[kept + 1 :, kept + 1 :] = dense[: rounds - kept, : rounds - kept]
    turns = [t for t in range(rounds) if t % 4 == 0]  # this group's turns; not round 5's
    assert float(again[:, turns].sum(1).norm()) ** 2 > 3
    turns = [t if t <= kept else t + 1 for t in turns]
    assert float(afresh[:, turns].sum(1).norm()) ** 2 <= 3


def test_more_rounds_at_a_given_noise_are_planned_for_on_resume():
    first = server(model(), clients(), SampleLevel(noise_multiplier=1.0, rounds=2))
    assert len([*first.rounds(9)]) == 2
    more = server(model(), clients(), plan := SampleLevel(noise_multiplier=1.0, rounds=4))
    more.load_state_dict(first.state_dict())
    last = [*more.rounds(9)][-1]
    assert last["round"] == 4
    assert last["privacy_epsilon"] == pytest.approx(plan.planned(1.0, 4))
    assert last["privacy_epsilon_planned"] == pytest.approx(plan.planned(1.0, 4))
    assert plan.planned(1.0, 4) > plan.planned(1.0, 2) + 0.1
    # and a budget is that of the plan the noise was made for
    first = server(model(), clients(), SampleLevel(epsilon=2.0, rounds=2))
    more = server(model(), clients(), SampleLevel(epsilon=2.0, rounds=4))
    more.load_state_dict(first.state_dict())
    assert len([*more.rounds(9)]) == 2


@pytest.mark.parametrize(
    ("plan", "event"),
    [
        (ClientLevel(noise_multiplier=1.5, rounds=5), Event("gaussian", 1.5, 1.0, 1)),
        (ClientLevel(noise_multiplier=1.5, rate=0.75, rounds=5), Event("gaussian", 1.5, 0.75, 1)),
        (LocalDP(noise_multiplier=1.5, rounds=5), Event("gaussian", 1.5, 1.0, 1)),
        (LocalDP(noise_multiplier=9.0, mechanism="laplace", rounds=5), Event("laplace", 9.0)),
        (
            SampleLevel(noise_multiplier=1.5, sample_rate=0.3, steps=7, rounds=5),
            Event("gaussian", 1.5, 0.3, 7),
        ),
    ],
    ids=["client", "client by coins", "local", "laplace", "sample"],
)
def test_a_round_is_charged_exactly_what_it_releases(plan, event):
    run = server(model(), clients((9, 20, 14, 5, 6, 7)), plan)
    for rounds in (1, 2):
        run.round()
        assert [e.event for e in run.private.ledger.entries] == [event] * rounds
        assert run.private.spent() == epsilon([event] * rounds, run.private.delta)
    assert plan.planned(plan.noise_multiplier, 5) == epsilon([event] * 5, run.private.delta)


def test_the_report_names_the_client_that_paid_most():
    run = server(model(), clients((9,) * 5), SampleLevel(noise_multiplier=1.0, rounds=9))
    one, delta = run.private.plan.event(1.0), run.private.delta
    for round, who in enumerate((["c0", "c1"], ["c0", "c1"], ["c0", "c2"], ["c0"])):
        run.private.ledger.charge(round, one, who)
    told = statement(run.private)["epsilon_spent_per_client"]
    assert statement(run.private)["plan"].startswith(
        "SampleLevel(clip=1.0, noise_multiplier=1.0, d"
    )
    price = [epsilon([one] * n, delta) for n in (1, 2, 4)]
    assert (told["min"], told["median"], told["max"]) == pytest.approx(tuple(price))
    assert price[2] > price[1] + 0.5


def test_one_run_has_one_plan():
    saved = server(model(), clients((9,) * 4), LocalDP(noise_multiplier=1.0, rounds=2)).state_dict()
    other = server(model(), clients((9,) * 4), ClientLevel(noise_multiplier=1.0, rounds=2))
    with pytest.raises(ConfigError, match="trained with LocalDP"):
        other.load_state_dict(saved)


def test_without_a_budget_the_planned_rounds_are_the_limit():
    run = server(model(), clients(), SampleLevel(noise_multiplier=1.0, rounds=2))
    assert len(list(run.rounds(5))) == 2
    assert run.private.spent() == pytest.approx(run.private.plan.planned(1.0, 2))


def test_the_noise_is_shown_in_parameter_units():
    who = clients((9,) * 4)
    for plan, want in (
        (SampleLevel(clip=0.5, noise_multiplier=2.0, rounds=1), 1.0),
        (ClientLevel(clip=0.5, noise_multiplier=2.0, rounds=1), 1.0),
        (LocalDP(clip=0.5, noise_multiplier=2.0, rounds=1), 2.0),
    ):
        assert server(model(), who, plan).round()["privacy_noise_std"] == pytest.approx(want)


def test_private_checkpoints_are_for_their_owner_alone(fedtorch):
    assert fedtorch(*QUICK, "--rounds", 1, "--run-dir", "run")[0] == 0
    for path in Path("run/checkpoints").iterdir():
        assert path.stat().st_mode & 0o077 == 0


# through the command line


def test_a_private_run_says_what_it_promises_and_what_it_spent(fedtorch):
    code, out, err = fedtorch(*QUICK, "--rounds", 2, "--run-dir", "run", "--privacy.epsilon", 3)
    assert code == 0, err
    assert "one example of one client" in out and "planned epsilon" in out
    summary, report = (
        json.loads(Path(f"run/{n}.json").read_text()) for n in ("summary", "privacy")
    )
    assert 2.9 < summary["epsilon"] <= 3 and summary["delta"] == 1e-5
    assert report["epsilon_spent"] == summary["epsilon"]
    assert report["rounds_charged"] == 2
    assert "INSECURE" not in out
    by = "a compiled loop" if find_spec("numba") else "NumPy"
    assert report["randomness"].endswith(f"normals by {by}")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[1]["privacy_epsilon"] < lines[2]["privacy_epsilon"] <= 3


def test_a_round_starts_without_a_compiler_or_opacus_or_a_search_of_all_memory(tmp_path):
    code = """
import gc, sys, traceback
searched = []
def told(phase, of):
    if of["generation"] == 2:
        searched.extend(f for f, _ in traceback.walk_stack(None) if "importlib" in f.f_code.co_filename)
gc.callbacks.append(told)
import train
layers = ["sample", "--engine.solver", "general", "--privacy.mode", "layers"]
for k, plan in enumerate((["none"], ["sample"], layers)):
    train.main(["--rounds", "1", "--run-dir", sys.argv[1] + str(k), "--privacy", *plan])
    slow = "torch._dynamo", "opacus", "sympy", "scipy.stats", "scipy.special", "absl"
    print([m for m in slow if m in sys.modules])
print("searched whole while modules are read", searched)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True,
        check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines.count("[]") == 3 and lines[-1].endswith("read []")
    assert done.stdout.count("prv accountant") == 2


def test_an_insecure_seed_is_shown_in_every_report(fedtorch):
    code, out, _ = fedtorch(*QUICK, "--rounds", 1, "--run-dir", "run", "--privacy.insecure-seed", 1)
    assert code == 0
    assert "INSECURE" in out
    assert "INSECURE" in Path("run/privacy.json").read_text()


def test_strict_runs_show_nobodys_data(fedtorch):
    strict = ["--privacy.strict", "true", "--validation", 0.2, "--privacy.delta", "1e-2"]
    code, out, _ = fedtorch(*QUICK, "--rounds", 1, "--run-dir", "run", *strict)
    assert code == 0
    assert "train loss" not in out and "clients/s" not in out and " s  test" not in out
    assert not re.search(r"\d examples", out.replace("one in 100 examples", ""))
    lines = Path("run/metrics.jsonl").read_text()
    assert not re.search("nonprivate|second|valid|example|loss_m", lines)
    assert "seconds" not in json.loads(Path("run/summary.json").read_text())
    assert "clients" not in json.loads(Path("run/report.json").read_text())
    assert fedtorch("report", "run")[0] == 0
    page = Path("run/report.html").read_text()
    assert not re.search("Who holds what|not private|round by round|seconds</dt>", page, re.I)
    assert "At most: epsilon" in page and "What is taken for what" in page
    code, out, _ = fedtorch("eval", "run")
    assert code == 0 and "test accuracy" in out and "validation" not in out


def test_eval_marks_what_a_private_runs_guarantee_does_not_cover(fedtorch):
    assert fedtorch(*QUICK, "--rounds", 1, "--run-dir", "run", "--validation", 0.2)[0] == 0
    _, out, _ = fedtorch("eval", "run", "--json")
    figures = json.loads(out)
    assert {"test_accuracy", "nonprivate_validation_accuracy"} <= set(figures)
    assert not [k for k in figures if k.startswith("validation")]


def test_under_strict_the_words_of_a_clients_failure_stay_back(fedtorch):
    Path("own.py").write_text(
        "import torch\nfrom fedtorch.data import from_tensors\n"
        "class Rows(torch.utils.data.Dataset):\n"
        "    calls = 0\n"
        "    def __len__(self):\n        return 40\n"
        "    def __getitem__(self, i):\n"
        "        Rows.calls += 1\n"
        "        if Rows.calls > 400:\n            raise ValueError(f'row {i}: age 93, diagnosis X')\n"
        "        return torch.ones(3), torch.tensor(i % 2)\n"
        "def make():\n"
        "    import dataclasses\n"
        "    x, y = torch.ones(40, 3), torch.arange(40) % 2\n"
        "    made = from_tensors('own', (x, y), (x, y), 'classification', 2)\n"
        "    return dataclasses.replace(made, train=Rows())\n"
    )
    own = ["train", "--dataset", "custom", "--dataset.path", "own:make", "--model", "logistic"]
    own += ["--clients", "2", "--partition", "iid", "--tracking", "none", "--rounds", "50"]
    try:
        code, out, err = fedtorch(*own, "--run-dir", "run", "--privacy.strict", "true")
    finally:
        sys.modules.pop("own", None)
    assert code == 1
    assert "ValueError (privacy.strict keeps back the rest)" in err
    assert "diagnosis" not in out + err


def test_more_rounds_than_planned_stop_at_the_budget(fedtorch):
    assert fedtorch(*QUICK, "--rounds", 2, "--run-dir", "run", "--privacy.epsilon", 3)[0] == 0
    code, _, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 4)
    assert code == 0, err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["rounds"] == 2 and summary["epsilon"] <= 3


def test_budget_error_is_an_error_after_the_model_is_saved(fedtorch):
    args = [*QUICK, "--privacy.epsilon", 3, "--privacy.rounds", 1, "--privacy.budget", "error"]
    code, _, err = fedtorch(*args, "--rounds", 3, "--run-dir", "run")
    assert code == 1
    assert "budget is spent after 1 of 3 rounds" in err
    assert load_file("run/model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "ledger"),
        (lambda p: p.write_text("".join(p.read_text().splitlines(True)[:-1])), "ledger|journal"),
        (
            lambda p: p.write_text(p.read_text().replace('"steps": 5', '"steps": 1')),
            "ledger|journal",
        ),
    ],
    ids=["missing", "shortened", "edited"],
)
def test_a_ledger_that_cannot_be_trusted_ends_the_resume(fedtorch, damage, message):
    assert (
        fedtorch(*QUICK, "--rounds", 2, "--run-dir", "run", "--privacy.noise-multiplier", 1)[0] == 0
    )
    damage(Path("run/ledger.jsonl"))
    code, _, err = fedtorch("train", "--resume", "--run-dir", "run", "--rounds", 3)
    assert code == 2
    assert "Traceback" not in err
    import re

    assert re.search(message, err)


def test_kill_and_resume_never_forgets_a_round(fedtorch):
    argv = [*QUICK, "--privacy.noise-multiplier", "1", "--rounds", "12", "--run-dir", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedtorch", *argv], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = Path("run/ledger.jsonl")
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    charged = journal.read_text().count("\n") - 1
    assert charged >= Path("run/metrics.jsonl").read_text().count("\n") - 1, "round 0 costs nothing"
    code, _, err = fedtorch("train", "--resume", "--run-dir", "run")
    assert code == 0, err
    after = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    epsilons = [line["privacy_epsilon"] for line in after[1:]]
    assert epsilons == sorted(epsilons)
    assert [line["round"] for line in after] == list(range(13))
    report = json.loads(Path("run/privacy.json").read_text())
    assert report["rounds_charged"] >= 12


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--privacy", "sampel"], "unknown privacy 'sampel'"),
        (["--privacy.epsilon", "1", "--privacy.noise-multiplier", "1"], "not both"),
        (["--privacy.epsilon", "-1"], "privacy.epsilon"),
        (["--privacy.delta", "2"], "delta"),
        (["--privacy.sample-rate", "0"], "sample.rate"),
        (["--privacy.accountant", "gdp"], "gdp|accountant"),
        (["--privacy", "client", "--participation", "uniform", "--participation.cohort-size", "3"],
         "draws the cohort itself"),
        (["--privacy", "client", "--clients", "2"], "hides nobody"),
        (["--privacy", "client", "--strategy.weighting", "examples"], "weighting examples voids"),
        (["--model", "models_with_norm.py"], "GroupNorm"),
        (["--steps", "3"], "privacy.steps"),
        (["--privacy.rounds", "1", "--privacy.noise-multiplier", "1"], "privacy.rounds 1 is less"),
        (["--dataset", "csv", "--dataset.path", "x.csv", "--dataset.standardize", "true"],
         "standardize voids"),
        (["--drop-last"], "drop.last"),
        (["--privacy", "client", "--privacy.adaptive", "on", "--privacy.bands", "on"],
         "do not go together"),
    ],
)  # fmt: skip
def test_bad_privacy_is_one_sentence_before_training(fedtorch, argv, message):
    import re

    Path("models_with_norm.py").write_text(
        "from torch import nn\n"
        "def build(in_features: int, num_outputs: int) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_features, 16), nn.BatchNorm1d(16),\n"
        "        nn.ReLU(inplace=True), nn.Linear(16, num_outputs))\n"
    )
    code, _, err = fedtorch("train", "--rounds", 2, "--run-dir", "run", *argv)
    assert code == 2, err
    assert re.search(message, err) and "Traceback" not in err
    assert err.count("\n") == 1
    assert not Path("run/metrics.jsonl").exists()


def test_fix_model_trains_what_was_refused(fedtorch):
    test_bad_privacy_is_one_sentence_before_training(
        fedtorch, ["--model", "models_with_norm.py"], "--privacy.fix-model"
    )
    code, _, err = fedtorch(
        *QUICK, "--rounds", 1, "--run-dir", "run2", "--model", "models_with_norm.py",
        "--privacy.fix-model", "true",
    )  # fmt: skip
    assert code == 0, err
    assert "2.weight" in load_file("run2/model.safetensors")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "plan",
    [
        SampleLevel(noise_multiplier=1.0, rounds=2, insecure_seed=3),
        LocalDP(noise_multiplier=1.0, rounds=2, insecure_seed=3),
        ClientLevel(noise_multiplier=1.0, rounds=2, insecure_seed=3),
    ],
    ids=lambda p: type(p).__name__,
)
def test_worker_processes_draw_the_noise_of_one_process(plan):
    from fedtorch import Local, Recipe, Server
    from fedtorch.engines import Processes

    results = []
    for engine in (Local(chunk=1), Processes(workers=2, chunk=1)):
        run = Server(model(), clients((9, 20, 14, 5)), Recipe(privacy=plan), engine=engine)
        for _ in range(2):
            run.round()
        results.append(weights(run))
        run.close()
    assert (results[0] - results[1]).abs().max() <= 1e-6


def test_a_report_is_written_where_versions_are_unknown(monkeypatch):
    import importlib.metadata

    from fedtorch import __version__
    from fedtorch.run import versions
    from fedtorch.run.report import statement

    def unknown(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", unknown)
    s = server(model(), clients(), SampleLevel(noise_multiplier=1.0, rounds=1))
    said = statement(s.private)["versions"]
    assert (said["fedtorch"], said["scipy"]) == (__version__, None)


@pytest.mark.parametrize("plan", [SampleLevel(rounds=3), LocalDP(rounds=3, noise_multiplier=2.0)])
def test_a_task_is_held_to_the_plan_that_was_joined(plan):
    noise = plan.calibrated(3)
    plan.hold({"clip": 1.0, "noise": noise})
    plan.hold({"clip": 1.0, "noise": noise * (1 + 1e-9)})  # of another processor
    for told, why in (
        ({"clip": 1e-30, "noise": noise}, "clip is 1e-30, the plan's 1"),
        ({"clip": 1.0, "noise": noise / 2}, "noise multiplier is .*, the plan's"),
        ({"clip": 1.0, "noise": noise * 2}, "noise multiplier is .*, the plan's"),
        ({"clip": 1.0, "noise": math.nan}, "noise multiplier is nan"),
        ({"clip": math.nan, "noise": noise}, "clip is nan"),
        ({"clip": 1.0}, "must name clip and noise, not clip"),
        ({"clip": 1.0, "noise": noise, "rate": 1.0}, "must name clip and noise"),
        ({}, "not nothing"),
    ):
        with pytest.raises(ConfigError, match=why):
            plan.hold(told)


def test_an_adaptive_clip_outside_its_range_is_refused():
    plan = ClientLevel(rounds=1, noise_multiplier=1.0, adaptive=AdaptiveClip())
    plan.hold({"clip": 0.037, "noise": 1.0})
    for clip in (1e-7, 1e10, math.nan):
        with pytest.raises(ConfigError, match="between 1e-06 and 1e"):
            plan.hold({"clip": clip, "noise": 1.0})
    with pytest.raises(ConfigError, match=r"privacy\.adaptive\.start must be between"):
        ClientLevel(adaptive=AdaptiveClip(start=1e-9))


def test_an_adaptive_clip_stops_at_the_ends_of_the_range():
    plan = ClientLevel(
        rounds=1,
        noise_multiplier=1.0,
        insecure_seed=1,
        adaptive=AdaptiveClip(lr=50.0, bit_noise=1.0),
    )
    for clip, bit, end in ((2e-6, 5.0, 1e-6), (5e8, -5.0, 1e9)):
        state = plan.start({"delta": {"w": torch.zeros(2)}}) | {"clip": clip, "round": 0}
        sums = {"delta": {"w": torch.zeros(2).double()}, "below": {"bit": torch.tensor([bit])}}
        assert plan.server(sums, state, 1.0, 10)[1]["clip"] == end


def test_a_clip_that_float32_cannot_hold_is_refused_wherever_it_comes_from():
    net, plan = model(), SampleLevel(rounds=1)
    task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": 1e-30, "noise": 1.0})
    with pytest.raises(ConfigError, match="a task's clip must be between"):
        local_update(clients((5,)), task, Recipe(privacy=plan), net)
