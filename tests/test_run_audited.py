"""An audit in the run: what it sees is what is released, a right build passes, and a wrong one does not."""

import json
import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks.audit import (
    clip_by_layer,
    divided_by_the_cohort_there_was,
    half_the_central_noise,
    half_the_clip_is_claimed,
    half_the_noise,
    no_noise_on_an_empty_batch,
    noise_divided_twice,
    one_seed_for_all_rounds,
    twice_the_rate,
    weighted_mean,
)
from conftest import weights
from fedtorch import Audit, FedPer, Local, Recipe, Scaffold, Secure, Server, local_update
from fedtorch.__main__ import main as command
from fedtorch.commands.train import train_module
from fedtorch.engines import wire
from fedtorch.engines.messages import outcome_message, read_outcome
from fedtorch.engines.workers import kit
from fedtorch.fast import offer
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel, LocalDP, SampleLevel
from fedtorch.privacy.canaries import placed
from fedtorch.training.module import snapshot
from fedtorch.training.stacked import general, stacked
from fedtorch.types import AUDIT, ConfigError, Task
from private_case import clients, model, silent

main = train_module().main


def run(plan=None, audit=None, rounds=3, solver="auto", who=None, **recipe):
    """A small federation, trained to its end; a refuted claim is not warned of."""
    plan = plan or SampleLevel(rounds=rounds, batch_size=4.0, epsilon=4.0)
    audit = Audit(canaries=120) if audit is None else audit
    server = Server(
        model(),
        who or clients((30, 40, 50)),
        Recipe(privacy=plan, lr=0.5, **recipe),
        engine=Local(solver=solver),
        observers=[audit],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        server.fit(rounds, progress=False)
    return server, audit


def many(clip=0.3, **plan):
    """Sixty clients under client-level privacy, twenty canary clients."""
    plan = ClientLevel(rounds=6, rate=0.5, clip=clip, epsilon=8.0, **plan)
    return run(plan, Audit(canaries=20), rounds=6, who=clients((4,) * 60))


WAYS = {"fast": "auto", "stacked": "stacked", "hooks": "hooks", "ghost": "ghost", "alone": "alone"}


def test_all_ways_to_noised_steps_show_the_same():
    seen = {}
    for way, mode in WAYS.items():
        plan = SampleLevel(rounds=2, batch_size=4.0, insecure_seed=3, mode=mode)
        who, net = clients(), model()
        for c in who:
            c.memory = {AUDIT: placed(plan, c.id, 40, 59)}
        task = Task(snapshot(net), {}, 0, 0, 1.0, {"clip": 1.0, "noise": 2.0})
        recipe = Recipe(lr=1.0, privacy=plan)
        fast = offer(net, [c.data for c in who], recipe, plan) if way == "fast" else None
        local_update(who, task, recipe, net, fast or (None if way == "stacked" else general))
        seen[way] = [c.memory[AUDIT] for c in who]
    for way in seen:
        for one, other in zip(seen[way], seen["fast"], strict=True):
            assert torch.equal(one["at"], other["at"])
            assert torch.equal(one["inside"], other["inside"])
            assert torch.allclose(one["noise"], other["noise"], atol=1e-5), way
            assert torch.allclose(one["sent"], other["sent"], atol=1e-5)
            assert int(one["steps"]) == 5 and 0 < float(one["sent"].sum()) < 5 * 40


def test_canaries_go_to_a_worker_and_come_back_where_they_lay():
    plan = SampleLevel(rounds=2, batch_size=4.0, insecure_seed=3)
    who, recipe = clients(), Recipe(privacy=plan)
    memory = {c.id: {AUDIT: placed(plan, c.id, 40, 59)} for c in who}
    tools, ids = kit.Kit(model(), recipe, {c.id: c for c in who}, stacked), [*memory]
    box = wire.zeros(1 << 16)
    (there := wire.pack(kit.memory_message(memory, ids))).write(box)
    task = Task(snapshot(tools.model), {}, 0, 0, 1.0, {"clip": 1.0, "noise": 2.0})
    outcome = tools.run(task, ids, kit.read_memory(wire.decode(box[: there.size]), ids))
    # the worker's answer is written over what it was sent
    (back := wire.pack(outcome_message(outcome, ids))).write(box)
    kept = read_outcome(wire.decode(box[: back.size]), ids).memory
    for id in ids:
        now, sent = kept[id][AUDIT], memory[id][AUDIT]
        assert all(torch.equal(now[k], sent[k]) for k in ("at", "inside", "numbers"))
        assert int(now["steps"]) == 5 and float(now["squares"]) > 0


def test_a_run_without_canaries_is_bit_for_bit_the_run_without_an_audit():
    plan = SampleLevel(rounds=2, batch_size=4.0, insecure_seed=3)
    (plain, _), (none, audit) = (run(plan, a, rounds=2) for a in (None, Audit(canaries=0)))
    alone = Server(model(), clients((30, 40, 50)), Recipe(privacy=plan, lr=0.5), engine=Local())
    alone.fit(2, progress=False)
    assert all(torch.equal(v, weights(alone.model)[k]) for k, v in weights(none.model).items())
    assert not all(torch.equal(v, weights(alone.model)[k]) for k, v in weights(plain.model).items())
    assert audit.found is None


@pytest.mark.parametrize("level", ["example", "client"])
def test_twenty_seeds_of_a_right_build(level):
    who, plan = clients((30, 40, 50)), SampleLevel(noise_multiplier=1.0, rounds=60, batch_size=4.0)
    if level == "client":
        who, plan = (
            clients((4,) * 30),
            ClientLevel(noise_multiplier=1.0, rounds=60, rate=0.5, clip=0.3),
        )
    server = Server(model(), who, Recipe(privacy=plan, lr=0.1))
    found = []
    for _ in range(20):
        server.session.restore({})  # other canaries each time
        audit = Audit(canaries=120 if level == "example" else 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            server.fit(3, callbacks=[audit], progress=False)
        found.append(audit.found)
    assert all(f.at_least <= f.at_most and f.unit == level for f in found)
    assert sum(f.refuted for f in found) <= 1
    assert all(f.missed == 0 and f.longest <= 1.0001 for f in found)
    # noise and coins are the system's: 4.5 standard errors, where 0.3 failed one run in a hundred
    shift = np.array([f.shift.value for f in found])
    assert shift.std() < 1 and abs(shift.mean() - 1) < 4.5 * shift.std() / math.sqrt(len(shift))


EMPTY = SampleLevel(rounds=3, batch_size=4.0, sample_rate=0.005, epsilon=4.0)
QUIET = SampleLevel(rounds=3, batch_size=4.0, noise_multiplier=0.3)
STACKED = SampleLevel(rounds=3, batch_size=4.0, mode="stacked")


@pytest.mark.parametrize(
    ("bug", "options", "words"),
    [
        (half_the_noise, {}, "noise is 0."),
        (noise_divided_twice, {}, "noise is 0.2"),
        (one_seed_for_all_rounds, {"rounds": 8}, "noise is used again"),
        (no_noise_on_an_empty_batch, {"plan": EMPTY}, "went past the audit"),
        (clip_by_layer, {"plan": STACKED, "solver": "stacked"}, "moves the sum by 2 "),
        (half_the_clip_is_claimed, {}, "moves the sum by 2 "),
        (twice_the_rate, {"plan": QUIET}, "a canary counts"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_planted_bug_at_sample_level_is_caught_in_one_run(bug, options, words):
    with bug():
        found = run(**options)[1].found
    assert found.refuted and words in "; ".join(found.contradictions)


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (nullcontext, ""),
        (half_the_noise, "a step's noise is 0.4"),
        (
            lambda: patch("fedtorch.fast.projected.math", SimpleNamespace(sqrt=lambda t: 1.0)),
            "a step's noise is 0.9",
        ),
    ],
    ids=["right", "half the noise", "that of one step for all"],
)
def test_projected_noise_is_audited_too(bug, words):
    plan = SampleLevel(rounds=4, batch_size=4.0, projected=True, insecure_seed=3)
    with bug():
        found = run(plan, Audit(canaries=60), rounds=4)[1].found
    assert words in "; ".join(found.contradictions) and found.refuted == bool(words)
    assert found.missed == 0 and found.longest <= 1.0001


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (half_the_central_noise, "noise is 0."),
        (weighted_mean, "moves the sum by 1e+06"),
        (divided_by_the_cohort_there_was, "the divisor is not the public one"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_planted_bug_at_client_level_is_caught_in_one_run(bug, words):
    with bug():
        found = many()[1].found
    assert found.refuted and words in "; ".join(found.contradictions)


@pytest.mark.parametrize(
    "recipe",
    [
        {"plan": ClientLevel(rounds=6, insecure_seed=1, adaptive=AdaptiveClip(bit_noise=2.0))},
        {
            "plan": ClientLevel(rounds=6, insecure_seed=1, rate=0.5, weight_cap=3),
            "strategy": Scaffold(),
        },
        {"plan": SampleLevel(rounds=6, insecure_seed=1, batch_size=4.0), "strategy": Scaffold()},
        {
            "plan": SampleLevel(rounds=6, insecure_seed=1, batch_size=4.0),
            "strategy": FedPer(personal=("2.*",)),
        },
    ],
    ids=["adaptive", "scaffold at client level", "scaffold", "personal layers"],
)
def test_a_right_build_passes_with_other_parts(recipe):
    server, audit = run(audit=Audit(canaries=30), rounds=6, who=clients((9,) * 12), **recipe)
    assert not audit.found.refuted, audit.found.contradictions
    assert server.round_number == 6 and math.isfinite(audit.found.noise.value)


def test_a_broken_off_run_goes_on_with_its_canaries(tmp_path):
    plan = SampleLevel(rounds=4, batch_size=4.0, insecure_seed=3)
    made = []
    for parts in ((4,), (2, 2)):
        state = None
        for rounds in parts:
            audit = Audit(canaries=60)
            server = Server(model(), clients(), Recipe(privacy=plan), observers=[audit])
            if state:
                server.load_state_dict(state)
            server.fit(rounds, progress=False)
            state = server.state_dict()
        made.append(audit.found)
    assert replace(made[0], longest=1.0) == replace(made[1], longest=1.0)
    assert made[0].missed == 0


REFUSED = {
    "none": ({"privacy": None}, "this run makes none"),
    "strict": ({"privacy": SampleLevel(strict=True, rounds=2)}, "privacy.strict does not allow"),
    "local": ({"privacy": LocalDP(rounds=2)}, "and not local:"),
    "one layer": (
        {"privacy": SampleLevel(projected=True, rounds=2)},
        "a model of one layer has none",
    ),
    "bands": ({"privacy": ClientLevel(rounds=2, bands=Bands(count=2))}, "privacy.bands correlates"),
    "masks": (
        {"privacy": ClientLevel(rounds=2), "aggregator": Secure()},
        "aggregator secure shows it to nobody",
    ),
}


@pytest.mark.parametrize(("recipe", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_audited_is_refused_before_training(recipe, words):
    who, net = clients((9,) * 6), model() if "one" not in words else silent(6, 4)
    server = Server(net, who, Recipe(lr=0.1, **recipe), observers=[Audit(canaries=6)])
    with pytest.raises(ConfigError, match=words):
        server.fit(1, progress=False)
    assert server.round_number == 0


@pytest.mark.parametrize(
    ("level", "most"), [(SampleLevel(rounds=1), 59 * 3), (ClientLevel(rounds=1), 59)], ids=str
)
def test_there_is_a_weight_for_each_canary(level, most):
    for count in (most, most + 1):
        server = Server(
            model(), clients(), Recipe(privacy=level), observers=[Audit(canaries=count)]
        )
        if count == most:
            server.fit(1, progress=False)
        else:
            with pytest.raises(ConfigError, match=r"audit\.canaries .* is too many"):
                server.fit(1, progress=False)


@pytest.mark.parametrize(
    "options", [{"canaries": -1}, {"canaries": 1.5}, {"guesses": 0}, {"guesses": 1.1}], ids=str
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="audit"):
        Audit(**options)


def words_of(tmp_path, *flags):
    common = ["--rounds", "2", "--run-dir", str(tmp_path / "run"), "--tracking", "none"]
    return [*common, "--engine.solver", "fast", *flags]


def test_the_command_says_both_and_writes_them_down(tmp_path, capsys):
    assert (
        main(
            words_of(tmp_path, "--audit", "--audit.canaries", "200", "--privacy.insecure-seed", "1")
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "audit: epsilon at least" in said and "200 gradient canaries" in said
    table = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert table["audit"]["epsilon_at_most"] == table["epsilon_spent"]
    assert table["audit"]["canaries"] == 200 and table["audit"]["refuted"] is False
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["privacy_epsilon_at_least"] <= table["audit"]["epsilon_at_least"] + 1e-6


def test_a_refuted_claim_is_exit_status_1(tmp_path, capsys):
    with half_the_noise(), pytest.warns(UserWarning, match="noise is 0"):
        assert main(words_of(tmp_path, "--audit")) == 1
    both = capsys.readouterr()
    assert "audit: the claim is refuted" in both.out
    assert "fedtorch: the privacy claim is refuted" in both.err
    assert json.loads((tmp_path / "run" / "privacy.json").read_text())["audit"]["refuted"]


def test_the_command_refuses_what_cannot_be(tmp_path, capsys):
    assert main(words_of(tmp_path, "--audit", "--privacy.strict", "true")) == 2
    assert "privacy.strict does not allow" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_can_be_audited_afterwards(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--rounds", "1", "--tracking", "none", "--model", "logistic", "--run-dir", "run"]
    assert main([*common, "--privacy.insecure-seed", "1"]) == 0
    kept = (tmp_path / "run" / "privacy.json").read_bytes()
    assert command(["audit", "run", "--canaries", "100", "--json"]) == 0
    made = capsys.readouterr()
    assert json.loads(made.out[made.out.index('{\n  "epsilon_at_least"') :])["canaries"] == 100
    assert "their epsilons add up" in made.err
    assert (tmp_path / "run" / "privacy.json").read_bytes() == kept
    # what is there is not trained again
    monkeypatch.setattr("fedtorch.commands.audited.train_module", None)
    assert command(["audit", "run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("privacy: epsilon at most") and "100 gradient canaries" in said
    table = json.loads((tmp_path / "run" / "audit" / "privacy.json").read_text())
    table["audit"]["steps_missed"] = 3
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(table))
    assert command(["audit", "run"]) == 1
    assert "3 noised steps are charged that went past the audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [([], "takes one run folder"), (["none"], "holds no run"), (["a", "--all"], "no option --all")],
    ids=["none", "no run", "option"],
)
def test_the_command_audit_refuses(words, why, capsys):
    assert command(["audit", *words]) == 2
    assert why in capsys.readouterr().err
