import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from conftest import make_clients, mlp
from fedtorch import Client, ClientOptimizer, ConfigError, Recipe, Server, local_update
from fedtorch.client import as_dataset
from fedtorch.training.module import snapshot
from fedtorch.types import ClientError, Task
from private_case import Rows


def task(model: nn.Module) -> Task:
    return Task(snapshot(model), {}, 0, 0, 0.1)


def test_an_update_is_float64_with_a_client_axis_and_says_nothing_about_examples():
    model, clients = mlp(), make_clients([5, 9, 2])
    update, failures = local_update(clients, task(model), Recipe(Rows()), model)
    assert not failures
    assert update.ids == ("c0", "c1", "c2")
    assert update.weight.tolist() == [5.0, 9.0, 2.0]
    assert all(v.dtype == torch.float64 and len(v) == 3 for v in update.sent["delta"].values())
    assert all(v.shape == (3,) for v in update.metrics.values())


def test_a_client_without_a_finite_update_is_left_out_and_the_others_are_not_touched():
    model, clients = mlp(), make_clients([5, 9, 2])
    start = task(model)  # the working copy is overwritten
    x, y = clients[1].data.tensors
    poisoned = [clients[0], Client("bad", (x * float("nan"), y)), clients[2]]
    good, _ = local_update([clients[0], clients[2]], start, Recipe(Rows()), model)
    for group in ([poisoned], [[c] for c in poisoned]):
        failed, kept = [], {}
        for chunk in group:
            update, failures = local_update(chunk, start, Recipe(Rows()), model)
            failed += failures
            kept |= {
                i: {k: v[n] for k, v in update.sent["delta"].items()}
                for n, i in enumerate(update.ids)
            }
        assert [(f.id, f.kind) for f in failed] == [("bad", "nonfinite")]
        assert list(kept) == ["c0", "c2"]
        for n, i in enumerate(kept):
            for k, v in kept[i].items():
                assert torch.allclose(v, good.sent["delta"][k][n], atol=1e-6)


class Broken(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i == 5:
            raise OSError("scan 5 is missing")
        return torch.zeros(6), 0


def test_a_client_whose_own_code_fails_is_named():
    model = mlp()
    with pytest.raises(ClientError, match="client hospital, round 0: OSError: scan 5 is missing"):
        local_update([Client("hospital", Broken())], task(model), Recipe(), model)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    "data, message",
    [
        ((torch.zeros(3, 2), torch.zeros(4)), r"different lengths \[3, 4\]"),
        ((torch.zeros(0, 2), torch.zeros(0)), "has no examples"),
        (Stream(), "not map-style"),
        (([1.0, 2.0], [0, 1]), "must be tensors"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        as_dataset(data, "client 'a'")


def test_repr_shows_no_data():
    assert (
        repr(Client("a", (torch.full((3, 1), 42.0), torch.zeros(3)))) == "Client('a', 3 examples)"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": float("nan")}, "lr must be a positive number"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"optimizer": ClientOptimizer("nope")}, "unknown client optimizer"),
    ],
)
def test_recipes_that_cannot_train_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_data_that_requires_grad_is_taken_as_numbers_or_refused():
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))
    leaf = x.clone().requires_grad_()
    data = as_dataset((leaf, y), "client a")
    assert not data[0][0].requires_grad
    for tensors in ((nn.Linear(3, 3)(x), y), torch.utils.data.TensorDataset(leaf * 2, y)):
        with pytest.raises(ConfigError, match="client a: its data requires grad"):
            as_dataset(tensors, "client a")
    single = torch.utils.data.StackDataset(leaf * 2, y)
    with pytest.raises(ConfigError, match=r"client a: its dataset gives tensors that require grad"):
        Server(nn.Linear(3, 2), [Client("a", single)])


@pytest.mark.parametrize("workers", [-1, 0.5])
def test_a_number_of_workers_that_cannot_be_is_refused_at_once(workers):
    with pytest.raises(ConfigError, match="num_workers of client 'a' must be"):
        Client("a", (torch.zeros(3, 2), torch.zeros(3)), num_workers=workers)
