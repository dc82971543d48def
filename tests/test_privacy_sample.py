"""Sample-level privacy: Poisson batches, public rate and divisor, and what is refused."""

import math
import tracemalloc

import pytest
import torch
from scipy import stats
from torch import nn

from fedtorch import Client, FedAvg, FedProx, Scaffold, Uniform
from fedtorch.privacy import SampleLevel, models
from fedtorch.privacy.noise.keystream import Scratch
from fedtorch.privacy.noise.streams import BLOCK, stream
from fedtorch.types import ConfigError
from private_case import clients, flat, model, server, silent, visit


@pytest.mark.parametrize("n", [1, 2, 49, 93, 98, 103])
def test_batches_are_as_many_as_planned_whatever_the_size(n):
    plan = SampleLevel(sample_rate=0.1, steps=7)
    batches = plan.poisson(n, stream("aes", None, "x"), Scratch())
    assert len(batches) == 7
    for row in batches:
        real = row[row >= 0]
        assert len(real.unique()) == len(real) and (real < n).all()


@pytest.mark.parametrize("n", [0, 3, 2 * BLOCK + 5])
def test_coins_of_a_block_after_another_are_those_drawn_at_once_in_less_memory(n):
    plan = SampleLevel(sample_rate=0.01, steps=12)
    at_once = stream("aes", 7, "x").uniform(12 * n).reshape(12, n) < 0.01
    tracemalloc.start()
    batches = plan.poisson(n, stream("aes", 7, "x"), Scratch())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    chosen = [row[row >= 0].tolist() for row in batches]
    assert chosen == [row.nonzero().flatten().tolist() for row in at_once]
    assert most < 60 * BLOCK + 16 * batches.numel() + 10_000  # 36 bytes a coin, and the batches


def test_examples_are_in_a_batch_independently_with_the_rate():
    plan = SampleLevel(sample_rate=0.3, steps=20_000)
    batches = plan.poisson(2, stream("aes", None, "x"), Scratch())
    first, second = ((batches == i).any(1) for i in range(2))
    assert abs(first.double().mean() - 0.3) < 0.015
    table = [[int((first == a).logical_and(second == b).sum()) for b in (0, 1)] for a in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-4
    assert (~first & ~second).any()  # empty batches exist


def test_empty_batches_are_steps_with_noise():
    who = clients((5,), 40)
    plan = SampleLevel(sample_rate=1e-9, steps=4, batch_size=3.0, clip=0.5, rounds=1)
    sent = flat(visit(silent(40, 500), who, plan, noise=2.0))
    assert abs(sent.std().item() / (2.0 * 0.5 * 2 / 3) - 1) < 0.02  # sqrt(4 steps)


def test_the_divisor_does_not_follow_the_data():
    who = clients((8,))
    plan = SampleLevel(sample_rate=1.0, steps=1, batch_size=10.0, clip=1e6, rounds=1)
    small = flat(visit(model(), who, plan, noise=0.0))
    x, y = who[0].data.tensors
    who[0].data.tensors = (torch.cat([x, x]), torch.cat([y, y]))
    assert torch.allclose(flat(visit(model(), who, plan, noise=0.0)), 2 * small, atol=1e-6)


def test_adding_an_example_moves_the_sum_by_the_clip_at_most():
    who, more = clients((8,)), clients((9,), scale=30.0)
    more[0].data.tensors[0][:8] = who[0].data.tensors[0]
    more[0].data.tensors[1][:8] = who[0].data.tensors[1]
    plan = SampleLevel(sample_rate=1.0, steps=1, batch_size=1.0, clip=0.2, rounds=1)
    a, b = (flat(visit(model(), w, plan, noise=0.0)) for w in (who, more))
    assert 0.19 < (a - b).norm() <= 0.2 * (1 + 1e-5)


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedProx(mu=0.1), Scaffold()], ids=lambda s: type(s).__name__
)
def test_chunks_agree_with_noise_on(strategy):
    results = []
    for chunk in (1, 2, 3):
        net = model()
        plan = SampleLevel(mode="stacked", insecure_seed=1, noise_multiplier=1.0, rounds=3)
        for _ in server(net, clients(), plan, strategy=strategy, chunk=chunk).rounds(3):
            pass
        results.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert (results[0] - results[1]).abs().max() < 1e-6
    assert (results[0] - results[2]).abs().max() < 1e-6


def test_with_no_noise_and_no_clip_it_is_fedavg_on_the_same_batches():
    plan = SampleLevel(
        sample_rate=1.0, steps=2, batch_size=12.0, clip=1e9, noise_multiplier=1e-20, rounds=2
    )
    nets = model(), model()
    for net, private in zip(nets, (plan, None), strict=True):
        for _ in server(net, clients((12, 12)), private, lr=0.3, epochs=2, batch_size=None).rounds(
            2
        ):
            pass
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_what_is_charged_is_what_was_done():
    plan = SampleLevel(steps=3, sample_rate=0.5, noise_multiplier=1.0, rounds=6)
    run = server(model(), clients(), plan, participation=Uniform(cohort_size=2))
    took_part = {"c0": 0, "c1": 0, "c2": 0}
    for _ in range(6):
        for who in run.round()["cohort"]:
            took_part[who] += 1
    spent = run.private.ledger.spent_by_client(plan.delta)
    for who, n in took_part.items():
        assert spent.get(who, 0.0) == pytest.approx(plan.planned(1.0, n) if n else 0.0)
    assert run.private.spent() == max(spent.values())


def test_noise_is_calibrated_for_the_whole_run():
    plan = SampleLevel(epsilon=8.0, sample_rate=0.1, steps=20)
    assert plan.calibrated(50) == pytest.approx(2.0532, abs=0.01)  # a round alone would take 0.7
    assert 7.98 < plan.planned(plan.calibrated(50), 50) <= 8.0


REFUSED = [
    (nn.BatchNorm1d(6), "GroupNorm"),
    (nn.BatchNorm1d(6, affine=False), "GroupNorm"),
    (nn.SyncBatchNorm(6), "GroupNorm"),
    (type("MyNorm", (nn.BatchNorm1d,), {})(6).requires_grad_(False), "GroupNorm"),
    (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()),
     "track_running_stats"),
]  # fmt: skip


class Shrinks(nn.Linear):
    """Writes to its weights as it is called."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(1 - 1e-3 * x.abs().mean())
        return super().forward(x)


@pytest.mark.parametrize(
    "layer, why",
    [
        (nn.Embedding(4, 3, max_norm=100.0), "scales the rows"),
        (nn.EmbeddingBag(4, 3, max_norm=0.5), "scales the rows"),
        (Shrinks(6, 4), "parameter 0.weight is changed by the model's forward"),
    ],
)
def test_weights_that_forward_itself_changes_are_refused(layer, why):
    # a row that an example looked up would be shorter afterwards, and no noise could hide it
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer.weight.shape[0], 4))
    who = clients()
    if not isinstance(layer, Shrinks):
        net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(4))
        for c in who:
            c.data.tensors = (c.data.tensors[0].abs().long().clamp(max=3), c.data.tensors[1])
        net(who[0].data.tensors[0])
    with pytest.raises(ConfigError, match=why):
        server(net, who, SampleLevel(rounds=1))


@pytest.mark.parametrize("layer, fix", REFUSED, ids=lambda v: getattr(v, "_get_name", lambda: v)())
def test_layers_with_statistics_are_refused_frozen_or_not(layer, fix):
    net = nn.Sequential(layer, nn.Linear(6, 4))
    with pytest.raises(ConfigError, match=fix) as e:
        server(net, clients(), SampleLevel(rounds=1))
    assert "--privacy.fix-model" in str(e.value)
    visit(models.fixed(net), clients((5,)), SampleLevel(rounds=1, mode="hooks"), noise=1.0)


class Counter(nn.Module):
    """A layer that remembers the data it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        if self.training:
            self.mean += x.mean(0)
        return self.linear(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))[:, :4]


@pytest.mark.parametrize(
    "net, message",
    [(Counter(), "buffer mean"), (Unused(), r"unused\.weight"), (Mixing(), "mixes the examples")],
    ids=["buffer", "unused", "mixing"],
)
def test_models_that_void_the_claim_are_refused(net, message):
    with pytest.raises(ConfigError, match=message):
        server(net, clients(), SampleLevel(rounds=1))


class Borrowed(nn.Module):
    """Embeddings used once more as the output layer, past any layer that a hook could see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) @ self.second.weight


class Circular(nn.Module):
    """Opacus pads its per-example gradients with zeros, whatever the layer pads with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x.view(-1, 2, 3))).flatten(1))


@pytest.mark.parametrize(
    ("kind", "wrong", "why", "right"),
    [
        (Borrowed, ("layers", "hooks", "ghost"), "second.weight is used outside", "stacked"),
        (
            Circular,
            ("hooks", "ghost"),
            "differ from those of the examples one by one",
            "auto",
        ),  # fast
    ],
)
def test_modes_that_get_the_gradients_of_a_model_wrong_are_refused(kind, wrong, why, right):
    for mode in wrong:
        with pytest.raises(ConfigError, match=why):
            server(kind(), clients(), SampleLevel(rounds=1, mode=mode))
    assert server(kind(), clients(), SampleLevel(rounds=1)).session.recipe.privacy.mode == right


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_models_of_16_bits_are_refused(kind):
    from fedtorch.privacy.models import narrow

    with pytest.raises(ConfigError, match=r"call model\.float\(\)"):
        narrow(nn.Linear(6, 4).to(kind))
    narrow(nn.Linear(6, 4).double())


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 6, bias=False), nn.Linear(6, 4)
        self.head.requires_grad_(False)

    def forward(self, x):
        h = self.inner(x.view(-1, 2, 2))
        return 30 * self.head(h[:, 0] - h[:, 1])


def test_ghost_over_sequences_is_refused_and_others_hold_where_large_numbers_cancel():
    torch.manual_seed(1)
    net = Difference()
    # two rows that are large and nearly the same: their Gram matrix would lose what is left of them
    who = [Client("c", (torch.tensor([[1e5, 3e4, 1e5 + 1, 3e4]]), torch.tensor([1])))]
    one = {"sample_rate": 1.0, "steps": 1, "batch_size": 1.0, "rounds": 1, "clip": 0.5}
    norms = [
        flat(visit(net, who, SampleLevel(mode=m, **one), 0.0)).norm()
        for m in ("layers", "stacked", "hooks")
    ]
    assert max(norms) <= 0.5 * (1 + 1e-5)
    with pytest.raises(ConfigError, match="layer inner sees several rows"):
        server(net, who, SampleLevel(mode="ghost", rounds=1))
    assert server(net, who, SampleLevel(rounds=1)).session.recipe.privacy.mode == "layers"


def test_examples_are_found_to_mix_where_the_first_client_has_one_alone():
    with pytest.raises(ConfigError, match="mixes the examples"):
        server(Mixing(), clients((1, 9)), SampleLevel(rounds=1))


def test_an_example_alone_that_is_not_finite_does_not_stop_the_probe():
    who = clients((1,))
    who[0].data.tensors[0].fill_(math.nan)
    server(nn.Linear(6, 4), who, SampleLevel(rounds=1, mode="hooks")).round()


def test_tied_weights_are_refused_by_ghost_and_right_elsewhere():
    with pytest.raises(ConfigError, match="shared by two layers"):
        server(Tied(), clients(), SampleLevel(rounds=1, mode="ghost"))
    net = Tied()
    plans = [
        SampleLevel(mode=m, sample_rate=1.0, steps=1, rounds=1, insecure_seed=1)
        for m in ("hooks", "stacked")
    ]
    a, b = (flat(visit(net, clients((5,)), p, noise=0.0)) for p in plans)
    assert (a - b).abs().max() < 1e-6
    assert server(Tied(), clients(), SampleLevel(rounds=1)).session.recipe.privacy.mode != "ghost"


def test_a_recurrent_model_trains_as_it_is_or_with_twins_by_opacus():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(self.lstm(x[:, None])[0][:, -1])

    net = Recurrent()
    with pytest.raises(ConfigError, match="fix-model"):
        server(net, clients(), SampleLevel(rounds=1, mode="hooks"))
    run = server(net, clients(), SampleLevel(rounds=1, fix_model=True))
    assert "taken by formulas of the model's layers" in " ".join(run.notes)
    run.round()
    assert type(run.model.lstm) is nn.LSTM
    run = server(net, clients(), SampleLevel(rounds=1, fix_model=True, mode="hooks"))
    run.round()
    assert type(run.model.lstm) is not nn.LSTM


def test_a_loss_for_the_whole_batch_is_refused():
    from fedtorch import Recipe, Server

    recipe = Recipe(loss=nn.CrossEntropyLoss(), privacy=SampleLevel(rounds=1))
    with pytest.raises(ConfigError, match="one number for each example"):
        Server(model(), clients(), recipe)


class Experts(nn.Module):
    """Each example goes to one of two layers, which see a part of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.choice, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 4) for _ in "ab")

    def forward(self, x):
        share, place = self.choice(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            mine = place == k
            out = out.index_put((mine,), expert(x[mine]) * share[mine, None])
        return out


def test_layers_that_see_a_part_of_a_batch_are_trained_example_by_example():
    from fedtorch import Recipe, Server

    plan = SampleLevel(rounds=1, noise_multiplier=1.0, sample_rate=0.5, steps=2, batch_size=8)
    server = Server(Experts(), clients(), Recipe(privacy=plan))
    assert server.session.recipe.privacy.mode == "alone"
    server.round()


class Compiled(nn.Module):
    """Calls its layers, and so hooks, only while it is watched, as torch.compile does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in "ab")

    def forward(self, x):
        if torch.overrides._len_torch_function_stack():
            return sum(layer(x) for layer in self.layers)
        return sum(nn.functional.linear(x, m.weight, m.bias) for m in self.layers)


def test_a_compiled_model_that_calls_no_hooks_trains_without_them():
    from fedtorch import Recipe, Server

    plan = SampleLevel(rounds=1, noise_multiplier=1.0, sample_rate=0.5, steps=2, batch_size=8)
    server = Server(Compiled(), clients(), Recipe(privacy=plan))
    server.round()
    assert server.session.recipe.privacy.mode == "stacked"


def test_batchnorm_in_evaluation_mode_neither_mixes_nor_keeps_anything():
    from fedtorch import Recipe, Server

    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    net[1].eval().requires_grad_(False)
    recipe = Recipe(privacy=SampleLevel(rounds=1, noise_multiplier=1.0))
    server = Server(net, clients(), recipe)
    server.round()
    assert not net[1].running_mean.any()
    with pytest.raises(ConfigError, match="BatchNorm1d"):  # it would train as a whole
        Server(net.eval(), clients(), recipe)


def test_the_fix_keeps_groups_that_say_something():
    net = nn.Sequential(
        nn.Conv2d(1, 7, 3),
        nn.BatchNorm2d(7),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.BatchNorm1d(7),
    )
    fixed = models.fixed(net)
    assert isinstance(fixed[1], nn.GroupNorm) and fixed[1].num_groups == 1
    assert fixed[4].num_groups == 1
    assert not fixed[2].inplace
    assert isinstance(net[1], nn.BatchNorm2d)  # a copy was fixed


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (2, 1), (6, 3), (12, 6), (64, 32), (66, 22), (96, 32), (7, 1)]
)
def test_the_fix_takes_as_many_groups_as_leave_two_channels_each(channels, groups):
    for old in (nn.BatchNorm2d(channels, eps=0.01), nn.BatchNorm3d(channels, affine=False)):
        new = models.fixed(nn.Sequential(old))[0]
        assert (new.num_groups, new.num_channels) == (groups, channels)
        assert (new.eps, new.affine) == (old.eps, old.affine)
    assert models.fixed(nn.BatchNorm1d(channels)).num_groups == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip": 0.0}, "clip"),
        ({"clip": math.inf}, "clip"),
        ({"clip": math.nan}, "clip"),
        ({"clip": 1e-30}, "between 1e-06 and 1e"),
        ({"clip": 1e10}, "between 1e-06 and 1e"),
        ({"noise_multiplier": 1e-29, "clip": 1e-6}, "vanishes in float32"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "not both"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"max_batch": 0}, "max_batch"),
        ({"rounds": True}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"batch_size": 0.0}, "batch_size"),
        ({"accountant": "gdp"}, "gdp"),
        ({"mode": "ew"}, "mode"),
        ({"rng": "cuda"}, "rng"),
        ({"budget": "ignore"}, "budget"),
    ],
)
def test_options_without_a_guarantee_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SampleLevel(**options)


@pytest.mark.parametrize("options", [{"steps": 3}, {"drop_last": True}])
def test_other_ways_to_ask_for_batches_are_refused(options):
    from fedtorch import Recipe, Server

    with pytest.raises(ConfigError):
        Server(model(), clients(), Recipe(privacy=SampleLevel(rounds=1), **options))


def test_the_plan_must_know_how_many_rounds():
    with pytest.raises(ConfigError, match=r"privacy\.rounds"):
        server(model(), clients(), SampleLevel())


def test_no_buffers_leave_a_private_client():
    class Constant(Counter):
        def forward(self, x):
            return self.linear(x + self.mean)

    net = Constant()
    update = visit(net, clients((5,)), SampleLevel(rounds=1, mode="hooks"), noise=1.0)
    assert set(update) == {"linear.weight", "linear.bias"}


def test_clients_too_small_and_a_delta_too_large_are_said():
    run = server(model(), clients((2, 30)), SampleLevel(rounds=1, delta=0.1))
    assert [n for n in run.notes if "client c0 has 2 examples" in n]
    assert [n for n in run.notes if "delta 0.1 lets one in 10 examples" in n]
    assert not [
        n for n in server(model(), clients((9, 30)), SampleLevel(rounds=1)).notes if "delta" in n
    ]
