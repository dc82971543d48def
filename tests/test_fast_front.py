"""Models with more than linear layers: a front of known layers, then the dense part."""

import copy
import pickle
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, ClientOptimizer, FedAvg, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.fast import Fast, chunk_data, front, offer, reader
from fedtorch.privacy import ClientLevel
from fedtorch.training import evaluate
from fedtorch.training.module import channels_last

SIZES = [21, 5, 13, 1]

CPU = torch.device("cpu")


def images(sizes: list[int] = SIZES, channels: int = 1) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}",
            (torch.randn(n, channels, 8, 8, generator=g), torch.randint(0, 4, (n,), generator=g)),
        )
        for k, n in enumerate(sizes)
    ]


class Written(nn.Module):
    """As people write it: functions, a view, a residual sum, layers in no particular order."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(30, 4)
        self.first, self.second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.hidden = nn.GroupNorm(2, 6), nn.Linear(6 * 4 * 4, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = x + torch.relu(self.norm(self.second(x)))
        return self.out(F.relu(self.hidden(x.view(x.size(0), -1))))


def paper() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 7, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(7 * 2 * 2, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip


def averaged() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


MODELS = {"paper": paper, "written": Written, "averaged": averaged}


def trained(make, recipe: Recipe, solver: str, who: list[Client], chunk: int | None = None):
    torch.manual_seed(1)
    model = make()
    start = copy.deepcopy(model.state_dict())
    server = Server(model, who, recipe, engine=Local(solver=solver, chunk=chunk), seed=3)
    figures = list(server.rounds(2))
    return {k: v - start[k] for k, v in model.state_dict().items()}, figures


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in a)


@pytest.mark.parametrize("args", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.5), Scaffold()], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_same_weights_as_the_general_path(name, strategy, args):
    recipe = Recipe(
        strategy, optimizer=ClientOptimizer("SGD", args), lr=0.05, epochs=2, batch_size=4
    )
    slow, before = trained(MODELS[name], recipe, "general", images())
    for chunk in (3, 4):
        fast, after = trained(MODELS[name], recipe, "fast", images(), chunk)
        assert apart(fast, slow) < 5e-4  # of the way; of the weights it is less than 1e-5
        for a, b in zip(after, before, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
            assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-4)


def test_tokens_through_an_embedding():
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 3)
        )

    g = torch.Generator().manual_seed(0)
    who = [
        Client(
            f"c{k}",
            (torch.randint(0, 11, (n, 5), generator=g), torch.randint(0, 3, (n,), generator=g)),
        )
        for k, n in enumerate(SIZES)
    ]
    recipe = Recipe(lr=0.1, batch_size=4)
    slow, fast = (trained(model, recipe, s, who)[0] for s in ("general", "fast"))
    assert apart(fast, slow) < 5e-4


def test_each_client_clipped_over_front_and_dense_part_together():
    plan = ClientLevel(rounds=2, noise_multiplier=1e-6, clip=0.05, insecure_seed=5)
    recipe = Recipe(lr=0.2, batch_size=4, privacy=plan)
    slow, fast = (trained(Written, recipe, s, images())[0] for s in ("general", "fast"))
    assert apart(fast, slow) < 1e-3


def test_a_client_that_diverges_fails_alone():
    who = images()
    who[2].data.tensors[0][3] = float("nan")
    server = Server(paper(), who, Recipe(lr=0.1, batch_size=4), engine=Local(solver="fast"))
    assert server.round()["failed"] == {"c2": "nonfinite"}


REFUSED = {
    "layer 0 (AlphaDropout) has no fast form": nn.Sequential(
        nn.AlphaDropout(), nn.Flatten(), nn.Linear(64, 4)
    ),
    "layer 0 (BatchNorm2d)": nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4)),
    "it does not end in a linear layer": nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()),
    "for an example, not one row": nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)),
    "examples are changed before the first layer": nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_and_why(why):
    got = reader.read(REFUSED[why], images()[0].data.tensors[0][:1])
    assert isinstance(got, str) and why in got


def test_pooling_before_the_activation_is_the_same_function():
    torch.manual_seed(0)
    model, x = paper(), torch.randn(3, 1, 8, 8)
    spec = reader.read(model, x[:1]).front
    module = front.build(model, spec)
    order = [
        type(module.get_submodule(n.target)) for n in module.graph.nodes if n.op == "call_module"
    ]
    assert order[:3] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU]
    assert torch.equal(module(x), model[:7](x))


def test_one_channel_images_are_channels_last_for_certain():
    x = torch.randn(2, 1, 5, 7)
    some = channels_last(x)[torch.tensor([1, 0])]
    assert torch.equal(some, x.flip(0)) and some.stride() == (35, 1, 7, 1)
    w = torch.randn(4, 3, 2, 2)
    kept = front.shaped(front.stored(w).contiguous()[None])[0]
    assert torch.equal(kept, w) and kept.stride() == (12, 1, 6, 3)


def test_a_solver_travels_without_data_or_weights():
    who = images()
    solver = offer(paper(), [c.data for c in who], Recipe())
    solver.module = front.build(paper(), solver.chain.front)
    for _ in range(2):  # what comes once is not kept
        solver.kept.rows([c.data for c in who], CPU)
    assert solver.kept.chunks
    arrived = pickle.loads(pickle.dumps(solver))
    assert arrived.module is None and not arrived.kept.chunks and not arrived.kept.grams
    assert len(pickle.dumps(solver)) < 2000


def test_what_is_kept_is_made_anew_when_data_changes():
    kept = chunk_data.Kept()
    data = images()[0].data
    kept.rows([data], CPU)  # what comes once is not kept
    before = kept.rows([data], CPU), kept.gram(data, True, CPU)
    assert kept.rows([data], CPU) is before[0] and kept.gram(data, True, CPU) is before[1]
    data.tensors[0].mul_(2)
    assert torch.equal(kept.rows([data], CPU).x, data.tensors[0])
    flat = data.tensors[0].flatten(1)
    assert torch.allclose(kept.gram(data, True, CPU), flat @ flat.T + 1)


def test_what_is_kept_has_a_bound(monkeypatch):
    monkeypatch.setattr(chunk_data, "CHUNKS_KEPT", 10_000)
    kept = chunk_data.Kept()
    for client in images([20] * 30):
        kept.gram(client.data, True, CPU)
    assert kept.used <= 10_000 and 1 <= len(kept.grams) <= 6


def test_a_small_model_with_a_front_is_stacked_where_many_clients_are():
    torch.manual_seed(0)
    many, few = (Server(averaged(), images([8] * n), Recipe(lr=0.1)).session.choice for n in (9, 3))
    assert isinstance(few.solver, Fast) and not isinstance(many.solver, Fast)
    assert any("faster with clients stacked" in n for n in many.notes)


class Varied(nn.Module):
    """Layers and calls that are less usual."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ConvTranspose2d(6, 3, 2, 2)
        self.act, self.norm, self.pad = nn.PReLU(6), nn.InstanceNorm2d(3), nn.ReflectionPad2d(1)
        self.wide, self.out = nn.Upsample(scale_factor=2), nn.Linear(3 * 25, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(self.act(self.down((x - 0.1) / 0.3))))
        a, b = self.pad(x).chunk(2, dim=2)
        x = F.relu6(F.interpolate(torch.stack([a, -b]).sum(0).clamp(-2, 2), size=(10, 10)))
        return self.out(F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0)).flatten(1))


@pytest.mark.parametrize(("width", "general"), [(4, True), (400, False)], ids=["deep", "wide"])
def test_a_front_with_group_norm_is_left_to_torch_where_the_dense_part_is_small(width, general):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.GroupNorm(4, 64), nn.ReLU(), nn.Conv2d(64, 512, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 4)
    )  # fmt: skip
    if not general:
        model[3] = nn.Conv2d(64, 512, 1)
    server = Server(model, images(), Recipe(lr=0.1))
    said = any("GroupNorm in so deep a front" in n for n in server.notes)
    assert said == general
    x = torch.randn(2, 1, 8, 8)
    assert not evaluate.convolves(model, x)
    model[1] = nn.Identity()
    assert evaluate.convolves(model, x)


def test_less_usual_layers_and_calls():
    recipe = Recipe(lr=0.05, epochs=2, batch_size=4)
    slow, fast = (trained(Varied, recipe, s, images())[0] for s in ("general", "fast"))
    assert apart(fast, slow) < 5e-4


def test_embeddings_that_change_their_own_rows_are_not_read():
    # forward would scale rows of a copy; at first none may be long enough for the trial to see it
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=100.0), nn.Flatten(), nn.Linear(12, 4))
    data = TensorDataset(torch.zeros(6, 4, dtype=torch.long), torch.zeros(6, dtype=torch.long))
    assert "layer 0 (Embedding) has no fast form" in str(offer(model, [data], Recipe()))


def test_tracing_leaves_the_modules_of_other_threads_alone():
    other, given = nn.Linear(2, 2), []

    class Slow(nn.Module):
        def forward(self, x):
            thread = Thread(target=lambda: given.append(other(torch.ones(1, 2))))
            thread.start()
            thread.join()
            return x

    front.traced(Slow())
    assert [tuple(out.shape) for out in given] == [(1, 2)]
