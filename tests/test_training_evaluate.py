import math

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

from fedtorch import Client, ConfigError, Recipe, Server, evaluate
from fedtorch.training.evaluate import convolves, evaluate_clients
from fedtorch.training.losses import accuracy, cross_entropy


def data(n: int) -> TensorDataset:
    g = torch.Generator().manual_seed(n)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


def test_means_are_over_examples_whatever_the_batches():
    model, held = nn.Linear(4, 3), data(37)
    x, y = held.tensors
    with torch.no_grad():
        want = float(cross_entropy(model(x), y).mean())
    for size in (None, 1, 5, 36, 37, 1000):
        got = evaluate(model, held, {"loss": cross_entropy, "hit": accuracy}, size)
        assert got["loss"] == pytest.approx(want, rel=1e-6)
        assert got["hit"] == pytest.approx(float((model(x).argmax(1) == y).double().mean()))


class Centred(nn.Module):
    """Writes on what it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        x -= x.mean()
        return self.inner(x)


def halved(output, target):
    loss = cross_entropy(output, target)
    target //= 2
    return loss


@pytest.mark.parametrize("size", [4, 20])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_data_is_what_it_was_whoever_writes_on_it(images, inference, size):
    shape = (1, 8, 8) if images else (4,)
    front = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()) if images else nn.Linear(4, 2)
    model = Centred(nn.Sequential(front, nn.Linear(2, 3)))
    x, y = torch.randn(20, *shape), torch.arange(20) % 3
    with torch.no_grad():
        parts = zip(x.clone().split(size), y.split(size), strict=True)
        want = torch.stack([cross_entropy(model(a), b).mean() for a, b in parts]).mean()
    held = TensorDataset(x.clone(), y.clone())
    for loss in (cross_entropy, halved, cross_entropy):
        with torch.inference_mode(inference):
            got = evaluate(model, held, {"loss": loss}, size)
        assert got["loss"] == pytest.approx(float(want), rel=1e-5)
    assert torch.equal(held.tensors[0], x) and torch.equal(held.tensors[1], y)


def test_dropout_is_off_and_the_mode_is_put_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3))
    state = torch.get_rng_state()
    one, two = (evaluate(model, data(20), {"loss": cross_entropy}) for _ in range(2))
    assert one == two
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_whole_batch_metrics_and_plain_numbers():
    def spread(output: torch.Tensor, target: torch.Tensor) -> float:
        return float(len(target))

    assert evaluate(nn.Linear(4, 3), data(20), {"n": spread}, batch_size=None) == {"n": 20.0}


def macro_f1(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(f1_score(target, output.argmax(1), average="macro", zero_division=0.0))


def auc(output: torch.Tensor, target: torch.Tensor) -> float:
    if len(target.unique()) < 2:
        raise ValueError("only one class is there")
    return float(roc_auc_score(target, output[:, 1] - output[:, 0]))


@pytest.mark.parametrize("size", [None, 7, 16, 200])
def test_scores_of_classes_are_of_the_whole_set_as_scikit_learn_gives_them(size):
    torch.manual_seed(1)
    model, x = nn.Linear(4, 2), torch.randn(120, 4)
    # the first batches are of one class
    y = (x[:, 0] + torch.randn(120) > 1.2).long().sort().values
    output = model(x).detach()
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]))
    metrics = {"loss": cross_entropy, "f1": macro_f1, "auc": auc, "weighted": weighted}
    got = evaluate(model, TensorDataset(x, y), metrics, size)
    assert list(got) == list(metrics)
    want = {
        "f1": macro_f1(output, y),
        "auc": auc(output, y),
        "weighted": float(weighted(output, y)),
    }
    assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-6)


def test_a_metric_may_say_that_it_needs_the_whole_set():
    def rank(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output[:, 0].argsort().argsort().double()  # one for each example, among all of them

    x = torch.randn(40, 4)
    held, model = TensorDataset(x, torch.zeros(40)), nn.Linear(4, 1)
    assert evaluate(model, held, {"r": rank}, 10)["r"] == pytest.approx(4.5)
    rank.whole_set = True
    assert evaluate(model, held, {"r": rank}, 10)["r"] == pytest.approx(19.5)


def test_nothing_to_judge_by_is_said():
    for step in (None, lambda m, b: (m(b[0]), b[1])):
        with pytest.raises(ConfigError, match=r"nothing to judge by: give metrics=\['accuracy'\]"):
            evaluate(nn.Linear(4, 3), data(6), step=step)


@pytest.mark.parametrize("metrics", [cross_entropy, [cross_entropy], 3], ids=["fn", "list", "int"])
def test_functions_need_a_name_and_batches_a_size(metrics):
    with pytest.raises(ConfigError, match=r"functions by what to call them, \{'loss': fn\}"):
        evaluate(nn.Linear(4, 3), data(6), metrics)
    for size in (0, -1):
        with pytest.raises(ConfigError, match="batch_size must be at least 1"):
            evaluate(nn.Linear(4, 3), data(6), ["accuracy"], size)


def test_a_client_that_a_metric_fails_on_spoils_nobodys_figures():
    def auc(output, target):
        if len(set(target.tolist())) < 2:
            raise ValueError("only one class")
        return 0.75

    x, train = torch.randn(4, 2), (torch.randn(4, 2), torch.zeros(4).long())
    both, one = torch.tensor([0, 1, 1, 0]), torch.zeros(4).long()
    who = [Client(k, train, (x, y)) for k, y in {"a": both, "b": one, "c": one}.items()]
    metrics = {"auc": auc, "accuracy": accuracy}
    with pytest.warns(UserWarning, match="no auc of client b and 1 more: .* only one class"):
        found = evaluate_clients(nn.Linear(2, 2), who, metrics)
    assert found["a"]["auc"] == 0.75 and math.isnan(found["b"]["auc"])
    assert all(0 <= s["accuracy"] <= 1 for s in found.values())
    with pytest.raises(ConfigError, match="metric auc fails on a set of 4 examples: ValueError"):
        evaluate_clients(nn.Linear(2, 2), who[1:], metrics)


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x.sum(1), "b": (x, x)}


def test_whole_sets_of_outputs_in_parts_and_metrics_that_fail_or_give_something_else():
    held = data(20)
    total = {"sum": lambda o, y: (o["a"] + o["b"][1].sum(1)).sum()}
    want = float(2 * held.tensors[0].sum())
    assert evaluate(Pair(), held, total, 6)["sum"] == pytest.approx(want, rel=1e-4)
    by_class = {"recall": lambda o, y: torch.zeros(3)}
    with pytest.raises(
        ConfigError, match=r"metric recall must give one number for each .* got \[3\]"
    ):
        evaluate(nn.Linear(4, 3), held, by_class)
    with pytest.raises(
        ConfigError, match="metric bad fails on a set of 20 examples: KeyError: 'x'"
    ):
        evaluate(nn.Linear(4, 3), held, {"bad": lambda o, y: {}["x"]})


def test_ignored_positions_count_nowhere_as_in_torch():
    torch.manual_seed(0)
    x, y = torch.randn(11, 4, 6), torch.randint(0, 4, (11, 6))
    y[0, 1:], y[3], y[7, :2] = -100, -100, -100
    got = evaluate(nn.Identity(), TensorDataset(x, y), {"l": cross_entropy, "a": accuracy}, 4)
    assert got["l"] == pytest.approx(float(nn.functional.cross_entropy(x, y)), rel=1e-6)
    kept = y != -100
    assert got["a"] == pytest.approx(float((x.argmax(1) == y)[kept].float().mean()))
    flat = evaluate(nn.Identity(), TensorDataset(x[..., 0], y[:, 0]), {"l": cross_entropy}, 3)["l"]
    assert flat == pytest.approx(float(nn.functional.cross_entropy(x[..., 0], y[:, 0])), rel=1e-6)


def test_no_data_has_no_figures():
    held = TensorDataset(torch.zeros(0, 4), torch.zeros(0).long())
    assert evaluate(nn.Linear(4, 3), held, {"loss": cross_entropy, "f1": macro_f1}) == {}


def test_clients_without_validation_data_are_left_out():
    held = data(5).tensors
    clients = [Client("a", data(9)), Client("b", data(9), held)]
    assert list(evaluate_clients(nn.Linear(4, 3), clients, {"loss": cross_entropy})) == ["b"]


class Viewed(nn.Module):
    """Only right for images in the usual layout, where it needs one block of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.conv(x).view(x.size(0), -1))


@pytest.mark.parametrize("quick", [True, False])
def test_images_are_laid_out_for_convolutions_where_the_model_takes_it(quick):
    torch.manual_seed(0)
    x, y = torch.randn(30, 2, 4, 4), torch.randint(0, 4, (30,))
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 4))
    model = model if quick else Viewed()
    assert convolves(model, x) == quick
    assert not convolves(nn.Flatten(), x) and not convolves(model, x[0])
    want = float(nn.functional.cross_entropy(model(x), y).detach())
    got = evaluate(model, TensorDataset(x, y), {"loss": cross_entropy}, batch_size=8)["loss"]
    assert got == pytest.approx(want, rel=1e-5)


def test_a_model_that_writes_on_its_images_is_tried_on_images_of_its_own():
    class Writes(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.mul_(2)).flatten(1)

    x = torch.rand(4, 3, 6, 6)
    assert convolves(Writes(3, 2, 3), x) and float(x.max()) <= 1


def test_a_step_judges_batches_of_any_kind():
    x, y = data(37).tensors
    held, model = StackDataset(features=x, label=y), nn.Linear(4, 3)
    asked = {"loss": cross_entropy, "hit": accuracy}
    want = evaluate(model, TensorDataset(x, y), asked)

    def output(model, batch):
        return model(batch["features"]), batch["label"]

    def figures(model, batch):
        each = cross_entropy(*output(model, batch))
        return {"loss": each, "mean": each.mean()}

    for size in (None, 5):
        assert evaluate(model, held, asked, size, step=output) == pytest.approx(want)
        got = evaluate(model, held, batch_size=size, step=figures)
        assert got == pytest.approx({"loss": want["loss"], "mean": want["loss"]})
    client = Client("c", held, held)
    assert evaluate_clients(model, [client], step=figures)["c"]["loss"] == pytest.approx(
        want["loss"]
    )
    for step, why in {
        figures: "no output to judge",
        lambda model, batch: 3.0: "output, target",
        lambda model, batch: {"loss": torch.ones(2)}: r"figure|metric",
    }.items():
        with pytest.raises(ConfigError, match=why):
            evaluate(model, held, asked if step is figures else (), step=step)


def test_a_loss_of_what_a_model_gives_in_training_alone_is_told_what_it_gives_when_evaluated():
    class Aided(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return (y, y) if self.training else y

    def loss(output, y):
        output, aid = output
        return nn.functional.cross_entropy(output, y) + nn.functional.cross_entropy(aid, y)

    x, y = torch.randn(9, 6), torch.arange(9) % 4
    server = Server(Aided(6, 4), [Client("a", (x, y))], Recipe(loss=loss))
    fix = r"evaluated, the model gives \[9, 4\]: .* metrics=\{'loss': fn\}"
    with pytest.raises(ConfigError, match=fix):
        server.fit(1, (x, y), progress=False)
    assert server.round_number == 0
    judge = {"loss": nn.functional.cross_entropy}
    assert server.fit(1, (x, y), judge, progress=False)[-1]["test_loss"] > 0
