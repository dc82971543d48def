import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset

from conftest import make_clients, mlp
from fedtorch import Client, Recipe, Server
from fedtorch.engines import Local
from fedtorch.privacy import SampleLevel
from fedtorch.types import ConfigError


class Experts(nn.Module):
    """Each example goes to one of three experts alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero().flatten()
            if len(mine):
                out = out.index_add(0, mine, share[mine, None] * expert(x[mine]))
        return out


def sample() -> SampleLevel:
    return SampleLevel(
        noise_multiplier=1e-9, rounds=1, steps=1, sample_rate=1.0, batch_size=8, clip=0.1
    )


def test_a_mixture_of_experts_trains_privately_example_by_example():
    torch.manual_seed(0)
    model, (client,) = Experts(), make_clients([8])
    start = copy.deepcopy(model)
    server = Server(model, [client], Recipe(privacy=sample(), lr=1.0))
    assert any("example after example" in note for note in server.notes)
    server.round()
    x, y = client.data.tensors
    total = [torch.zeros_like(p) for p in start.parameters()]
    for k in range(8):
        start.zero_grad()
        F.cross_entropy(start(x[k : k + 1]), y[k : k + 1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in start.parameters()]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        total = [t + g * min(1.0, 0.1 / float(norm)) for t, g in zip(total, grads, strict=True)]
    for old, new, t in zip(start.parameters(), model.parameters(), total, strict=True):
        torch.testing.assert_close(new, old - t / 8, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_labels_of_several_parts_train_privately(kind):
    x, a, b = torch.randn(8, 6), torch.randint(0, 4, (8,)), torch.rand(8)
    y = StackDataset(a=a, b=b) if kind is dict else StackDataset(a, b)

    def loss(output, target):
        first, second = target.values() if isinstance(target, dict) else target
        return F.cross_entropy(output, first, reduction="none") + (output[:, 0] - second) ** 2

    server = Server(mlp(), [Client("a", StackDataset(x, y))], Recipe(loss=loss, privacy=sample()))
    assert len(server.round()["cohort"]) == 1


class Pair(nn.Linear):
    """Gives two things."""

    def forward(self, x):
        return super().forward(x), x


class First(nn.Module):
    """Takes the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair(6, 4)

    def forward(self, x):
        return self.inner(x)[0]


def trained(model: nn.Module, mode: str) -> Server:
    plan = replace(sample(), mode=mode)
    return Server(model, make_clients([8]), Recipe(privacy=plan, lr=1.0))


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_a_layer_that_gives_two_things_is_named_where_opacus_cannot_take_it(mode):
    with pytest.raises(ConfigError, match=r"layer inner \(Pair\) gives a tuple, .* another mode$"):
        trained(First(), mode)


@pytest.mark.parametrize("mode", ["layers", "stacked", "alone"])
def test_it_trains_in_the_other_modes(mode):
    assert len(trained(First(), mode).round()["cohort"]) == 1


def test_a_compiled_model_trains_by_layers_and_is_named_to_be_so_where_opacus_hears_nothing():
    model = torch.compile(nn.Sequential(nn.Linear(6, 4)), backend="eager")
    with pytest.raises(
        ConfigError, match=r"it is compiled, .* before torch.compile; try another mode$"
    ):
        trained(model, "hooks")
    assert len(trained(model, "layers").round()["cohort"]) == 1


@pytest.mark.parametrize("mode", ["layers", "hooks", "ghost"])
def test_a_hook_of_ones_own_may_change_what_a_layer_gives(mode):
    torch.manual_seed(0)
    model, (client,) = mlp(), make_clients([8])
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda m, args, out: 3 * out.sin())
    ends = []
    for way in (mode, "alone"):
        net = copy.deepcopy(model)
        Server(net, [client], Recipe(privacy=replace(sample(), mode=way), lr=1.0)).round()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


class Dropping(nn.Module):
    """Drops by a call, not by a layer."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("mode", ["alone", "layers", "stacked"])
def test_a_model_that_drops_by_a_call_trains_in_each_way(mode):
    net = nn.Sequential(nn.Linear(6, 5), Dropping(), nn.Linear(5, 4))
    plan = replace(sample(), mode=mode)
    assert len(Server(net, make_clients([8]), Recipe(privacy=plan)).round()["cohort"]) == 1


class Cell(nn.Module):
    """A recurrent layer of packed sequences, which no way of torch.func can take."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        lengths = (x != 0).any(-1).sum(1).clamp(min=1)
        packed = pack(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(pad(self.cell(packed)[0], batch_first=True)[0].sum(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_packed_sequences_train_privately_whatever_a_way_that_fails_leaves_behind():
    x, y = make_clients([8])[0].data.tensors
    server = Server(Cell(), [Client("a", (x.view(8, 2, 3), y))], Recipe(privacy=sample()))
    assert any("example after example" in note for note in server.notes)
    server.round()


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_behind_attention_is_no_reason_to_take_examples_one_by_one(batch_first):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.drop = nn.Linear(2, 8), nn.Linear(8, 4), nn.Dropout(0.5)
            self.seen = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x.view(-1, 3, 2))
            h = h if batch_first else h.transpose(0, 1)
            h = self.drop(self.seen(h, h, h, need_weights=False)[0])
            return self.head(h.sum(1 if batch_first else 0))

    torch.manual_seed(0)
    server = Server(Attention(), make_clients([8]), Recipe(privacy=sample()))
    assert any("by formulas of the model's layers" in note for note in server.notes)


def test_a_layer_that_torch_takes_wrongly_side_by_side_trains_by_another_way():
    # PReLU in a vmap of a vmap gives one client's gradients to another where batches allow it
    def server(mode: str) -> Server:
        model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
        clients = [Client(str(k), (torch.randn(6, 3), torch.arange(6) % 2)) for k in range(8)]
        plan = SampleLevel(
            noise_multiplier=0.5, rounds=1, steps=1, batch_size=6, sample_rate=1.0, mode=mode
        )
        return Server(model, clients, Recipe(privacy=plan), engine=Local(solver="general"))

    with pytest.raises(ConfigError, match="mode stacked cannot train"):
        server("stacked")
    assert "torch.func" not in str(server("auto").notes)


def test_words_that_are_masked_by_chance_are_no_reason_to_leave_formulas():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shown = torch.where(torch.rand(x.shape) < 0.3, 8, (x.abs() * 4).long() % 8)
            return self.head(F.gumbel_softmax(self.words(shown).mean(1)))

    torch.manual_seed(0)
    server = Server(Masked(), make_clients([8]), Recipe(privacy=sample()))
    assert any("by formulas of the model's layers" in note for note in server.notes)
