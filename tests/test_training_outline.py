import copy
import threading
import warnings
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, Local, Recipe, Server
from fedtorch.privacy import SampleLevel
from fedtorch.training.outline import Outline, copied, untouched


class Keeps(nn.Module):
    """Everything a module may keep from call to call beside the numbers of weights and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)
        self.state: Tensor | None = None
        self.calls, self.cache, self.log = 0, dict[int, Tensor](), list[int]()
        self.bank = torch.zeros(3)
        self.register_buffer("made", None, persistent=False)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) + (0 if self.state is None else self.state.mean())
        self.state, self.calls = out.detach(), self.calls + 1
        self.cache[len(x)] = out
        self.log.append(len(x))
        self.bank[0] += 1
        self.made = torch.ones(2)
        self.table = torch.zeros(len(x))
        self.late = len(x)
        return out


def test_all_that_a_forward_leaves_is_put_back_also_after_an_error():
    model = Keeps().eval()
    with pytest.raises(RuntimeError, match="stop"), untouched(model) as outline:
        assert outline.changed() is None
        model.train()(torch.randn(5, 6)).sum().backward()
        with torch.no_grad():
            model.inner.weight.zero_()
        assert outline.changed() is not None
        raise RuntimeError("stop")
    assert outline.changed() is None
    assert (model.state, model.calls, model.cache, model.log) == (None, 0, {}, [])
    assert model.made is None
    assert len(model.table) == 1
    assert not hasattr(model, "late")
    assert model.bank.sum() == 0
    assert not model.training
    assert model.inner.weight.grad is None
    assert model.inner.weight.any()


class Option:
    """Of somebody's own."""

    level = 0.0


STORES = {
    "deque": lambda: deque([0.0], maxlen=2),
    "array": lambda: np.zeros(1),
    "object": Option,
    "table": lambda: {"a": {"b": [0.0]}},
    "list": lambda: [[torch.zeros(())]],
}


class Shifts(nn.Module):
    """Shifts its inputs by what the batch before has left."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.inner, self.store = nn.Linear(6, 4), store

    def forward(self, x: Tensor) -> Tensor:
        kept = self.store
        if isinstance(kept, Option):
            last, kept.level = kept.level, float(x.detach().sum())
            return self.inner(x - last)
        for key in {dict: ("a", "b"), list: (0,)}.get(type(kept), ()):
            kept = kept[key]
        last = float(kept[0])
        if isinstance(kept[0], Tensor):
            kept[0].copy_(x.detach().sum())
        else:
            kept[0] = float(x.detach().sum())
        return self.inner(x - last)


@pytest.mark.parametrize("kind", STORES)
def test_what_lies_in_an_attribute_goes_from_no_client_to_the_next(kind):
    torch.manual_seed(0)
    model, clients = Shifts(STORES[kind]()), make_clients([8, 9])
    alone = []
    for client in clients:
        one = Server(copy.deepcopy(model), [client], engine=Local(solver="general"))
        one.round()
        alone.append(weights(one.model))
    server = Server(copy.deepcopy(model), clients)
    assert any(n.startswith("attribute store of layer the model (Shifts)") for n in server.notes)
    server.round()
    for k, v in weights(server.model).items():
        assert torch.allclose(v, (8 * alone[0][k] + 9 * alone[1][k]) / 17, atol=1e-6)
    plan = SampleLevel(rounds=1, noise_multiplier=1.0)
    with pytest.raises(ConfigError, match=r"attribute store .* past clipping and noise"):
        Server(model, clients, Recipe(privacy=plan))


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda m: setattr(m, "state", torch.ones(1)), "attribute state of layer the model"),
        (lambda m: m.cache.update({1: torch.ones(1)}), "attribute cache"),
        (lambda m: m.log.append(1), "attribute log"),
        (lambda m: m.bank.add_(1), "attribute bank"),
        (lambda m: setattr(m, "calls", 7), "attribute calls"),
        (lambda m: setattr(m, "table", torch.zeros(2)), "buffer table"),
        (lambda m: m.table.resize_(4), "buffer table"),
        (lambda m: setattr(m, "made", torch.zeros(2)), "buffer made"),
    ],
)
def test_what_changed_is_named_and_put_back(change, what):
    model = Keeps()
    outline = Outline(model, own=True)
    change(model)
    found = outline.changed()
    assert found is not None and what in found.what
    outline.restore()
    assert outline.changed() is None


def test_new_numbers_in_a_buffer_are_no_change():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    outline = Outline(model)
    model(torch.randn(5, 6))
    assert outline.changed() is None


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(6, 8))


def pruned() -> nn.Module:
    layer = nn.Linear(6, 8)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


@pytest.mark.parametrize(
    "make", [weight_normed, pruned, lambda: nn.utils.spectral_norm(nn.Linear(6, 8))]
)
@pytest.mark.parametrize("solver", ["auto", "general"])
def test_a_model_that_keeps_computed_weights_trains_as_by_hand(make, solver):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(8, 4))
    model(torch.randn(2, 6)).sum().backward()  # tensors with a graph are on it now
    model.zero_grad()
    clients = make_clients([6])
    by_hand = copied(model)
    x, y = clients[0].data.tensors
    nn.functional.cross_entropy(by_hand(x), y).backward()
    wanted = {k: p.detach() - 0.1 * p.grad for k, p in by_hand.named_parameters()}
    engine = Local(solver=solver)
    server = Server(model, clients, Recipe(steps=1, batch_size=None), engine=engine)
    server.round()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[k])
    if make is pruned:
        model(x)
        assert (model[0].weight == 0).sum() == model[0].weight.numel() // 2


def test_a_copy_trains_as_its_model_did():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(mlp())
    frozen = mlp()
    frozen[0].weight.requires_grad_(False)
    for model in (scripted, frozen):
        made = copied(model)
        for old, new in zip(model.parameters(), made.parameters(), strict=True):
            assert new is not old
            assert new.is_leaf
            assert new.requires_grad == old.requires_grad


def test_what_cannot_be_copied_is_named():
    model = mlp()
    model[0].lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"lock of layer 0 \(Linear\): cannot pickle"):
        Server(model, make_clients([5]))


def test_a_graph_that_goes_from_batch_to_batch_is_refused_before_training():
    class Unrolls(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x) + self.state
            self.state = (out * out).mean()[None]
            return out

    with pytest.raises(
        ConfigError, match="has no gradient: Trying to backward through the graph a second"
    ):
        Server(Unrolls(), make_clients([4]), Recipe(batch_size=4))


class Stateful(nn.Module):
    """Carries a hidden state from batch to batch as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(6, 4), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) + self.state
        self.state = out.detach().mean()[None]
        return out


def test_nothing_a_model_keeps_goes_from_client_to_client():
    clients = make_clients([8, 8, 8])
    torch.manual_seed(0)
    start = Stateful()
    alone = []
    for client in clients:
        model = copy.deepcopy(start)
        Server(model, [client], Recipe(batch_size=4)).round()
        alone.append(weights(model))
    for client in clients:
        client.memory = {}
    model = copy.deepcopy(start)
    server = Server(model, clients, Recipe(batch_size=4))
    server.round()
    assert any("attribute state" in n and "is not sent" in n for n in server.notes)
    for k, v in weights(model).items():
        torch.testing.assert_close(v, sum(a[k] for a in alone) / 3)


def test_buffers_that_a_forward_makes_are_nobodys_state():
    clients = make_clients([8, 5, 3])
    model = Keeps()
    server = Server(model, clients, Recipe(batch_size=4))
    server.round()
    model.eval()(torch.randn(9, 6))  # as an evaluation does
    server.round()
    state = server.state_dict()
    assert state["model"].keys() == {"inner.weight", "inner.bias"}
    again = Server(Keeps(), clients, Recipe(batch_size=4))
    again.load_state_dict(state)
    assert again.round()["clients"] == 3


def test_a_saved_buffer_that_a_forward_makes_is_refused_with_the_fix():
    class Makes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "made"):
                self.register_buffer("made", torch.zeros(1))
            return super().forward(x) + self.made

    with pytest.raises(ConfigError, match=r"buffer made of layer the model .*persistent=False"):
        Server(Makes(6, 4), make_clients([5]))
    model = Makes(6, 4)
    model(torch.randn(1, 6))
    assert Server(model, make_clients([5])).round()["clients"] == 1


def test_weights_in_a_list_are_weights_as_an_lstm_keeps_them():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(6, 4, batch_first=True)
            self.decayed = [p for p in self.inner.parameters() if p.ndim > 1]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, None])[0][:, -1]

    plan = SampleLevel(rounds=1, noise_multiplier=1.0)
    for recipe in (Recipe(), Recipe(privacy=plan)):
        server = Server(Reads(), make_clients([8, 9]), recipe)
        assert not any("changes while the model runs" in n for n in server.notes)
