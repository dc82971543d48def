"""Each algorithm against its paper's equations, by hand, on two quadratic clients.

Client k holds f_k(w) = a_k/2 (w - b_k)^2, so that its gradient a_k (w - b_k) can be written down. The
numbers below are computed in plain Python from the papers' pseudo-code, not by fedtorch.
"""

import math

import pytest
import torch
from torch import nn

from fedtorch import (
    Client,
    FedAvg,
    FedBN,
    FedPer,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    ServerAdagrad,
    ServerAdam,
    ServerSGD,
    ServerYogi,
    Uniform,
)

A, B, N = (1.0, 3.0), (2.0, -1.0), (3, 1)  # curvature, minimum, number of examples
LR, STEPS, ROUNDS, START = 0.1, 4, 5, 0.5


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w.expand(len(x))


def quadratic(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return target[:, 0] / 2 * (output - target[:, 1]) ** 2


def ours(strategy: FedAvg | FedProx | Scaffold, chunk: int = 1) -> list[float]:
    clients = [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]
    model = Scalar()
    recipe = Recipe(strategy, loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    server = Server(model, clients, recipe, engine=Local(chunk=chunk))
    path = []
    for _ in server.rounds(ROUNDS):
        path.append(float(model.w.detach()))
    return path


def gradient(k: int, w: float) -> float:
    return A[k] * (w - B[k])


def local(k: int, w: float, extra=lambda w: 0.0) -> float:
    for _ in range(STEPS):
        w -= LR * (gradient(k, w) + extra(w))
    return w


def delta(w: float, share=(0.75, 0.25)) -> float:
    return sum(p * (local(k, w) - w) for k, p in enumerate(share))


def check(strategy: FedAvg | FedProx | Scaffold, want: list[float]) -> None:
    for chunk in (1, 2):
        assert ours(strategy, chunk) == pytest.approx(want, abs=1e-12)


def test_fedavg_mcmahan_2017_algorithm_1():
    w, want = START, []
    for _ in range(ROUNDS):
        w = 0.75 * local(0, w) + 0.25 * local(1, w)  # n_k / n
        want.append(w)
    check(FedAvg(), want)


def test_fedavg_uniform_weighting_is_the_plain_mean():
    w, want = START, []
    for _ in range(ROUNDS):
        w = (local(0, w) + local(1, w)) / 2
        want.append(w)
    check(FedAvg(weighting="uniform"), want)


def test_fedprox_li_2020_equation_2():
    mu, w, want = 0.7, START, []
    for _ in range(ROUNDS):
        w = sum(p * local(k, w, lambda v, w=w: mu * (v - w)) for k, p in enumerate((0.75, 0.25)))
        want.append(w)
    check(FedProx(mu=mu), want)


def test_scaffold_karimireddy_2020_algorithm_1_option_2():
    w, c, own, want = START, 0.0, [0.0, 0.0], []
    for _ in range(ROUNDS):
        y = [local(k, w, lambda _, k=k, c=c, own=tuple(own): c - own[k]) for k in range(2)]
        new = [own[k] - c + (w - y[k]) / (STEPS * LR) for k in range(2)]
        w += sum(y[k] - w for k in range(2)) / 2
        c += sum(new[k] - own[k] for k in range(2)) / 2
        own = new
        want.append(w)
    check(Scaffold(), want)


def test_scaffold_with_one_of_two_clients_moves_c_by_its_share():
    """|S|/N = 1/2 in line 17; the client that is away keeps its control variate."""
    clients = [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]
    model = Scalar()
    recipe = Recipe(Scaffold(), loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    server = Server(model, clients, recipe, participation=Uniform(cohort_size=1))
    w, c, own = START, 0.0, [0.0, 0.0]
    for figures in server.rounds(6):
        (k,) = map(int, figures["cohort"])
        y = local(k, w, lambda _, k=k, c=c, own=tuple(own): c - own[k])
        new = own[k] - c + (w - y) / (STEPS * LR)
        c += (new - own[k]) / 2
        own[k], w = new, y
        assert float(model.w.detach()) == pytest.approx(w, abs=1e-12)


class Summed(nn.Module):
    """The body's weight and the head's are added: f_k(u + h)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Parameter(torch.tensor(START, dtype=torch.float64))
        self.head = nn.ParameterDict({"h": nn.Parameter(torch.tensor(0.0, dtype=torch.float64))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body + self.head["h"]).expand(len(x))


@pytest.mark.parametrize("chunk", [1, 2])
def test_fedper_arivazhagan_2019_algorithms_1_and_2(chunk):
    clients = [
        Client(str(k), (torch.zeros(N[k], 1), torch.tensor([[A[k], B[k]]] * N[k]).double()))
        for k in range(2)
    ]
    recipe = Recipe(FedPer(), loss=quadratic, lr=LR, steps=STEPS, batch_size=None)
    server = Server(Summed(), clients, recipe, engine=Local(chunk=chunk))
    u, heads = START, [0.0, 0.0]
    for round, _ in enumerate(server.rounds(ROUNDS)):
        bodies = []
        for k in range(2):
            body, head = u, heads[k]
            for _ in range(STEPS):
                step = LR * gradient(k, body + head)
                body, head = body - step, head - step
            bodies.append(body)
            heads[k] = head
        u = 0.75 * bodies[0] + 0.25 * bodies[1]
        own = [float(server.own()[i]["head.h"]) for i in "01"]
        assert [float(server.model.body.detach()), *own] == pytest.approx([u, *heads], abs=1e-12)
        if round == 0:  # on paper
            assert [u, *heads] == pytest.approx([0.6494, 0.4428, -0.7308], abs=1e-12)
    assert float(server.model.head["h"].detach()) == 0


def test_fedbn_li_2021_algorithm_1():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 3, generator=g) + n, torch.randn(n, 1, generator=g)) for n in (6, 8)]

    def net() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    data = [(x.double(), y.double()) for x, y in data]
    recipe = Recipe(
        FedBN(), loss=lambda o, y: (o - y).square().mean(1), lr=LR, steps=2, batch_size=None
    )
    clients = [Client(str(k), d) for k, d in enumerate(data)]
    server = Server(net(), clients, recipe, engine=Local(chunk=1))
    [*server.rounds(3)]
    nets = [net(), net()]  # Algorithm 1: all layers are averaged but those of BatchNorm
    for _ in range(3):
        for one, (x, y) in zip(nets, data, strict=True):
            optimizer = torch.optim.SGD(one.parameters(), LR)
            for _ in range(2):
                optimizer.zero_grad()
                (one(x) - y).square().mean().backward()
                optimizer.step()
        for layer in (0, 2):
            pairs = zip(*(one[layer].parameters() for one in nets), strict=True)
            for a, b in pairs:
                mean = (6 * a.data + 8 * b.data) / 14
                a.data.copy_(mean), b.data.copy_(mean)
    for k, one in enumerate(nets):
        found = server.model_of(str(k)).state_dict()
        for name, v in one.state_dict().items():
            if v.is_floating_point():
                assert torch.allclose(found[name], v, atol=1e-12), name


def test_fedavgm_hsu_2019():
    w, v, want = START, 0.0, []
    for _ in range(ROUNDS):
        v = 0.9 * v + delta(w)
        w += v
        want.append(w)
    check(FedAvg(server=ServerSGD(momentum=0.9)), want)


LR_S, BETA1, BETA2, TAU = 0.2, 0.9, 0.99, 1e-3


def adaptive(second_moment, beta1: float = BETA1) -> list[float]:
    """Reddi et al. 2021, algorithm 2; no bias correction."""
    w, m, v, want = START, 0.0, TAU**2, []
    for _ in range(ROUNDS):
        d = delta(w)
        m = beta1 * m + (1 - beta1) * d
        v = second_moment(v, d * d)
        w += LR_S * m / (math.sqrt(v) + TAU)
        want.append(w)
    return want


def test_fedadagrad_reddi_2021():
    check(FedAvg(server=ServerAdagrad(lr=LR_S)), adaptive(lambda v, s: v + s, beta1=0.0))


def test_fedadam_reddi_2021():
    check(FedAvg(server=ServerAdam(lr=LR_S)), adaptive(lambda v, s: BETA2 * v + (1 - BETA2) * s))


def test_fedyogi_reddi_2021():
    check(
        FedAvg(server=ServerYogi(lr=LR_S)),
        adaptive(lambda v, s: v - (1 - BETA2) * s * math.copysign(1, v - s)),
    )
