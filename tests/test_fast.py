"""The fast path and the general path are one algorithm: the same weights from the same batches."""

import itertools
import sys
from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.fast import chunk_data, dual, layers, offer, reader
from fedtorch.fast import solver as solve
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.training.losses import binary_cross_entropy, mean_squared_error
from fedtorch.types import ConfigError

SIZES = [37, 5, 18, 64, 1, 23]  # unequal, one below a batch, one single example


def clients(inputs: int = 30, classes: int = 4, sizes: list[int] = SIZES) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}",
            (torch.randn(n, inputs, generator=g), torch.randint(0, classes, (n,), generator=g)),
        )
        for k, n in enumerate(sizes)
    ]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(30, 25), nn.Tanh(), nn.Linear(25, 20, bias=False), nn.GELU(),
        nn.Linear(20, 12), nn.Sigmoid(), nn.Sequential(nn.Linear(12, 8), nn.SiLU()), nn.Linear(8, 4),
    )  # fmt: skip


def trained(recipe: Recipe, solver: str, model: nn.Module, who: list[Client], chunk=None):
    server = Server(model, who, recipe, engine=Local(solver=solver, chunk=chunk), seed=3)
    figures = list(server.rounds(2))
    return {k: v.double() for k, v in model.state_dict().items()}, figures


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of a tensor."""
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


@pytest.fixture(params=["rule", "dual", "own"])
def form(request, monkeypatch):
    """Layers held as the cost rule says, all without copies, all with copies."""
    if request.param != "rule":
        monkeypatch.setattr(solve, "pays", lambda *_: request.param == "dual")
    return request.param


STRATEGIES = {"fedavg": FedAvg(), "fedprox": FedProx(mu=0.5), "scaffold": Scaffold()}
OPTIONS: dict[str, dict] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
}


def recipe_of(strategy: str, options: str) -> Recipe:
    made = ClientOptimizer("SGD", OPTIONS[options])
    return Recipe(STRATEGIES[strategy], optimizer=made, lr=0.1, epochs=2, batch_size=8)


@cache
def general(strategy: str, options: str):
    return trained(recipe_of(strategy, options), "general", mlp(), clients())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_weights_as_the_general_path(form, strategy, options):
    recipe = recipe_of(strategy, options)
    slow, before = general(strategy, options)
    for chunk in (4, len(SIZES)) if form == "rule" else (4,):
        fast, after = trained(recipe, "fast", mlp(), clients(), chunk)
        assert apart(fast, slow) < 1e-5
        for a, b in zip(after, before, strict=True):
            assert sorted(a["cohort"]) == sorted(b["cohort"])
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
            assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "order", [{"steps": 7}, {"batch_size": None}, {"drop_last": True}], ids=str
)
def test_steps_full_batches_and_dropped_ones(form, order):
    recipe = Recipe(lr=0.2, **({"batch_size": 8} | order))
    slow, _ = trained(recipe, "general", mlp(), clients())
    fast, _ = trained(recipe, "fast", mlp(), clients())
    assert apart(fast, slow) < 1e-5


@pytest.mark.parametrize("loss", [mean_squared_error, binary_cross_entropy])
def test_other_losses(form, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 1))
    twin = nn.Sequential(nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 1))
    twin.load_state_dict(model.state_dict())
    who = clients(classes=2)
    recipe = Recipe(loss=loss, lr=0.05, batch_size=8)
    assert (
        apart(trained(recipe, "fast", model, who)[0], trained(recipe, "general", twin, who)[0])
        < 1e-5
    )


LABELS = {
    "none where there are -100": lambda y: torch.where(torch.arange(len(y)) > 9, -100, y),
    "bytes": lambda y: y.byte(),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_cross_entropy_takes_and_a_loop_over_classes_would_not(kind):
    ends = []
    for solver in ("fast", "general"):
        who = clients()
        for c in who:
            c.data.tensors = c.data.tensors[0], LABELS[kind](c.data.tensors[1])
        ends.append(trained(Recipe(lr=0.1, batch_size=8), solver, mlp(), who))
    (fast, told), (slow, figures) = ends
    assert apart(fast, slow) < 1e-5
    assert told[1]["train_loss"] == pytest.approx(figures[1]["train_loss"], rel=1e-5)


@pytest.mark.parametrize("solver", ["fast", "general"])
def test_a_column_of_labels_is_refused_as_torch_does(solver):
    who = clients()
    for c in who:
        c.data.tensors = c.data.tensors[0], c.data.tensors[1][:, None]
    with pytest.raises(ConfigError, match="classes lie on axis 1"):
        trained(Recipe(lr=0.1, batch_size=8), solver, mlp(), who)


@pytest.mark.parametrize("args", [{}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.5), Scaffold()], ids=str)
def test_inputs_that_are_zero_in_all_examples_are_left_out_and_their_weights_are_not(
    form, strategy, args
):
    def blank() -> list[Client]:
        who = clients()
        for k, c in enumerate(who):
            c.data.tensors[0][:, 4:12] = 0
            c.data.tensors[0][:, 20 + k] = 0  # zero for one client only
        return who

    used = chunk_data.Kept().rows([c.data for c in blank()], torch.device("cpu")).used
    assert used.tolist() == [*range(4), *range(12, 30)]
    optimizer = ClientOptimizer("SGD", args)
    recipe = Recipe(strategy, optimizer=optimizer, lr=0.1, batch_size=8)
    slow, _ = trained(recipe, "general", mlp(), blank())
    fast, _ = trained(recipe, "fast", mlp(), blank())
    assert apart(fast, slow) < 1e-5


def test_examples_that_are_all_zero_train_the_biases(form):
    who = clients()
    for c in who:
        c.data.tensors[0].zero_()
    ends = [trained(Recipe(lr=0.1, batch_size=8), s, mlp(), who)[0] for s in ("fast", "general")]
    assert apart(*ends) < 1e-5


def test_an_input_that_comes_to_be_used_is_used():
    who, models = clients(), (mlp(), mlp())
    for c in who:
        c.data.tensors[0][:, 4:12] = 0
    recipe = Recipe(lr=0.1, batch_size=8)
    servers = [
        Server(m, who, recipe, engine=Local(solver=solver), seed=3)
        for m, solver in zip(models, ("fast", "general"), strict=True)
    ]
    for server in servers:
        server.round()
    who[3].data.tensors[0][5, 7] = 2.0
    for server in servers:
        server.round()
    assert apart(models[0].state_dict(), models[1].state_dict()) < 1e-5


def test_training_moves_the_weights():
    # without this, parity would also hold for two paths that do nothing
    assert apart(trained(Recipe(lr=0.1), "fast", mlp(), clients())[0], mlp().state_dict()) > 1e-2


def test_a_client_that_diverges_fails_alone(form):
    who = clients()
    who[2].data.tensors[0][3] = float("nan")
    _, (first, _) = trained(Recipe(lr=0.1, batch_size=8), "fast", mlp(), who)
    assert first["failed"] == {"c2": "nonfinite"} and first["clients"] == 5
    rest = [c for c in clients() if c.id != "c2"]
    model, twin = mlp(), mlp()
    Server(model, who, Recipe(lr=0.1), engine=Local(solver="fast"), seed=3).round()
    Server(twin, rest, Recipe(lr=0.1), engine=Local(solver="general"), seed=3).round()
    assert apart(model.state_dict(), twin.state_dict()) < 1e-5


class Branch(nn.Module):
    """Control flow on data: nothing that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(30, 4), nn.Linear(30, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def frozen() -> nn.Module:
    model = mlp()
    model[1].weight.requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30), nn.Linear(30, 4))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[1].register_forward_hook(lambda m, a, out: out * 2)
    return model


def counting() -> nn.Module:
    model = mlp()
    model.register_buffer("seen", torch.zeros(1))
    return model


class Doubled(nn.Linear):
    """A layer that only looks known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


REFUSED = {
    "torch.fx cannot read its forward": (Branch(), {}),
    "layer 1 (AlphaDropout) has no fast form": (
        nn.Sequential(nn.Linear(30, 4), nn.AlphaDropout(), nn.Linear(4, 4)), {},
    ),
    "it does not end in a linear layer": (nn.Sequential(Doubled(30, 4)), {}),
    "parameter 0.weight is used outside of a layer": (
        nn.Sequential(Doubled(30, 4), nn.Linear(4, 4)), {},
    ),
    "it has statistics (seen)": (counting(), {}),
    "parameter 1.weight is frozen": (frozen(), {}),
    "a parameter is shared": (tied(), {}),
    "layer 1 (Linear) has hooks": (hooked(), {}),
    "the client optimizer is Adam": (mlp(), {"optimizer": ClientOptimizer("Adam")}),
    "SGD with nesterov": (
        mlp(), {"optimizer": ClientOptimizer("SGD", {"momentum": 0.9, "nesterov": True})},
    ),
    "one number for the whole batch": (mlp(), {"loss": nn.CrossEntropyLoss()}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_read_trains_on_the_general_path_and_says_why(why):
    model, options = REFUSED[why]
    recipe = Recipe(**({"lr": 0.01} | options))
    server = Server(model, clients(), recipe)
    assert any(why in note for note in server.session.notes), server.session.notes
    assert server.round()["clients"] == len(SIZES)
    with pytest.raises(ConfigError, match=r"engine\.solver fast cannot train this"):
        Server(model, clients(), recipe, engine=Local(solver="fast"))


@pytest.mark.parametrize("numba, how", [(True, ", compiled loops"), (False, "; pip install 'fed")])
def test_the_note_says_if_loops_are_compiled_or_how_they_could_be(numba, how, monkeypatch):
    monkeypatch.setattr("fedtorch.engines.solver_choice.available", lambda: numba)
    (note,) = Server(mlp(), clients(), Recipe(lr=0.01)).notes
    assert note.startswith(f"fast path, up to {len(SIZES)} clients at once{how}")
    slow = Recipe(lr=0.01, optimizer=ClientOptimizer("Adam"))
    assert "pip" not in " ".join(Server(mlp(), clients(), slow).notes)  # it would not help
    private = Recipe(lr=0.01, privacy=SampleLevel(noise_multiplier=1.0, rounds=1, mode="stacked"))
    assert ("drawn by NumPy" in " ".join(Server(mlp(), clients(), private).notes)) is not numba


def test_a_strategy_with_its_own_correction_is_not_guessed_at():
    class Sign(FedAvg):
        def correct(self, grads, params, ctx):
            return {k: g.sign() for k, g in grads.items()}

    server = Server(mlp(), clients(), Recipe(Sign(), lr=0.01))
    assert any("Sign corrects gradients in its own way" in n for n in server.session.notes)
    assert any("can be its correction" in n for n in server.session.notes)


def test_a_strategy_that_sends_more_than_the_delta_sees_every_client():
    seen = set()

    class Keeps(FedAvg):
        def upload(self, params, ctx):
            seen.update(len(v) for v in params.values())
            sent, _ = super().upload(params, ctx)
            return sent, {"last": sent["delta"]}

    server = Server(mlp(), clients(), Recipe(Keeps(), lr=0.1), engine=Local(solver="fast"))
    server.round()
    assert seen == {1, 2, len(SIZES)}  # for names and shapes, in a trial, then for all of them
    assert all(c.memory["last"]["1.weight"].shape == (25, 30) for c in server.clients)


def test_a_strategy_may_draw_for_what_it_sends_by_each_clients_seed():
    class Noisy(FedAvg):
        def upload(self, params, ctx):
            sent, memory = super().upload(params, ctx)
            for k, seed in enumerate(ctx.seeds):
                coins = torch.Generator().manual_seed(seed)
                for v in sent["delta"].values():
                    v[k] += torch.randn(v[k].shape, generator=coins) * 0.01
            assert len(ctx.seeds) == len(params["1.weight"])
            return sent, memory

    slow, _ = trained(Recipe(Noisy(), lr=0.1, batch_size=8), "general", mlp(), clients())
    fast, _ = trained(Recipe(Noisy(), lr=0.1, batch_size=8), "fast", mlp(), clients())
    assert apart(fast, slow) < 1e-5


def test_the_trial_catches_a_wrong_layer(monkeypatch):
    right = layers.Rule.keep.fget
    monkeypatch.setattr(layers.Rule, "keep", property(lambda r: right(r) * 0.99))
    found = offer(mlp(), [c.data for c in clients()], Recipe(lr=0.1))
    assert isinstance(found, str) and "differs from the general path" in found


def test_same_seed_same_bits():
    recipe = Recipe(lr=0.1, batch_size=8)
    a, b = (trained(recipe, "fast", mlp(), clients())[0] for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_seeds_and_cohorts_agree_between_paths():
    for seed, size in itertools.product((0, 1), (2, 6)):
        ends = []
        for solver in ("fast", "general"):
            model = mlp()
            server = Server(
                model, clients()[:size], Recipe(lr=0.1), engine=Local(solver=solver), seed=seed
            )
            server.round()
            ends.append(model.state_dict())
        assert apart(*ends) < 1e-5


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.5), Scaffold()], ids=str)
def test_private_steps_are_those_of_gradients_written_out_noise_and_all(strategy):
    # the same stream in the same order, so that the very noise agrees; Poisson batches may be empty
    ends = []
    for mode, solver in (("stacked", "auto"), ("auto", "fast")):
        plan = SampleLevel(
            rounds=2, noise_multiplier=0.5, clip=0.3, batch_size=6.0, steps=4, sample_rate=0.15,
            insecure_seed=5, mode=mode,
        )  # fmt: skip
        recipe = Recipe(strategy, lr=0.3, privacy=plan)
        ends.append(trained(recipe, solver, mlp(), clients(), chunk=3)[0])
    assert apart(*ends) < 1e-5
    assert apart(ends[0], mlp().state_dict()) > 1e-2


def test_a_nonfinite_example_counts_as_nothing_in_a_private_step():
    who = clients()
    who[0].data.tensors[0][1:4] = float("nan")
    plan = SampleLevel(rounds=2, noise_multiplier=1e-6, sample_rate=1.0, insecure_seed=5)
    ends = []
    for keep in (range(37), [0, *range(4, 37)]):
        mine = [Client("c0", tuple(t[list(keep)] for t in who[0].data.tensors)), *who[1:]]
        recipe = Recipe(lr=0.3, privacy=plan)
        ends.append(trained(recipe, "fast", mlp(), mine)[0])
    assert apart(*ends) < 1e-5


def test_private_noise_has_the_claimed_deviation():
    model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 4))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plan = SampleLevel(
        rounds=2, noise_multiplier=20.0, clip=1.0, batch_size=5.0, steps=3, sample_rate=0.5
    )
    who = clients()[:2]
    recipe = Recipe(lr=0.1, privacy=plan)
    Server(model, who, recipe, engine=Local(solver="fast")).round()
    # mean of 2 clients, 3 steps each of lr noise clip / batch_size
    std = 0.1 * 20.0 / 5.0 * (3 / 2) ** 0.5
    moved = (model.state_dict()["0.weight"] - start["0.weight"]).flatten()
    assert float(moved.std()) == pytest.approx(std, rel=0.1)
    columns = (model.state_dict()["0.weight"] - start["0.weight"]).T.corrcoef()
    assert float((columns - columns.diag().diag()).abs().max()) < 0.7  # no shared noise


def test_client_level_clipping_needs_no_copy_of_an_update(form):
    ends = []
    for solver in ("general", "fast"):
        plan = ClientLevel(rounds=2, noise_multiplier=1e-6, clip=0.05, insecure_seed=5)
        model = mlp()
        server = Server(
            model,
            clients(),
            Recipe(lr=0.2, batch_size=8, privacy=plan),
            engine=Local(solver=solver),
        )
        server.round()
        ends.append({k: v - mlp().state_dict()[k] for k, v in model.state_dict().items()})
    assert apart(*ends) < 1e-3
    total = sum(float(v.square().sum()) for v in ends[1].values()) ** 0.5
    assert total <= 0.05 * (1 + 1e-6)


def test_the_bound_on_a_norm_holds_where_everything_cancels():
    x = torch.cat([torch.randn(20, 300) * 100] * 2)
    D = torch.randn(1, 40, 20)
    D[:, 20:] = -D[:, :20]  # each row comes back with the other sign: the change is zero
    own = chunk_data.Rows([x], torch.zeros(40), (40,))
    taken = (torch.arange(40)[None],) * 2
    grams = chunk_data.Kept().gram(TensorDataset(x, own.y), False, x.device)[None]
    first = dual.First(
        reader.Linear("w", None, (20, 300)), torch.zeros(20, 300), None, layers.Rule(0.1),
        own, (grams, taken), False,
    )  # fmt: skip
    first.D.copy_(D)
    true = float((D[0].T @ x).double().square().sum())
    assert float(first.sq_norms(upper=True)) >= true


def test_bf16_is_close_and_much_like_float32(form):
    torch.manual_seed(0)
    x, y = torch.randn(90, 400), torch.randint(0, 3, (90,))
    who = [Client(str(k), (x[k * 30 : k * 30 + 30], y[k * 30 : k * 30 + 30])) for k in range(3)]
    ends = []
    for dtype in ("float32", "bf16"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 3))
        start = {k: v.clone() for k, v in model.state_dict().items()}
        engine = Local(solver="fast", dtype=dtype)
        server = Server(model, who, Recipe(lr=0.05, batch_size=10), engine=engine)
        server.round()
        ends.append({k: v - start[k] for k, v in model.state_dict().items()})
    assert apart(*ends) < 0.05
    assert (apart(*ends) > 1e-5) == (form != "own")  # copies are stepped in float32 throughout


def test_bf16_on_the_general_path_is_autocast():
    model = nn.Sequential(nn.Linear(30, 40), nn.AlphaDropout(0.0), nn.Linear(40, 4))
    server = Server(model, clients(), Recipe(lr=0.1), engine=Local(dtype="bf16"))
    assert any("autocast" in n for n in server.session.notes)
    seen = []
    server.session.model[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    server.round()
    assert set(seen) == {torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in model.state_dict().values())


def test_bf16_on_the_general_path_goes_where_float32_goes():
    ends = []
    for engine in (Local(dtype="bf16", solver="general"), Local(solver="general")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 4))
        start = {k: v.clone() for k, v in model.state_dict().items()}
        Server(model, clients(), Recipe(lr=0.2, epochs=2, batch_size=5), engine=engine).round()
        ends.append({k: v - start[k] for k, v in model.state_dict().items()})
    assert 0 < apart(*ends) < 0.2


@pytest.mark.parametrize(
    ("dtype", "privacy", "why"),
    [("bf16", SampleLevel(rounds=1), "sample-level"), ("half", None, "float32 or bf16")],
)
def test_dtypes_that_are_refused(dtype, privacy, why):
    with pytest.raises(ConfigError, match=why):
        Server(mlp(), clients(), Recipe(privacy=privacy), engine=Local(dtype=dtype))


@pytest.mark.parametrize("n", [5, 157_000, 3_000_000])
def test_a_bound_on_squares_holds_where_float32_loses_count(n):
    for row in (torch.full((1, n), 0.1), torch.randn(1, n)):
        true = float(row.double().square().sum())
        assert true <= float(layers.squares(row, upper=True)) <= true * (1 + 1e-4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_clip_holds_with_decay_and_in_bf16(half, decay):
    torch.manual_seed(0)
    x, y = torch.full((1, 30, 400), 1.0038), torch.randint(0, 3, (1, 30))
    plan = ClientLevel(rate=1.0, rounds=1, noise_multiplier=1e-9, clip=0.01, insecure_seed=1)
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 3))
    start = {k: v.clone().double() for k, v in model.state_dict().items()}
    recipe = Recipe(
        lr=0.1,
        batch_size=None,
        steps=3,
        privacy=plan,
        optimizer=ClientOptimizer("SGD", {"weight_decay": decay}),
    )
    engine = Local(solver="fast", dtype="bf16" if half else "float32")
    who = [Client(str(k), (x[0], y[0])) for k in range(6)]  # all alike, so that the mean is each
    server = Server(model, who, recipe, engine=engine)
    assert isinstance(server.session.choice.solver, solve.Fast)
    server.round()
    moved = sum((v - start[k]).square().sum() for k, v in model.state_dict().items()) ** 0.5
    assert 0.01 * (1 - 1e-2) < float(moved) <= 0.01 * (1 + 2e-6)


def test_a_sum_that_privacy_noises_is_float32_in_every_layer():
    shape, rule, weight = (200, 300), layers.Rule(0.1), torch.ones(2)
    named, w0 = reader.Linear("w", None, shape), torch.zeros(shape)
    x, D = torch.randn(160, 300), torch.randn(2, 80, 200)  # enough for bfloat16 to be worth it
    own = chunk_data.Rows([x], torch.zeros(160), (80, 80))
    places = torch.arange(160).view(2, 80), torch.arange(80).expand(2, 80)
    first = dual.First(named, w0, None, rule, own, (torch.zeros(2, 80, 80), places), True)
    hidden = dual.Hidden(named, w0, None, rule, (2, 80), True, own.ops)
    hidden.A.copy_(x.view(2, 80, 300))
    for layer in (first, hidden):
        layer.D.copy_(D)
        whole = -D.flatten(0, 1).double().T @ x.double()
        error = [(layer.weighted_sum(weight, exact)["w"] - whole).norm() for exact in (True, False)]
        assert error[0] < 1e-6 * whole.norm() < error[1]  # bfloat16 where it may be


def test_products_that_may_round_further_are_not_used_under_privacy():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        notes = Server(
            mlp(), clients(), Recipe(privacy=ClientLevel(rounds=1, noise_multiplier=1.0))
        )
    finally:
        torch.set_float32_matmul_precision(before)
    assert any("set_float32_matmul_precision" in n for n in notes.session.notes)


def test_a_trial_that_differs_by_chance_is_repeated_on_others(monkeypatch):
    offering = sys.modules["fedtorch.fast.trial"]
    tried = []

    def unlucky(solver, model, few, recipe, private):
        tried.append(few[0].tensors[0])
        return 0.1 if len(tried) < 3 else 1e-7

    monkeypatch.setattr(offering, "difference", unlucky)
    who = clients()
    assert isinstance(offer(mlp(), [c.data for c in who], Recipe(lr=0.1)), solve.Fast)
    for few, k in zip(tried, (0, 3, 5), strict=True):
        assert torch.equal(few, who[k].data.tensors[0][:9])
    monkeypatch.setattr(offering, "difference", lambda *_: float("nan"))
    assert "differs" in offer(mlp(), [c.data for c in who], Recipe(lr=0.1))


class OneNumber(nn.Module):
    """One output an example, without an axis for it."""

    def __init__(self, squeeze) -> None:
        super().__init__()
        self.hidden, self.out, self.squeeze = nn.Linear(30, 6), nn.Linear(6, 1), squeeze

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.squeeze(torch.sigmoid(self.out(torch.relu(self.hidden(x)))))


def strict(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that would make a matrix of [B, 1] and [B]."""
    assert output.shape == target.shape
    return torch.nn.functional.binary_cross_entropy(output, target.float(), reduction="none")


SQUEEZES = [
    lambda z: z.squeeze(1), lambda z: z.squeeze(dim=-1), lambda z: torch.squeeze(z, 1),
    lambda z: z.view(-1),
    lambda z: z.reshape(-1), lambda z: z.flatten(), lambda z: torch.flatten(z, 0), lambda z: z[:, 0],
]  # fmt: skip


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_one_number_for_each_example(squeeze):
    ends = []
    for solver in ("general", "fast"):
        torch.manual_seed(0)
        recipe = Recipe(loss=strict, lr=0.1, batch_size=8)
        ends.append(trained(recipe, solver, OneNumber(squeeze), clients(classes=2))[0])
    assert apart(*ends) < 1e-5


@pytest.mark.parametrize("squeeze", [lambda z: z.squeeze(), lambda z: z.squeeze(0), lambda z: z[0]])
def test_what_may_take_the_examples_axis_away_is_not_read(squeeze):
    assert (
        reader.read(OneNumber(squeeze), torch.zeros(2, 30)) == "it does not end in a linear layer"
    )
