import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torch.utils.data import TensorDataset

from fedtorch import Client, ConfigError, evaluate
from fedtorch.checks.outputs import metrics_fit
from fedtorch.run.setup import loss_and_metrics
from fedtorch.training import metrics
from fedtorch.training.evaluate import evaluate_clients
from fedtorch.training.losses import accuracy, cross_entropy, mean_absolute_error

CLASSES = ["auroc", "average_precision", "balanced_accuracy", "f1_macro", "f1_micro", "mean_iou"]


def scores(output, target, names, size=7):
    return evaluate(nn.Identity(), TensorDataset(output, target), names, size)


def by_sklearn(p, y, labels):
    """``p`` [N, C] of more classes than ``y`` holds: curves and recall are of those that are there."""
    guess, there = p.argmax(1), np.unique(y)
    one = {c: (y == c).astype(int) for c in there}
    return {
        "auroc": np.mean([sk.roc_auc_score(one[c], p[:, c]) for c in there]),
        "average_precision": np.mean([sk.average_precision_score(one[c], p[:, c]) for c in there]),
        "balanced_accuracy": np.mean([(guess[y == c] == c).mean() for c in there]),
        "f1_macro": sk.f1_score(y, guess, average="macro"),
        "f1_micro": sk.f1_score(y, guess, average="micro"),
        "mean_iou": sk.jaccard_score(y, guess, average="macro"),
    }


@pytest.mark.parametrize("missing", [False, True])
def test_many_classes_are_as_scikit_learn_has_them_whatever_the_batches(missing):
    torch.manual_seed(0)
    output = torch.randn(90, 5)
    y = torch.randint(0, 3 if missing else 5, (90,)).sort().values
    want = by_sklearn(output.softmax(1).numpy(), y.numpy(), 5)
    for size in (1, 8, 90):
        assert scores(output, y, CLASSES, size) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("form", ["two", "one", "column", "bool"])
def test_two_classes_come_as_two_logits_or_as_one(form):
    torch.manual_seed(1)
    logit, y = 40 * torch.randn(60), torch.randint(0, 2, (60,))  # sure ones too
    output = {"two": torch.stack([-logit, torch.zeros(60)], 1), "column": logit[:, None]}
    target = {"one": y.float(), "column": y.float()[:, None], "bool": y.bool()}
    found = scores(output.get(form, logit), target.get(form, y), [*CLASSES, "f1"])
    guess = (logit > 0).long()
    assert found == pytest.approx(
        {
            "auroc": sk.roc_auc_score(y, logit),
            "average_precision": sk.average_precision_score(y, logit),
            "balanced_accuracy": sk.balanced_accuracy_score(y, guess),
            "f1_macro": sk.f1_score(y, guess, average="macro"),
            "f1_micro": sk.accuracy_score(y, guess),
            "mean_iou": sk.jaccard_score(y, guess, average="macro"),
            "f1": sk.f1_score(y, guess),
        },
        rel=1e-6,
    )


def test_top_k_is_as_scikit_learn_has_it():
    torch.manual_seed(2)
    output, y = torch.randn(50, 6), torch.randint(0, 6, (50,))
    want = sk.top_k_accuracy_score(y, output, k=3, labels=range(6))
    assert scores(output, y, ["top3", "top1", "accuracy"]) == pytest.approx(
        {"top3": want, "top1": (v := float((output.argmax(1) == y).float().mean())), "accuracy": v}
    )
    with pytest.raises(ConfigError, match="top7: the model gives 6 classes alone"):
        scores(output, y, ["top7"])


def test_maps_and_texts_leave_out_ignored_positions():
    torch.manual_seed(3)
    output, y = torch.randn(6, 4, 5, 5), torch.randint(0, 4, (6, 5, 5))
    y[:2, :3] = -100
    flat, kept = output.movedim(1, -1).reshape(-1, 4), (y != -100).flatten()
    want = by_sklearn(flat[kept].softmax(1).numpy(), y.flatten()[kept].numpy(), 4)
    names = [*CLASSES, "perplexity", "top2"]
    found = scores(output, y, names, 4)
    want["perplexity"] = math.exp(nn.functional.cross_entropy(output, y))
    want["top2"] = sk.top_k_accuracy_score(y.flatten()[kept], flat[kept], k=2)
    assert found == pytest.approx(want, rel=1e-6)
    # a map of one logit: its two classes
    mask, one = y.clamp(max=1), output[:, :1]
    guess = (one[:, 0] > 0).flatten()[kept]
    assert scores(one, mask, ["mean_iou"])["mean_iou"] == pytest.approx(
        sk.jaccard_score(mask.flatten()[kept], guess, average="macro"), rel=1e-6
    )


def test_r2_of_large_small_and_several_targets():
    torch.manual_seed(4)
    for y in (torch.randn(40), 1e-5 * torch.randn(40), 1e4 + torch.randn(40), torch.randn(40, 3)):
        guess = y + 0.3 * y.std() * torch.randn(y.shape)
        want = sk.r2_score(y.double(), guess.double())
        assert scores(guess, y, {"r": "r2"})["r"] == pytest.approx(want, rel=1e-6)
    assert scores(torch.randn(9, 1), torch.randn(9), ["r2"])["r2"] < 1
    assert math.isnan(scores(torch.randn(9), torch.full((9,), 0.1), ["r2"])["r2"])


def test_what_a_set_does_not_have_is_nan():
    y = torch.zeros(5).long()
    found = scores(torch.randn(5, 3), y, CLASSES)
    assert [k for k, v in found.items() if math.isnan(v)] == ["auroc"]
    found = scores(torch.randn(5), y, ["auroc", "average_precision", "f1", "f1_macro"])
    assert [k for k, v in found.items() if math.isnan(v)] == ["auroc", "average_precision", "f1"]
    spoiled = torch.full((5, 3), math.nan)
    names = [*CLASSES, "top2", "perplexity"]
    assert all(map(math.isnan, scores(spoiled, torch.arange(5) % 3, names).values()))
    endless = torch.tensor([-math.inf, math.inf, 0.0])
    assert scores(endless, torch.tensor([0, 1, 0]), ["auroc"])["auroc"] == 1
    ignored = scores(torch.randn(5, 3), y - 100, [*CLASSES, "perplexity", "top2"])
    assert all(map(math.isnan, ignored.values()))
    assert (
        scores(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), ["perplexity"])["perplexity"]
        == math.inf
    )


@pytest.mark.parametrize(
    ("name", "output", "y", "why"),
    [
        ("auc", (4, 3), torch.arange(4) % 3, "unknown metric 'auc'; there are accuracy, .*auroc.*top5"),
        ("f1", (4, 3), torch.arange(4) % 3, "f1 is of two classes, and the model gives 3: f1_macro"),
        ("auroc", (4, 3), torch.arange(4), r"the targets go from 0 to 3, but the model gives 3"),
        ("auroc", (4, 3), torch.zeros(4, 2).long(), r"takes logits .*gives \(4, 3\) and .*int64 \(4, 2\)"),
        ("f1", (4, 2), torch.zeros(4, 2), "one logit and a target of 0 or 1 for each example"),
        ("f1_macro", (4,), torch.arange(4), "takes logits"),
        ("top2", (4,), torch.zeros(4).long(), "takes logits"),
        ("perplexity", (4, 1), torch.zeros(4).long(), "takes logits .* and classes"),
        ("r2", (4, 3), torch.zeros(4), "takes one output for each target"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(name, output, y, why):
    with pytest.raises(ConfigError, match=why):
        scores(torch.randn(output), y, [name])


def test_names_on_the_command_line_and_without_torchmetrics(monkeypatch):
    _, chosen = loss_and_metrics("classification", "auto", ["auto", "auroc", "top5"])
    assert list(chosen) == ["loss", "accuracy", "auroc", "top5"]
    with pytest.raises(
        ConfigError, match=r"unknown metric 'F1'; there are .*f1_macro.*, or give pack"
    ):
        loss_and_metrics("classification", "auto", ["F1"])
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"auroc needs .*: pip install 'fedtorch\[metrics\]'"):
        evaluate(nn.Identity(), TensorDataset(torch.zeros(1), torch.zeros(1)), ["auroc"])
    assert metrics.by_name(["perplexity", "r2", "accuracy"])["accuracy"] is accuracy


def test_metrics_of_torchmetrics_itself_gather_and_stay_as_they_were():
    from torchmetrics.classification import MulticlassF1Score, MulticlassRecall

    torch.manual_seed(5)
    output, y = torch.randn(40, 3), torch.randint(0, 3, (40,)).sort().values
    own = MulticlassF1Score(3, average="macro")
    own.update(output[:4], y[:4])
    before = own.compute()
    found = scores(output, y, {"f": own}, 6)["f"]
    assert found == pytest.approx(sk.f1_score(y, output.argmax(1), average="macro"), rel=1e-6)
    assert own.compute() == before
    with pytest.raises(
        ConfigError, match=r"recall must give one number for all examples, got \[3\]"
    ):
        scores(output, y, {"recall": MulticlassRecall(3, average=None)})


def test_before_training_a_name_is_tried_on_a_few_and_a_metric_of_others_on_all():
    from torchmetrics.classification import MulticlassF1Score

    held = TensorDataset(torch.randn(9, 3), torch.zeros(9).long())
    own = {"f": MulticlassF1Score(3)}
    chosen = own | metrics.by_name(["auroc", "top2"])
    assert metrics_fit(nn.Linear(3, 3), held, chosen) == own
    with pytest.raises(ConfigError, match="f1 is of two classes"):
        metrics_fit(nn.Linear(3, 3), held, metrics.by_name(["f1"]))
    with pytest.raises(ConfigError, match="not dict and Tensor: give evaluate a step"):
        metrics.known("auroc")({"logits": held.tensors[0]}, held.tensors[1])


def test_a_client_of_one_class_spoils_no_other():
    torch.manual_seed(6)
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    held = {"a": (x[:10], y[:10]), "b": (x[10:], torch.ones(10).long())}
    clients = [Client(i, (x, y), v) for i, v in held.items()]
    found = evaluate_clients(nn.Linear(3, 2), clients, ["auroc", "accuracy"])
    assert 0 <= found["a"]["auroc"] <= 1 and math.isnan(found["b"]["auroc"])


def test_bad_figures_are_told_from_good_ones():
    assert [metrics.worse(m) for m in (cross_entropy, mean_absolute_error, accuracy)] == [
        "high",
        "high",
        "low",
    ]
    assert [metrics.worse(metrics.known(n)) for n in ("perplexity", "auroc")] == ["high", "low"]
    assert metrics.worse(lambda o, y: o) is None
