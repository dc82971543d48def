"""Callbacks of fit: they stop, keep and save, survive a break, and never look at what no noise covers."""

import asyncio
import math
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, weights
from fedtorch import (
    BestModel,
    Checkpoint,
    Client,
    ConfigError,
    EarlyStopping,
    Local,
    Observer,
    Recipe,
    Scaffold,
    Secure,
    Server,
    ServerAdam,
    resume,
)
from fedtorch.engines import Processes
from fedtorch.privacy import SampleLevel
from fedtorch.rounds.schedules import Schedule
from fedtorch.run import callbacks as made
from fedtorch.run import checkpoint
from fedtorch.run.described import layers

TEST = make_clients([40])[0].data.tensors
PLAN = SampleLevel(
    noise_multiplier=1.0, delta=1e-5, rounds=9, steps=2, batch_size=4, sample_rate=0.3
)


def served(recipe=None, sizes=(12, 20), **options):
    recipe = recipe or Recipe(Scaffold(server=ServerAdam(lr=0.3)), lr=1.5, batch_size=8)
    clients = [Client(c.id, c.data, c.data) for c in make_clients(sizes)]
    return Server(mlp(), clients, recipe, **options)


class Falling(Schedule):
    def __call__(self, round):
        return 1 / (1 + round)


def both():
    return EarlyStopping("test_loss", patience=3, min_delta=0.01), BestModel("test_loss")


def feed(callback, values, name="test_loss"):
    for number, value in enumerate(values, 1):
        callback.round({"round": number, name: value})
        if callback.enough:
            return number
    return None


def test_early_stopping_ends_once_the_figure_is_no_better_for_so_many_rounds():
    falls = [5, 4, 3.5, 3.6, 3.45, 3.9, 3.8]
    assert feed(EarlyStopping(patience=2, min_delta=0.1), falls) == 5
    assert feed(EarlyStopping(patience=3), falls) is None  # 3.45 was better
    assert feed(EarlyStopping("test_accuracy", 2), [0.1, 0.5, 0.4, 0.3, 0.2], "test_accuracy") == 4
    assert feed(EarlyStopping("x", 1, mode="min"), [1, 2], "x") == 2
    # what is not a number is never better, and a round that is not judged says nothing
    assert feed(EarlyStopping(patience=2), [math.nan, 3, math.nan, None, math.nan]) == 5
    assert feed(EarlyStopping(patience=2), [math.nan] * 9) == 3
    said = EarlyStopping(patience=2, min_delta=0.1)
    feed(said, falls)
    assert said.enough == (
        "stopped after round 5: test_loss was 3.5 in round 3 and has not got better by more than 0.1 in 2 "
        "rounds"
    )


def test_the_best_weights_come_back_bit_for_bit_and_training_goes_on_from_the_last(capsys):
    stopping, best = both()
    server, plain = served(), served()
    history = server.fit(60, TEST, callbacks=[stopping, best])
    assert len(history) - 1 == server.round_number < 60 and history[0]["round"] == 0
    at = min(history[1:], key=lambda m: m["test_loss"])
    assert (
        best.best == made.Best(at["test_loss"], at["round"]) and at["round"] < server.round_number
    )
    assert server.evaluate(TEST)["loss"] == at["test_loss"]
    assert server.stopped in capsys.readouterr().out and not server.observers
    assert server.stopped.startswith("stopped after round 4: test_loss was ")
    # the same without anybody who looks: neither evaluation nor callbacks draw or change a thing
    plain.fit(at["round"], progress=False)
    assert all(torch.equal(v, weights(plain.model)[k]) for k, v in weights(server.model).items())
    plain.fit(server.round_number - at["round"] + 1, progress=False)
    server.fit(1, progress=False)
    assert server.stopped == ""
    assert all(torch.equal(v, weights(plain.model)[k]) for k, v in weights(server.model).items())


def test_weights_of_a_users_own_that_are_put_in_place_of_the_best_stay():
    server = served()
    server.fit(4, TEST, callbacks=[BestModel("train_loss", mode="max")], progress=False)
    with torch.no_grad():
        server.model[0].weight.zero_()
    assert not server.state_dict()["model"]["0.weight"].any()
    assert not server.model[0].weight.any()


@pytest.mark.parametrize("done", [1, 3], ids=["early", "late"])
def test_n_and_m_rounds_are_n_a_break_and_m(tmp_path, done):
    whole, part = served(), served()
    callbacks = both()
    rounds = whole.fit(9, TEST, callbacks=callbacks, progress=False)
    part.fit(done, TEST, callbacks=[*both(), Checkpoint(tmp_path)], progress=False)
    again, later = served(), both()
    assert resume(again, tmp_path) and again.round_number == done
    left = again.fit(9 - done, TEST, callbacks=later, progress=False)
    assert repr(later) == repr(callbacks)
    assert (
        left[-1]["test_loss"] == rounds[-1]["test_loss"]
        and again.round_number == whole.round_number
    )
    for a, b in ((whole, again), (callbacks[1], later[1])):
        a, b = (weights(s.model) if isinstance(s, Server) else s.weights for s in (a, b))
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    # one that had stopped has stopped
    stopped = served()
    stopped.load_state_dict(whole.state_dict())
    assert whole.round_number < 9 and not stopped.fit(3, TEST, callbacks=both(), progress=False)


def test_a_checkpoint_is_of_the_last_round_although_the_best_is_shown(tmp_path):
    server, plain = served(), served()
    server.fit(
        5, TEST, callbacks=[BestModel("train_loss", mode="max"), Checkpoint(tmp_path, every=4)]
    )
    plain.fit(5, progress=False)
    again = served()
    assert resume(again, str(tmp_path)) and again.round_number == 5
    assert all(torch.equal(v, weights(again.model)[k]) for k, v in weights(plain.model).items())
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "round-000004.pt",
        "round-000005.pt",
    ]
    assert not resume(served(), tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match=r"already holds a run, which has come to round 5: go on .*resume"
    ):
        served().fit(1, callbacks=[Checkpoint(tmp_path)])
    again.fit(1, callbacks=[Checkpoint(tmp_path)], progress=False)  # which goes on with it
    server = served()
    with pytest.raises(ConfigError, match="x is the folder of Checkpoint and of Checkpoint: leave"):
        server.fit(1, callbacks=[Checkpoint(tmp_path / "x"), Checkpoint(tmp_path / "x")])
    assert server.round_number == 0 and not server.observers
    server.fit(1, callbacks=[Checkpoint(tmp_path / "x")], progress=False)  # which was let go


def test_the_ledger_of_a_private_run_is_kept_beside_its_checkpoints(tmp_path):
    server = served(Recipe(privacy=PLAN))
    server.fit(1, progress=False)
    server.fit(2, callbacks=[Checkpoint(tmp_path)], progress=False)
    spent, again = server.private.spent(), served(Recipe(privacy=PLAN))
    assert (tmp_path / "ledger.jsonl").read_bytes().count(b"\n") == 4  # what was charged before too
    assert resume(again, tmp_path) and again.private.spent() == spent > 0
    with pytest.raises(ConfigError, match="and it has one alone: keep"):
        again.fit(1, callbacks=[Checkpoint(tmp_path / "other")])
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"ledger\.jsonl cannot be read"):
        resume(served(Recipe(privacy=PLAN)), tmp_path)


def test_under_a_plan_nothing_is_chosen_by_what_no_noise_covers(capsys):
    for name in ("train_loss", "validation_loss", "nonprivate_train_loss", "client_loss_max"):
        for callback in (EarlyStopping(name), BestModel(name, mode="min")):
            server = served(Recipe(privacy=PLAN))
            with pytest.raises(
                ConfigError, match=f"watch {name}, which is made of clients' data and no"
            ):
                server.fit(2, TEST, callbacks=[callback])
            assert server.round_number == 0 and not server.private.ledger.entries
    server = served(Recipe(privacy=PLAN))
    server.fit(1, TEST, callbacks=[EarlyStopping(), BestModel("step_norm")])
    assert (
        capsys.readouterr().out.count("chooses by test_loss: the privacy guarantee holds for") == 1
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: EarlyStopping("test_los"), "no such figure; did you mean 'test_loss'"),
        (lambda: BestModel("validation_f1", mode="max"), "no such figure"),
        (
            lambda: EarlyStopping("lr"),
            "whether a high lr is good or bad is not known: give mode='max' or mode='min'",
        ),
        (lambda: EarlyStopping(patience=0), "EarlyStopping.patience must be"),
        (lambda: EarlyStopping(min_delta=-1.0), "EarlyStopping.min_delta must be"),
        (lambda: EarlyStopping(mode="up"), "mode of EarlyStopping must be one of auto, min, max"),
        (lambda: EarlyStopping(5), "monitor of EarlyStopping must be text, got 5"),
        (lambda: BestModel(restore="yes"), "restore of BestModel must be"),
        (lambda: Checkpoint(5), "folder of Checkpoint must be"),
        (lambda: Checkpoint("x", every=0), "Checkpoint.every must be"),
        (lambda: print, "a callback must be an Observer"),
        (lambda: EarlyStopping, r"a callback must be an Observer.*write EarlyStopping\(\.\.\.\)"),
    ],
    ids=[
        *("misspelt", "not-judged", "which-way", "patience", "delta", "mode", "monitor"),
        *("restore", "folder", "every", "function", "class"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_training(make, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = served()
    with pytest.raises(ConfigError, match=why):
        server.fit(1, TEST, callbacks=[make()])
    assert server.round_number == 0


def test_without_test_data_the_fix_is_named():
    with pytest.raises(ConfigError, match=r"give fit a test set, fit\(rounds, test=\(x, y\)\)"):
        served().fit(1, callbacks=[EarlyStopping()])


class Mine(Observer):
    """A callback of a user's own."""

    def __init__(self):
        self.seen = []

    def begin(self, server, rounds, figures):
        self.seen.append(("begin", rounds, figures["round"]))
        return "mine looks on"

    def round(self, figures):
        self.seen.append(figures["round"])
        self.enough = "mine has seen enough" if len(self.seen) > 2 else ""
        return {"mine": -float(figures["round"])}

    def finish(self, server):
        self.seen.append("finish")

    def close(self):
        self.seen.append("close")


def test_an_observer_of_ones_own_is_a_callback_and_its_figures_can_be_watched(capsys):
    mine, best = Mine(), BestModel("mine", mode="max")
    server = served()
    history = server.fit(5, callbacks=[mine, best])
    assert mine.seen == [("begin", 5, 0), 1, 2, "finish", "close"]
    assert history.column("mine") == [(1, -1.0), (2, -2.0)] and best.round_number == 1
    assert capsys.readouterr().out.splitlines() == ["mine looks on", "mine has seen enough"]
    # one that the server has sees a loop of the user's own as well
    mine = Mine()
    server = served(observers=[mine])
    for figures in server.rounds(3):
        assert figures["mine"] == -1.0
        break
    assert mine.seen == [("begin", 3, 0), 1, "finish", "close"] and server.observers == [mine]


def test_observers_that_save_come_last_and_a_training_that_fails_lets_everything_go(tmp_path):
    class Breaks(Mine):
        def round(self, figures):
            raise ValueError("mine broke")

    saving, stopping = Checkpoint(tmp_path), EarlyStopping()
    server = served()
    server.fit(1, TEST, callbacks=[saving, stopping, Mine()], progress=False)
    assert server.state_dict()["observers"]["EarlyStopping"]["round"] == 1
    again = served()
    resume(again, tmp_path)
    assert again.state_dict()["observers"]["EarlyStopping"]["round"] == 1
    broken = Breaks()
    with pytest.raises(ValueError, match="mine broke"):
        again.fit(1, TEST, callbacks=[broken, Checkpoint(tmp_path)], progress=False)
    assert broken.seen[1:] == ["close"] and not again.observers
    again.fit(1, callbacks=[Checkpoint(tmp_path / "after")], progress=False)


def test_masks_show_a_callback_nothing_of_a_single_client():
    class Curious(Observer):
        def sent(self, released):
            raise AssertionError

    server = served(Recipe(aggregator=Secure(range=4.0)), (6, 7, 8))
    with pytest.raises(ConfigError, match="Curious looks at what clients send"):
        server.fit(1, callbacks=[Curious()])
    assert not any("validation" in k for k in server.fit(1, TEST, progress=False)[-1])
    with pytest.raises(
        ConfigError, match="figures of single clients, and aggregator secure hides them"
    ):
        server.evaluate_clients()


class Stops(Observer):
    """Presses Ctrl-C: in the middle of a round, or once a round is over."""

    def __init__(self, middle, times=1):
        self.middle, self.times, self.count = middle, times, 0

    def press(self):
        self.count += 1
        if self.count == 3:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)

    def sent(self, released):
        if self.middle:
            self.press()

    def round(self, figures):
        if not self.middle:
            self.press()


@pytest.mark.parametrize(
    ("engine", "middle", "times", "done"),
    [
        (Local(chunk=1), False, 1, 3),
        (Local(chunk=1), True, 1, 2),
        (Local(chunk=1), True, 2, 1),
        (Processes(workers=2, chunk=1), True, 2, 1),
    ],
    ids=["between", "within", "at-once", "at-once-processes"],
)
def test_an_interrupt_leaves_a_server_that_goes_on_bit_for_bit(engine, middle, times, done, capsys):
    whole, server = served(engine=Local(chunk=1)), served(engine=engine)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        server.fit(5, TEST, callbacks=[Stops(middle, times), BestModel()])
    assert signal.getsignal(signal.SIGINT) is before and not server.observers
    assert [m["round"] for m in server.history] == list(range(done + 1))  # nothing is lost
    assert "stopping after this round" in capsys.readouterr().out
    server.fit(5 - done, progress=False)
    whole.fit(5, progress=False)
    server.close()
    assert all(torch.equal(v, weights(server.model)[k]) for k, v in weights(whole.model).items())


def test_fit_works_in_a_thread_and_in_a_running_event_loop():
    async def run():
        server = served()
        here = server.fit(1, TEST, callbacks=[EarlyStopping()], progress=False)
        there = await asyncio.to_thread(served().fit, 1, TEST, callbacks=[EarlyStopping()])
        return here[-1]["test_loss"], there[-1]["test_loss"]

    here, there = asyncio.run(run())
    assert here == there


def test_a_run_of_another_seed_or_of_other_clients_is_not_gone_on_with(tmp_path):
    served(seed=3).fit(1, callbacks=[Checkpoint(tmp_path)], progress=False)
    for other, why in (
        (served(seed=4), "has seed 3, not 4"),
        (served(sizes=(12, 20, 9), seed=3), r"of other clients than these 3 \(2\)"),
        (Server(mlp(), make_clients((12, 20))[::-1], served().recipe, seed=3), r"2 \(others\)"),
    ):
        with pytest.raises(ConfigError, match=why):
            resume(other, tmp_path)
        assert other.round_number == 0
    assert resume(served(seed=3), tmp_path)


def test_a_run_of_another_recipe_or_plan_is_not_gone_on_with(tmp_path, capsys):
    def own(optimizer, steps):
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    def made(model, lr, decay):
        return torch.optim.SGD(model.parameters(), lr, weight_decay=decay)

    first = Recipe(lr=np.float64(0.5))
    served(first, schedule=Falling()).fit(1, callbacks=[Checkpoint(tmp_path / "a")], progress=False)
    served(Recipe(privacy=PLAN)).fit(1, callbacks=[Checkpoint(tmp_path / "p")], progress=False)
    for kept, recipe, why in (
        ("a", replace(first, lr=0.1), r"a has lr = 0\.5, not 0\.1: make the Server as it was"),
        ("a", replace(first, optimizer="adam"), "optimizer = 'SGD', not 'adam'"),
        ("a", replace(first, scheduler=own), "scheduler = None, not 'own'"),
        ("a", replace(first, optimizer=partial(made, decay=0.1)), r"not 'made\(decay=0\.1\)'"),
        ("p", Recipe(privacy=replace(PLAN, clip=7.0)), r"privacy\.clip = 1\.0, not 7\.0"),
    ):
        other = served(recipe, **({} if kept == "p" else {"schedule": Falling()}))
        with pytest.raises(ConfigError, match=why):
            resume(other, tmp_path / kept)
        assert other.round_number == 0
    with pytest.raises(ConfigError, match="lr = 0"):  # brought there by hand
        other = served(replace(first, lr=0.1), schedule=Falling())
        other.load_state_dict(checkpoint.load(tmp_path / "a/checkpoints") | {"observers": {}})
        other.fit(1, callbacks=[Checkpoint(tmp_path / "a")])
    # what lies elsewhere in memory is the same; an older checkpoint does not tell, which is said
    capsys.readouterr()
    assert resume(served(first, schedule=Falling()), tmp_path / "a")
    assert not capsys.readouterr().out
    old = checkpoint.load(tmp_path / "a/checkpoints")
    del old["recipe"]
    checkpoint.save(tmp_path / "a/checkpoints", old)
    assert resume(served(first, schedule=Falling()), tmp_path / "a")
    assert "does not say by what recipe it was made" in capsys.readouterr().out


def test_a_model_of_other_layers_between_the_same_weights_does_not_go_on(tmp_path):
    def dropping(rate):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(rate), nn.Linear(8, 5))
        return Server(net, make_clients((12, 20)), Recipe(), seed=3)

    dropping(0.5).fit(1, callbacks=[Checkpoint(tmp_path)], progress=False)
    with pytest.raises(ConfigError, match=r"model_layers = '.*p=0\.5.*, not '.*p=0\.1"):
        resume(dropping(0.1), tmp_path)
    assert resume(dropping(0.5), tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoints")
    saved["recipe"].pop("model_layers")
    checkpoint.save(tmp_path / "checkpoints", saved)
    assert resume(dropping(0.1), tmp_path)  # an older version's does not tell


def test_a_model_is_known_by_its_layers_wherever_they_lie_and_compiled_or_not():
    class Scaled(nn.Module):
        def extra_repr(self):
            return repr(object())

    net, compiled = nn.Sequential(Scaled(), nn.Linear(2, 2)), nn.Module()
    compiled._orig_mod = net  # as torch.compile holds it
    assert layers(net) == layers(nn.Sequential(Scaled(), nn.Linear(2, 2)))
    assert layers(net) == layers(compiled) != layers(net[1])


def test_a_run_of_the_command_is_gone_on_with_by_the_command(tmp_path):
    folder = tmp_path / "a run"
    checkpoint.save(folder / "checkpoints", served().state_dict() | {"config": 'dataset = "x"'})
    for go_on in (
        lambda: resume(served(), folder),
        lambda: served().fit(1, callbacks=[Checkpoint(folder)], progress=False),
    ):
        with pytest.raises(ConfigError, match=f"fedtorch train --run-dir '{folder}' --resume"):
            go_on()
