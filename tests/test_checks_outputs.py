import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from conftest import mlp
from fedtorch import ConfigError
from fedtorch.checks.outputs import classes_fit, metrics_fit
from fedtorch.data import from_tensors
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
