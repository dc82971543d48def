import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from conftest import mlp
from fedtorch import Client, ConfigError, Recipe, Server
from fedtorch.checks.outputs import classes_fit, metrics_fit
from fedtorch.data import from_tensors
from fedtorch.privacy import Nothing, SampleLevel
from fedtorch.training.losses import accuracy, binary_accuracy, cross_entropy


def named(labels: torch.Tensor, classes: int):
    x = torch.randn(len(labels), 6)
    return from_tensors("d", (x, labels), (x, labels), "classification", classes)


@pytest.mark.parametrize(
    "outputs, labels, classes, message",
    [
        (3, [0, 1, 2, 3], 4, "4 classes: it needs an output of 4"),
        (4, [1, 2, 3, 4], 4, "its labels go from 1 to 4: they must be 0 to 3"),
        (4, [-1, 0, 1, 2], 4, "its labels go from -1 to 2"),
    ],
)
def test_labels_and_outputs_must_fit(outputs, labels, classes, message):
    x, y = torch.randn(4, 6), torch.tensor(labels)
    with pytest.raises(ConfigError, match=message):
        classes_fit(mlp(classes=outputs), TensorDataset(x, y), y, classes)


def test_a_target_of_one_class_is_told_with_its_column():
    y = torch.zeros(4).long()
    with pytest.raises(ConfigError, match="the target, column 'ward', is of one class"):
        classes_fit(mlp(), TensorDataset(torch.randn(4, 6), y), y, 1, "ward")


@pytest.mark.parametrize("classes", [3, 8, 12])
def test_the_classes_of_a_segmentation_are_on_axis_1_not_in_its_width(classes):
    x, y = torch.randn(4, 1, 8, 8), torch.randint(0, classes, (4, 8, 8))
    maps = TensorDataset(x, y)
    classes_fit(torch.nn.Conv2d(1, classes, 1), maps, None, classes)
    with pytest.raises(
        ConfigError, match=f"needs an output of {classes} for each example, on axis 1"
    ):
        classes_fit(torch.nn.Conv2d(1, classes - 1, 1), maps, None, classes)


def test_metrics_are_tried_too():
    data = named(torch.tensor([0, 1]), 4)
    metrics_fit(mlp(), data.test, {"accuracy": accuracy})
    with pytest.raises(ConfigError, match="one output for each target"):
        metrics_fit(mlp(), data.test, {"binary": binary_accuracy})
    with pytest.raises(ConfigError, match="metric odd does not fit the output"):
        metrics_fit(mlp(), data.test, {"odd": lambda o, t: o @ t})


def test_metrics_that_only_the_whole_set_can_try_are_named():
    data = named(torch.arange(9) % 4, 4)

    def one_class(output, target):
        raise ValueError("only one class is there")

    metrics = {"accuracy": accuracy, "mean": lambda o, t: 1.0, "auc": one_class}
    assert set(metrics_fit(mlp(), data.test, metrics)) == {"mean", "auc"}
    for length in (2, 3):  # as many as examples were tried, by chance
        with pytest.raises(ConfigError, match="metric recall must give one number for each"):
            metrics_fit(mlp(), data.test, {"recall": lambda o, t, n=length: torch.zeros(n)})


def test_metrics_may_look_at_an_output_that_is_a_view_of_a_weight():
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.w.expand(len(x), 4)

    data = named(torch.tensor([0, 1]), 4)
    metrics_fit(Bias(), data.test, {"loss": cross_entropy})


def test_an_evaluation_that_fails_is_refused_before_training():
    class Forgets(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.training else self.table[x]

    with pytest.raises(ConfigError, match=r"cannot take a batch .* in evaluation"):
        metrics_fit(Forgets(6, 4), named(torch.tensor([0, 1]), 4).test, {"loss": cross_entropy})


@pytest.mark.parametrize("plan", [Nothing(), SampleLevel(rounds=1)], ids=["plain", "sample"])
def test_a_label_beyond_the_classes_is_told_before_training_wherever_it_is(plan):
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    late = y.clone()
    late[37] = 2
    clients = [Client("a", (x, y)), Client("b", (x, late))]
    with pytest.raises(ConfigError, match="client b has labels that are none of the model's 2"):
        Server(nn.Linear(3, 2), clients, Recipe(privacy=plan, batch_size=8))
    late[37] = -100  # which does not count
    Server(nn.Linear(3, 2), clients, Recipe(privacy=plan, batch_size=8))


def one_loss(output, target):
    return (output - target) ** 2


@pytest.mark.parametrize(
    "loss",
    [one_loss, nn.MSELoss(), lambda o, y: F.l1_loss(o, y, reduction="none")],
    ids=["own", "torch", "each"],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_loss_that_holds_every_output_to_every_label_is_refused(loss):
    x, y = torch.randn(9, 3), torch.randn(9)
    with pytest.raises(ConfigError, match=r"to every label .* y\[:, None\], or .*Flatten\(0\)"):
        Server(nn.Linear(3, 1), [Client("a", (x, y))], Recipe(loss=loss))
    Server(nn.Linear(3, 1), [Client("a", (x, y[:, None]))], Recipe(loss=loss)).round()
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    Server(flat, [Client("a", (x, y))], Recipe(loss=loss)).round()


@pytest.mark.parametrize(
    ("y", "loss", "fix"),
    [
        (
            torch.eye(3).long()[:2].repeat(3, 1),
            cross_entropy,
            r"y\.float\(\), or classes, y\.argmax",
        ),
        (torch.zeros(6, 1).long(), cross_entropy, r"give y\[:, 0\]"),
        (torch.zeros(6, 3).bool(), nn.BCEWithLogitsLoss(), r"labels are bool, .*y\.float\(\)"),
        (torch.full((6,), 3), nn.CrossEntropyLoss(), "of 3 outputs the classes are 0 to 2"),
        (torch.zeros(6), nn.CrossEntropyLoss(), r"y\.long\(\)"),
    ],
    ids=["one-hot", "column", "truth", "beyond", "floats"],
)
def test_targets_of_another_kind_are_told_the_fix(y, loss, fix):
    with pytest.raises(ConfigError, match=fix):
        Server(nn.Linear(3, 3), [Client("a", (torch.randn(6, 3), y))], Recipe(loss=loss))
