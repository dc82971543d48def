"""FedNova, FedDyn, FedExP, SCAFFOLD and LAMB on the two quadratic clients of test_papers.

Numbers were computed in plain Python from the papers' equations, never by fedtorch.
"""

import pytest
import torch

from conftest import make_clients, mlp, weights
from fedtorch import (
    Client,
    ConfigError,
    FedAvg,
    Local,
    Median,
    Recipe,
    Scaffold,
    Server,
    TopK,
    Uniform,
)
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.strategies import (
    MOON,
    ClientMomentum,
    FedBABU,
    FedDyn,
    FedExP,
    FedNova,
    FedPer,
    QFedAvg,
)
from fedtorch.strategies.moon import contrast
from fedtorch.training.local_steps import reach, stepper
from fedtorch.training.optimizer import ClientOptimizer, ServerLAMB, ServerSGD
from test_papers import A, B, N, Scalar, quadratic

WHOLE = {"steps": 4, "batch_size": None}
SINGLE = {"epochs": 2, "batch_size": 1}  # 6 and 2 steps
HEAVY = {"optimizer": ClientOptimizer("SGD", {"momentum": 0.9})}

KNOWN = {
    "nova": (FedNova(), SINGLE, [0.461149, 0.446059]),
    "nova momentum": (FedNova(), SINGLE | HEAVY, [0.195867, 0.406657]),
    "nova mu": (FedNova(mu=0.5), SINGLE, [0.468672, 0.454428]),
    "nova both": (FedNova(mu=0.5), SINGLE | HEAVY, [0.227941, 0.344108]),
    "avg, same steps": (FedAvg(), SINGLE, [0.835879, 1.010899]),
    "dyn": (FedDyn(alpha=0.5), WHOLE, [-0.0782125, -0.306342, -0.302410]),
    "exp uniform": (FedExP(weighting="uniform"), WHOLE, [-0.741540, -0.124680]),
    "exp": (FedExP(), WHOLE, [2.846557, 1.689085]),
    "scaffold": (Scaffold(), WHOLE, [0.188000, -0.045561, -0.166637]),
    "scaffold 1": (Scaffold(option=1), WHOLE, [0.188000, -0.087707, -0.197118]),
    "q 1": (QFedAvg(q=1.0), WHOLE, [0.337912, 0.228105]),
    "q 0": (QFedAvg(q=0.0), WHOLE, [0.188000, 0.048193]),
    "q 1, one step: q-FedSGD": (QFedAvg(), {"steps": 1, "batch_size": None}, [0.3, 0.171675]),
    "lamb": (FedAvg(server=ServerLAMB(lr=0.1)), WHOLE, [0.55, 0.605]),
}


def clients() -> list[Client]:
    return [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]


def path(strategy: object, rounds: int, engine: Local, **options: object) -> list[float]:
    model = Scalar()
    recipe = Recipe(strategy, loss=quadratic, lr=0.1, **options)
    server = Server(model, clients(), recipe, engine=engine)
    return [float(model.w.detach()) for _ in server.rounds(rounds)]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "engine", [{"chunk": 1}, {"chunk": 2}, {"chunk": 2, "solver": "general"}], ids=str
)
def test_each_algorithm_is_its_papers(name, engine):
    strategy, options, want = KNOWN[name]
    assert path(strategy, len(want), Local(**engine), **options) == pytest.approx(want, abs=6e-7)


def test_the_limits_are_those_of_the_papers():
    engine = Local(chunk=2)
    assert path(FedNova(), 120, engine, **SINGLE)[-1] == pytest.approx(0.436476, abs=1e-6)
    assert path(FedAvg(), 120, engine, **SINGLE)[-1] == pytest.approx(1.201327, abs=1e-6)
    assert path(FedDyn(alpha=0.5), 120, engine, **WHOLE)[-1] == pytest.approx(-0.25, abs=1e-6)
    fair = path(QFedAvg(), 120, engine, **WHOLE)[-1]
    assert fair == pytest.approx(0.042203, abs=1e-6)
    losses = [a / 2 * (fair - b) ** 2 for a, b in zip(A, B, strict=True)]
    assert losses == pytest.approx([1.916484, 1.629281], abs=1e-5)


@pytest.mark.parametrize(
    "args, mu, want",
    [
        ({}, 0.0, [6.0, 2.0]),
        ({"momentum": 0.9}, 0.0, [17.829690, 2.9]),
        ({}, 0.5, [5.298162, 1.95]),
        ({"momentum": 0.9}, 0.5, [15.028518, 2.85]),
    ],
)
def test_how_far_steps_go(args, mu, want):
    recipe = Recipe(optimizer=ClientOptimizer("SGD", args))
    assert reach(recipe, 0.1, torch.tensor([6, 2]), mu).tolist() == pytest.approx(want, abs=6e-7)


@pytest.mark.parametrize(
    "args",
    [
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
        {"momentum": 0.8, "nesterov": True},
        {"weight_decay": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("more", [{}, {"lr_warmup": 3, "lr_decay": "cosine"}], ids=str)
def test_how_far_steps_go_is_how_far_the_same_optimizer_goes(args, more):
    recipe, pull, lr = Recipe(optimizer=ClientOptimizer("SGD", args), **more), 0.4, 0.2
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    step = stepper(recipe, torch.nn.Module(), {"w": w}, lr, 7)
    for _ in range(7):
        w.grad = 1 + pull * w.detach()
        step()
    found = reach(recipe, lr, torch.tensor([7]), pull)
    assert -float(w.detach()) / lr == pytest.approx(float(found), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 2])
def test_client_momentum_outlives_a_visit(chunk):
    """By hand; client k ends 4 steps at b_k + (w - b_k) (1 - 0.1 a_k)^4."""
    found = path(ClientMomentum(beta=0.5), 3, Local(chunk=chunk), **WHOLE)
    w, m, want = 0.5, [0.0, 0.0], []
    for _ in range(3):
        for k in range(2):
            change = (B[k] - w) * (1 - (1 - 0.1 * A[k]) ** 4)
            m[k] = 0.5 * m[k] + 0.5 * change
        w += 0.75 * m[0] + 0.25 * m[1]
        want.append(w)
    assert found == pytest.approx(want, abs=1e-12)


SIZES = [37, 5, 18, 64, 1, 23]


@pytest.mark.parametrize(
    "strategy",
    [
        FedNova(mu=0.1),
        FedExP(),
        FedDyn(),
        ClientMomentum(),
        QFedAvg(q=2.0),
        Scaffold(option=1),
        MOON(tap="0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, HEAVY], ids=["sgd", "momentum"])
def test_every_solver_comes_to_the_same(strategy, options):
    found = []
    engines = [Local(chunk=1, solver="general"), Local(chunk=6, solver="general")]
    if not strategy.contrasts:  # which trains client after client
        engines += [Local(chunk=4, solver="stacked"), Local(solver="fast")]
    if not options and isinstance(strategy, (FedDyn, MOON)):  # memory travels there and back
        engines.append(Processes(workers=2, chunk=2))
    for engine in engines:
        recipe = Recipe(strategy, lr=0.05, epochs=2, batch_size=8, **options)
        cohort = Uniform(cohort_size=4)
        server = Server(
            mlp(), make_clients(SIZES), recipe, participation=cohort, engine=engine, seed=3
        )
        rows = isinstance(strategy, (ClientMomentum, Scaffold, MOON))
        assert recipe.needs_rows is rows, "sums stay sums"
        [*server.rounds(3)]
        found.append(weights(server.model))
        server.close()
    for other in found[1:]:
        assert all(torch.allclose(v, found[0][k], atol=1e-6) for k, v in other.items())


def test_buffers_are_weighed_by_examples_and_not_by_steps():
    def ends(strategy: object, chunk: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4))
        recipe = Recipe(strategy, epochs=1, batch_size=6, lr=1e-9)
        server = Server(
            model, make_clients([12, 6]), recipe, engine=Local(chunk=chunk, solver="general")
        )
        server.round()
        return model[0].running_mean.clone()

    for chunk in (1, 2):
        assert torch.allclose(ends(FedNova(), chunk), ends(FedAvg(), chunk), atol=1e-7)


def test_numbers_are_sent_and_counted_as_traffic():
    servers = [Server(mlp(), make_clients(SIZES), Recipe(s)) for s in (FedAvg(), FedNova())]
    plain, nova = (server.round()["bytes_up"] for server in servers)
    assert nova == plain + 8 * len(SIZES)


@pytest.mark.parametrize(
    "strategy",
    [
        FedDyn(),
        Scaffold(),
        Scaffold(option=1),
        FedNova(),
        QFedAvg(),
        MOON(tap="0"),
        ClientMomentum(),
    ],
    ids=str,
)
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(strategy):
    def server() -> Server:
        cohort = Uniform(cohort_size=3)
        return Server(mlp(), make_clients(SIZES), Recipe(strategy), participation=cohort, seed=2)

    whole, first, second = server(), server(), server()
    [*whole.rounds(4)]
    [*first.rounds(2)]
    second.load_state_dict(first.state_dict())
    [*second.rounds(2)]
    own = weights(second.model)
    assert all(torch.equal(v, own[k]) for k, v in weights(whole.model).items())


def test_what_the_server_holds_is_not_broadcast():
    server = Server(mlp(), make_clients(SIZES), Recipe(FedDyn()))
    figures, plain = server.round(), Server(mlp(), make_clients(SIZES), Recipe()).round()
    assert figures["bytes_down"] == plain["bytes_down"]
    assert server.state.hidden["h"]["0.weight"].abs().sum() > 0 and not server.extras


@pytest.mark.parametrize(
    "strategy, group",
    [(Scaffold(), "c"), (Scaffold(option=1), "c"), (FedDyn(), "g"), (ClientMomentum(), "m")],
)
def test_clients_remember_what_was_really_sent(strategy, group):
    """Clipped far below what they learned, their memory moves no further than what the server has."""
    clip = 1e-3
    plan = ClientLevel(clip=clip, noise_multiplier=1e-6, rounds=1, rate=1.0, insecure_seed=1)
    server = Server(mlp(), make_clients(SIZES), Recipe(strategy, privacy=plan))
    server.round()
    for memory in server.session.memory().values():
        length = float(torch.cat([v.flatten() for v in memory[group].values()]).norm())
        assert 0 < length <= clip * (1 + 1e-5)
    if group == "c":  # the invariant: c is the mean of all c_k
        mean = sum(m["c"]["0.weight"] for m in server.session.memory().values()) / len(SIZES)
        assert torch.allclose(server.extras["c"]["0.weight"], mean, atol=1e-6)


@pytest.mark.parametrize(
    "make, why",
    [
        (
            lambda: Recipe(FedNova(), optimizer="Adam"),
            "fednova holds for clients that train with SGD",
        ),
        (
            lambda: Recipe(FedNova(), scheduler=torch.optim.lr_scheduler.LinearLR),
            "scheduler says it to nobody",
        ),
        (lambda: Recipe(FedNova(), aggregator=Median()), "fednova needs the mean of the numbers"),
        (
            lambda: Recipe(FedExP(), privacy=SampleLevel(noise_multiplier=1.0, rounds=1)),
            "fedexp sends numbers that no noise is made for",
        ),
        (lambda: Recipe(FedExP(), channel=(TopK(),)), "fedexp compares the lengths"),
        (lambda: Recipe(FedDyn(), aggregator=Median()), "feddyn needs the mean"),
        (lambda: Recipe(FedExP(server=ServerSGD())), "fedexp sets the server's rate itself"),
        (lambda: Recipe(FedDyn(alpha=0.0)), "strategy.alpha must be a positive number"),
        (lambda: Recipe(Scaffold(option=3)), "strategy.option"),
        (
            lambda: Recipe(MOON()),
            "strategy.tap '' is no layer of model Sequential: it has 0, 1, 2; .* such as 1$",
        ),
        (lambda: Recipe(QFedAvg(server=ServerSGD())), "qfedavg sets the server's rate itself"),
        (lambda: Recipe(QFedAvg(), channel=(TopK(),)), "qfedavg sets its rate by the lengths"),
        (
            lambda: Recipe(Scaffold(option=1), privacy=SampleLevel(noise_multiplier=1.0, rounds=1)),
            "scaffold sends what it makes of losses or gradients that it asks",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(make, why):
    with pytest.raises(ConfigError, match=why):
        Server(mlp(), make_clients([9, 7]), make())


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (MOON(tap="head"), "model Linear has no layer before another: use strategy fedavg"),
        (FedBABU(), r"has weight, bias; a model of one layer has no body: use fedavg"),
        (FedPer(), r"it has weight, bias; name in strategy\.personal .* 'weight'"),
    ],
)
def test_a_model_of_one_layer_is_told_what_it_has_not(strategy, why):
    with pytest.raises(ConfigError, match=why):
        Server(torch.nn.Linear(6, 3), make_clients([9, 7]), Recipe(strategy))


@pytest.mark.parametrize(
    "tap, why", [("0", "no trained weight comes before"), ("3", "does not run")]
)
def test_moon_is_refused_where_its_contrast_would_move_nothing(tap, why):
    class Flat(torch.nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    model = Flat(torch.nn.Flatten(), *[torch.nn.Linear(6, 6) for _ in range(3)])
    with pytest.raises(ConfigError, match=why):
        Server(model, make_clients([9, 7]), Recipe(MOON(tap=tap)))


def test_an_objective_is_tried_before_the_first_round():
    class Wild(FedAvg):
        def objective(self, step, ctx):
            return lambda model, batch: step(model, batch) @ torch.ones(99)

    with pytest.raises(ConfigError, match="objective of strategy wild fails for model Sequential"):
        Server(mlp(), make_clients([9, 7]), Recipe(Wild()))


def test_a_channel_takes_scaled_changes_and_leaves_numbers_alone():
    recipe = Recipe(FedNova(), channel=(TopK(share=0.5),))
    server = Server(mlp(), make_clients(SIZES), recipe)
    before = weights(server.model)
    [*server.rounds(2)]
    assert not torch.equal(before["0.weight"], server.model[0].weight)


def test_the_contrast_is_moons():
    """By hand: cosines 0.6 and 0 over a temperature of 0.5."""
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    near, far = torch.tensor([[0.6, 0.8]]).double(), torch.tensor([[0.0, 1.0]]).double()
    loss = contrast(z, near, far, 0.5)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.263282, abs=1e-6)
    assert z.grad.flatten().tolist() == pytest.approx([0, 0.092590], abs=1e-6)
    same = contrast(z, near, near, 0.5)
    assert float(same.detach()) == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2])
def test_moon_li_2021(chunk):
    """Three rounds by hand: each step adds the contrast to the sent and to the client's own last model."""
    data, model = make_clients([6, 8]), mlp()
    recipe = Recipe(MOON(tap="0", mu=2.0, weighting="uniform"), lr=0.1, steps=2, batch_size=None)
    server = Server(model, data, recipe, engine=Local(chunk=chunk))
    by_hand, last = mlp(), [None, None]
    for _ in range(3):
        server.round()
        sent, ends = {k: v.clone() for k, v in by_hand.state_dict().items()}, []
        for k, client in enumerate(make_clients([6, 8])):
            own, before, far = mlp(), mlp(), mlp()
            own.load_state_dict(sent), before.load_state_dict(sent)
            far.load_state_dict(last[k] or sent)
            x, y = client.data.tensors
            optimizer = torch.optim.SGD(own.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                away = contrast(own[0](x), before[0](x).detach(), far[0](x).detach(), 0.5)
                loss = torch.nn.functional.cross_entropy(own(x), y) + 2 * away.mean()
                loss.backward()
                optimizer.step()
            ends.append({n: v.clone() for n, v in own.state_dict().items()})
        last = ends
        by_hand.load_state_dict({n: (ends[0][n] + ends[1][n]) / 2 for n in sent})
    assert all(
        torch.allclose(v, by_hand.state_dict()[k], atol=1e-6) for k, v in weights(model).items()
    )
    plain = Server(
        mlp(), data, Recipe(FedAvg(weighting="uniform"), lr=0.1, steps=2, batch_size=None)
    )
    [*plain.rounds(3)]
    assert not torch.allclose(plain.model[0].weight, model[0].weight, atol=1e-4)
