"""Adapters averaged rightly: what the global W + s B A is after a round, against the clients' own."""

import pytest
import torch
from torch import nn

from fedtorch import Client, ConfigError, FedAvg, Recipe, Server, ServerAdam
from fedtorch.aggregation.robust import Median
from fedtorch.channel.topk import TopK
from fedtorch.engines import Local, Processes
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.strategies import FedExLoRA, FFALoRA, RoLoRA
from fedtorch.strategies.lora import Adapter


class Low(nn.Module):
    """A linear layer with an adapter, in the names that peft gives it."""

    def __init__(self, inputs, outputs, rank=2, transposed=False):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        if transposed:
            self.base_layer.weight = nn.Parameter(self.base_layer.weight.T.clone(), False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})
        self.scaling, self.fan_in_fan_out = {"default": 3.0}, transposed

    def get_base_layer(self):
        return self.base_layer

    def whole(self):
        with torch.no_grad():
            low = self.lora_B.default.weight.double() @ self.lora_A.default.weight.double()
            base = self.base_layer.weight.double()
            return (base.T if self.fan_in_fan_out else base) + 3 * low

    def forward(self, x):
        base = self.base_layer.weight
        low = self.lora_B.default(self.lora_A.default(x))
        return x @ (base if self.fan_in_fan_out else base.T) + 3 * low


def model(transposed=False):
    torch.manual_seed(0)
    return nn.Sequential(Low(4, 4, transposed=transposed), nn.Tanh(), nn.Linear(4, 2))


def clients(which=range(3)):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=draw)
    y = (x[:, 0] > 0).long()
    return [Client(f"c{k}", (x[k * 20 :][:20] + k, y[k * 20 :][:20])) for k in which]


def run(strategy, rounds=1, transposed=False, **recipe):
    server = Server(model(transposed), clients(), Recipe(strategy, lr=0.3, **recipe))
    return server, [server.round() for _ in range(rounds)]


def clients_own(strategy, transposed):
    """Mean over the clients of the W + s B A that each learns alone."""
    own = []
    for k in range(3):
        server = Server(model(transposed), clients([k]), Recipe(strategy, lr=0.3))
        server.round()
        own.append(server.model[0].whole())
    return torch.stack(own).mean(0)


def test_by_hand_the_mean_of_products_is_not_the_product_of_means():
    x = Adapter("q", "q.base_layer.weight", "a", "b", 1.0, False)
    strategy = FedExLoRA(adapters=(x,))
    sent = {
        "a": torch.tensor([2.0, -1.0]).view(2, 1, 1),
        "b": torch.tensor([1.0, 3.0]).view(2, 1, 1),
    }
    arrived = strategy.arrived({"delta": sent})
    mean = {g: {k: v.mean(0) for k, v in s.items()} for g, s in arrived.items()}
    assert mean["products"]["q"].item() == -0.5
    delta, _ = strategy.step(mean, {}, 1.0)
    assert (delta["b"] * delta["a"]).item() == 1.0
    assert delta["q.base_layer.weight"].item() == -1.5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "strategy", [FFALoRA(), RoLoRA(), FedExLoRA()], ids=lambda s: type(s).__name__
)
def test_the_global_layer_is_the_mean_of_the_clients_layers(strategy, transposed):
    server, _ = run(strategy, transposed=transposed)
    want = clients_own(strategy, transposed)
    assert torch.allclose(server.model[0].whole(), want, atol=1e-6)


def test_plain_averaging_misses_it_and_says_so():
    server, _ = run(FedAvg())
    assert (server.model[0].whole() - clients_own(FedAvg(), False)).abs().max() > 1e-3
    assert any("mean(B) mean(A) is not mean(BA)" in n for n in server.notes)
    for quiet in (FFALoRA(), RoLoRA(), FedExLoRA(), FedAvg(personal=("*lora_B*",))):
        assert not any("is not mean(BA)" in n for n in run(quiet, 0)[0].notes)


def test_only_b_moves_and_only_b_travels():
    server, rounds = run(FFALoRA(), 2)
    assert not server.model[0].lora_A.default.weight.requires_grad
    sent = 4 * (4 * 2 + 4 * 2 + 2)  # B, and the last layer's weight and bias, of four bytes each
    assert [f["bytes_up"] for f in rounds] == [3 * sent] * 2
    assert [f["bytes_down"] for f in rounds] == [3 * sent] * 2


PLANS = [
    None,
    SampleLevel(noise_multiplier=1.0, sample_rate=0.5, steps=2, batch_size=10, rounds=3),
    ClientLevel(noise_multiplier=0.5, rounds=3),
    LocalDP(noise_multiplier=0.5, rounds=3),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: type(p).__name__)
def test_b_and_a_take_turns_and_noise_moves_none_that_rests(plan):
    server = Server(model(), clients(), Recipe(RoLoRA(), lr=0.3, privacy=plan))
    for turn in ("B", "A", "B"):
        before = {k: v.clone() for k, v in server.model.state_dict().items()}
        server.round()
        now = server.model.state_dict()
        moved = {k for k in now if not torch.equal(now[k], before[k])}
        assert moved == {f"0.lora_{turn}.default.weight", "2.weight", "2.bias"}


def test_half_of_it_goes_up_and_the_clip_is_of_that_half():
    _, rounds = run(RoLoRA(), 2)
    assert [f["bytes_up"] for f in rounds] == [3 * 4 * (8 + 10)] * 2
    assert rounds[0]["bytes_down"] == 3 * 4 * (8 + 8 + 10 + 1)


def test_workers_and_one_at_a_time_give_the_same():
    for strategy, more in ((RoLoRA(), [Processes(workers=1)]), (FedExLoRA(), [])):
        found = []
        for engine in (Local(solver="stacked"), Local(solver="general"), *more):
            server = Server(model(), clients(), Recipe(strategy, lr=0.3), engine=engine)
            for _ in range(2):
                server.round()
            server.close()
            found.append(server.model[0].whole())
        assert all(torch.allclose(found[0], f, atol=1e-6) for f in found[1:])


def test_a_run_goes_on_with_whose_turn_it_is_and_what_was_folded():
    for strategy in (RoLoRA(), FedExLoRA()):
        whole, _ = run(strategy, 3)
        first, _ = run(strategy, 2)
        second, _ = run(strategy, 0)
        second.load_state_dict(first.state_dict())
        second.round()
        for k, v in whole.model.state_dict().items():
            assert torch.equal(v, second.model.state_dict()[k]), k


def test_what_folding_costs_is_said_and_counted():
    server, rounds = run(FedExLoRA(), 2)
    assert any("16 numbers travel down" in n for n in server.notes)
    down = [f["bytes_down"] for f in rounds]
    assert down[1] - down[0] == 3 * 4 * 16
    assert rounds[0]["bytes_up"] == rounds[1]["bytes_up"] == down[0]


@pytest.mark.parametrize(
    ("strategy", "recipe", "why"),
    [
        (FedExLoRA(), {"privacy": PLANS[2]}, "each client's own update"),
        (FedExLoRA(), {"aggregator": Median()}, "mean and no channel"),
        (FedExLoRA(), {"channel": (TopK(share=0.5),)}, "mean and no channel"),
        (RoLoRA(), {"channel": (TopK(share=0.5),)}, "from round to round"),
    ],
)
def test_what_does_not_go_together_is_refused(strategy, recipe, why):
    with pytest.raises(ConfigError, match=why):
        run(strategy, 0, **recipe)


@pytest.mark.parametrize("kind", [FFALoRA, RoLoRA, FedExLoRA])
def test_a_model_without_adapters_is_refused(kind):
    with pytest.raises(ConfigError, match="trains none"):
        Server(nn.Linear(4, 2), clients(), Recipe(kind()))


def test_a_frozen_half_and_a_server_optimizer_are_refused():
    for kind in (RoLoRA, FedExLoRA):
        half = model()
        half[0].lora_A.default.weight.requires_grad_(False)
        with pytest.raises(ConfigError, match="FFALoRA, which needs nothing more"):
            Server(half, clients(), Recipe(kind()))
        with pytest.raises(ConfigError, match=r"leave strategy\.server out, or use ffalora"):
            kind(server=ServerAdam())
