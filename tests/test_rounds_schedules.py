import pytest
import torch
from torch import nn

from conftest import make_clients, mlp
from fedtorch import Client, ConfigError, FedAvg, Recipe, Scaffold, Server
from fedtorch.rounds.schedules import Constant, Cosine, Exponential, Step


def test_factors_by_hand():
    assert [Constant()(r) for r in (0, 9)] == [1.0, 1.0]
    assert [Exponential(decay=0.5)(r) for r in range(3)] == [1.0, 0.5, 0.25]
    assert [Step(every=2, decay=0.1)(r) for r in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = Cosine(period=10, floor=0.2)
    assert [cosine(r) for r in (0, 5, 10, 99)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Exponential(decay=0.0),
        lambda: Exponential(decay=1.1),
        lambda: Step(every=0),
        lambda: Step(every=3, decay=float("nan")),
        lambda: Cosine(period=0),
        lambda: Cosine(period=3, floor=-1.0),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ConfigError, match="schedule"):
        wrong()


def test_clients_train_with_the_scheduled_learning_rate():
    # one step of SGD on f(w) = w moves w by exactly the learning rate
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    client = Client("a", (torch.ones(1, 1), torch.zeros(1)))
    recipe = Recipe(epochs=1, loss=lambda out, _: out[:, 0], lr=1.0, batch_size=None)
    server = Server(model, [client], recipe, schedule=Exponential(decay=0.5))
    lrs = [figures["lr"] for figures in server.rounds(3)]
    assert lrs == [1.0, 0.5, 0.25]
    assert model.weight.item() == -1.75


def test_a_cosine_may_end_at_nothing_and_nothing_is_learnt_then():
    assert [Cosine(period=2, floor=0.0)(r) for r in (0, 1, 2, 9)] == pytest.approx([1, 0.5, 0, 0])
    for strategy in (FedAvg(), Scaffold()):
        model, clients = mlp(), make_clients([20, 30])
        server = Server(model, clients, Recipe(strategy), schedule=Cosine(period=1, floor=0.0))
        server.round()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        figures = server.round()
        assert figures["nonfinite"] == 0 and figures["lr"] == 0
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
