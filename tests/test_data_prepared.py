"""What a run keeps of its data: what predicts does what trained, and other data are noticed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedtorch import ConfigError
from fedtorch.__main__ import main
from fedtorch.commands import given, use
from fedtorch.data import Csv, Digits, Npz, from_tensors, images
from fedtorch.data.base import Preparation
from fedtorch.data.prepared import (
    FILE,
    Prepared,
    agreed,
    load,
    resumed,
    said,
    same_names,
    undeclared,
)

PLAIN = [
    "--privacy",
    "none",
    "--clients",
    "2",
    "--partition",
    "iid",
    "--rounds",
    "1",
    "--tracking",
    "none",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def made(n: int = 12, **options: object):
    g = torch.Generator().manual_seed(n)
    x, y = torch.rand(n, 3, generator=g), torch.arange(n) % 2
    return from_tensors("made", (x[:8], y[:8]), (x[8:], y[8:]), "classification", 2, **options)


def test_what_is_kept_comes_back_for_the_owner_alone(tmp_path):
    data = made(
        preparation=Preparation(classes=("no", "yes"), scale=255, columns=("a",)),
        extra=(1, (2, "x")),
        odd=len,
    )
    kept = Prepared.of(data)
    kept.save(tmp_path)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [FILE]
    found = load(tmp_path)
    assert found == kept and found.missing == ("odd",)
    assert found.facts["input_shape"] == (3,) and found.facts["extra"] == (1, (2, "x"))
    assert found.sizes == (8, 4)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"format": "other"}', '{"format": "fedtorch data 2"}', "[" * 100_000],
    ids=range(6),
)
def test_a_damaged_record_is_named(tmp_path, text):
    assert load(tmp_path) is None
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"data\.json is damaged"):
        load(tmp_path)


def test_a_record_that_was_edited_is_not_believed(tmp_path):
    Prepared.of(made(preparation=Preparation(scale=255))).save(tmp_path)
    text = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(text.replace("255", "25"))
    with pytest.raises(ConfigError, match="its digest does not match"):
        load(tmp_path)


def test_a_resume_needs_the_same_data(tmp_path, capsys):
    resumed(tmp_path, made())
    assert "data.json is gone: whether the data are those of the run" in capsys.readouterr().out
    Prepared.of(made()).save(tmp_path)
    resumed(tmp_path, made())
    for other in (made(13), made(preparation=Preparation(scale=2))):
        with pytest.raises(ConfigError, match=r"trained on other data \(8 training and 4 test"):
            resumed(tmp_path, other)


def test_the_line_says_what_is_predicted_from_what():
    assert said(made()) == (
        "data: classification into 2 classes (0 to 1); inputs 3 taken as they are; the data name no clients"
    )
    many = made(
        preparation=Preparation(classes=tuple("abcdefghijklmnop"), scale=255, notes=("turned",))
    )
    assert "a, b, c, d, e, f, g, h, i, j, k, l, ... 16 in all" in said(many)
    assert "divided by 255" in said(many) and said(many).endswith("; turned")
    for kind, words in (("binary", "yes or no"), ("regression", "regression of 2 numbers")):
        assert words in said(replace(made(), kind=kind))


def test_classes_that_one_file_numbers_are_no_classes_of_many_sites():
    named = made(preparation=Preparation(classes=("B", "M")))
    agreed(made(), Csv())
    agreed(named, Csv(classes=["B", "M"]))
    with pytest.raises(
        ConfigError, match=r"sites must agree: give every site the same --dataset\.classes"
    ):
        agreed(named, Csv())


def test_columns_and_classes_are_those_that_sites_agreed_on_in_that_order():
    data = made(preparation=Preparation(classes=("no", "yes"), columns=("age", "chol", "sex")))
    same_names(data, ["age", "chol", "sex"], ["no", "yes"])
    same_names(data, [], [])
    same_names(made(), ["age"], ["no"])  # numbers without names
    for columns, classes, why in (
        (
            ["age", "sex", "chol"],
            [],
            "columns are in another order .*: number 2 is chol, and should be sex",
        ),
        (["age", "chol"], [], "columns are others .*: number 3 is sex, and should be not there"),
        ([], ["yes", "no"], r"classes are in another order .* \(--dataset.classes\)"),
    ):
        with pytest.raises(ConfigError, match=why):
            same_names(data, columns, classes)


def test_classes_that_the_rows_made_known_are_said_under_privacy():
    named = made(preparation=Preparation(classes=("B", "M")))
    assert "these 2 classes was read off the rows" in undeclared(named, Csv())
    assert "--dataset.classes B,M declares" in undeclared(named, Csv())
    assert "--dataset.classes 0,1 declares" in undeclared(made(), Npz())
    assert not undeclared(named, Csv(classes=["B", "M"])) and not undeclared(named, Digits())
    assert not undeclared(replace(named, kind="binary"), Csv(positive=["M"]))


RANDOM = """
import random
import numpy as np
import torch
from torch.utils.data import random_split
from fedtorch.data import from_tensors
def data():
    x = torch.arange(60.0)[:, None] / 60
    x = x + DRAW
    y = (torch.arange(60) % 2)
    a, b = (torch.tensor(list(p)) for p in random_split(range(60), [45, 15]))
    return from_tensors("mine", (x[a], y[a]), (x[b], y[b]), "classification", 2)
"""


@pytest.mark.parametrize(
    "draw", ["torch.rand(60, 1)", "random.random()", "float(np.random.rand())"]
)
def test_a_data_function_of_ones_own_draws_from_the_runs_seed(folder, capsys, draw):
    name = f"drawn{abs(hash(draw))}"
    Path(f"{name}.py").write_text(RANDOM.replace("DRAW", draw))
    data = ["--dataset", "custom", "--dataset.path", f"{name}:data", "--model", "logistic"]
    state = torch.get_rng_state()
    assert main(["train", *PLAIN, *data, "--run-dir", "run"]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    kept = load(Path("run"))
    assert main(["train", "--run-dir", "run", "--resume", "--rounds", "2", "--trust-code"]) == 0
    for seed, same in (("0", True), ("1", False)):
        assert main(["train", *PLAIN, *data, "--seed", seed, "--run-dir", f"s{seed}"]) == 0
        assert kept.same(load(Path(f"s{seed}"))) == same


def test_other_data_are_refused_on_resume_and_said_on_eval(folder, capsys):
    Path("changing.py").write_text(
        "import torch\nfrom pathlib import Path\nfrom fedtorch.data import from_tensors\n"
        "def data():\n"
        "    x = torch.arange(40.0)[:, None] / 40 + float(Path('shift').read_text())\n"
        "    y = torch.arange(40) % 2\n"
        "    return from_tensors('mine', (x[:30], y[:30]), (x[30:], y[30:]), 'classification', 2)\n"
    )
    Path("shift").write_text("0")
    data = ["--dataset", "custom", "--dataset.path", "changing:data", "--model", "logistic"]
    assert main(["train", *PLAIN, *data, "--run-dir", "run"]) == 0
    assert main(["eval", "run", "--trust-code"]) == 0
    assert "note" not in capsys.readouterr().err
    Path("shift").write_text("1")
    assert main(["train", "--run-dir", "run", "--resume", "--rounds", "2", "--trust-code"]) == 2
    assert "trained on other data" in capsys.readouterr().err
    assert main(["eval", "run", "--trust-code"]) == 0
    assert "not the data of the run" in capsys.readouterr().err


def predictions(capsys, *argv: str) -> list[dict]:
    capsys.readouterr()
    assert main(["predict", "run", *argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_table_is_predicted_by_names_and_scale_of_the_training_without_its_data(folder, capsys):
    rows = [f"{i},{i % 10 * 100},{'well' if i % 10 > 4 else 'sick'}" for i in range(200)]
    Path("t.csv").write_text("\n".join([",dose,state", *rows]) + "\n")
    data = ["--dataset", "csv", "--dataset.path", "t.csv", "--dataset.standardize", "true"]
    fit = ["--model", "logistic", "--lr", "1", "--rounds", "5", "--run-dir", "run"]
    assert main(["train", *PLAIN, *data, *fit]) == 0
    assert "left out (a column without a name)" in capsys.readouterr().out
    Path("t.csv").unlink()
    Path("new.csv").write_text("note,dose\nx,900\ny,0\n")
    assert [r["prediction"] for r in predictions(capsys, "new.csv")] == ["well", "sick"]


def test_pixels_predict_alike_in_every_file_format(folder, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 6, 6)).astype(np.uint8)
    images[::2, :, :3] //= 8
    np.savez("t.npz", x=images, y=np.where(np.arange(60) % 2, 1, -1))
    data = [
        "--dataset",
        "npz",
        "--dataset.path",
        "t.npz",
        "--model",
        "logistic",
        "--run-dir",
        "run",
    ]
    assert main(["train", *PLAIN, *data]) == 0
    np.save("raw.npy", images[:4])
    np.save("wide.npy", images[:4].astype(np.int32))
    np.save("scaled.npy", images[:4].astype(np.float32) / 255)
    Image.fromarray(images[0, 0]).save("one.png")
    want = predictions(capsys, "raw.npy")
    assert {r["prediction"] for r in want} <= {-1, 1}
    for name in ("wide.npy", "scaled.npy", "one.png"):
        for got, wanted in zip(predictions(capsys, name), want, strict=False):
            assert got == pytest.approx(wanted, rel=1e-5)
    np.save("unscaled.npy", images[:4].astype(np.float32))
    assert main(["predict", "run", "unscaled.npy"]) == 2
    assert "holds numbers beyond 0 to 1" in capsys.readouterr().err


def known(shape: tuple[int, ...], **preparation: object) -> Prepared:
    return Prepared("k", "classification", 2, {"input_shape": shape}, Preparation(**preparation))


def test_pictures_of_other_kinds_are_read_by_their_colours_or_refused(tmp_path):
    grey = np.linspace(0, 255, 16).round().astype(np.uint8).reshape(4, 4)
    images = {
        "plain": Image.fromarray(grey),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette": Image.fromarray(grey).convert("P"),
        "solid": Image.fromarray(np.dstack([grey] * 3 + [np.full_like(grey, 255)])),
    }
    shuffled = Image.fromarray(255 - grey, "P")  # the number of a colour is no brightness
    shuffled.putpalette([v for k in range(256) for v in (255 - k,) * 3])
    images["shuffled"] = shuffled
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
        found = given.examples(known((1, 4, 4), pixels=True), tmp_path / f"{name}.png")
        assert torch.allclose(found[0, 0], torch.from_numpy(grey / 255.0).float(), atol=0.005), name
    clear = Image.fromarray(np.dstack([grey] * 4))
    clear.save(tmp_path / "clear.png")
    with pytest.raises(ConfigError, match="see-through"):
        given.examples(known((1, 4, 4), pixels=True), tmp_path / "clear.png")
    for shape, options, message in (
        ((1, 4, 4), {}, "not trained on images in 0..1"),
        ((16,), {"pixels": True}, "which is no image"),
        ((3, 4, 4), {"pixels": True}, "which has no largest value"),
    ):
        name = "deep" if shape[0] == 3 else "plain"
        with pytest.raises(ConfigError, match=message):
            given.examples(known(shape, **options), tmp_path / f"{name}.png")


@pytest.mark.parametrize(
    "shape, x, message",
    [
        ((1, 4, 4), np.full((2, 1, 4, 4), 200, np.uint8), "up to 200, but .* images in 0 to 1"),
        ((1, 4, 4), np.full((2, 1, 4, 4), 200.0), "up to 200, but .* images in 0 to 1"),
        ((1, 4, 4), np.full((2, 1, 4, 4), np.nan), "NaN or infinite"),
        ((3,), np.array([[1, np.inf, 2.0]]), "NaN or infinite"),
        ((3, 4, 4), np.ones((6, 4, 4)), r"\[6, 4, 4\]; the model takes examples of \[3, 4, 4\]"),
        ((3, 4, 4), np.ones((6, 1, 4, 4)), "takes examples of"),
    ],
)
def test_arrays_that_are_not_what_the_model_was_trained_on_are_refused(shape, x, message, tmp_path):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ConfigError, match=message):
        given.examples(known(shape, pixels=len(shape) == 3), tmp_path / "x.npy")


TABLE = {
    "shares": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3),
    "bytes": np.arange(12, dtype=np.uint8).reshape(4, 3) * 20,
    "deep": np.arange(12, dtype=np.uint16).reshape(4, 3) * 5000,
    "measured": np.linspace(-2, 3, 12).reshape(4, 3),
    "bits": np.eye(4, 3, dtype=np.uint8),
}


@pytest.mark.parametrize(
    "was, scale, now, said",
    [
        (
            "shares",
            1,
            TABLE["bytes"],
            "holds whole numbers .up to 220.*trained on fractions of 0 to 1",
        ),
        ("shares", 1, TABLE["bytes"].astype(np.float64), "trained on fractions of 0 to 1"),
        ("measured", 1, TABLE["bytes"], "trained on fractions: give"),
        ("bytes", 1, TABLE["shares"], "holds fractions of 0 to 1.*trained on whole numbers"),
        ("bytes", 1, TABLE["measured"], "trained on whole numbers"),
        ("bits", 1, TABLE["shares"], "trained on whole numbers"),
        (
            "bytes",
            255,
            TABLE["bytes"] * 1.5,
            "beyond 0 to 1: the model trained on uint8 divided by 255",
        ),
        ("bytes", 255, TABLE["deep"].astype(np.int64), "beyond 0 to 255"),
        ("bytes", 255, TABLE["deep"], "holds uint16, but the model was trained on uint8 divided"),
        ("deep", 65535, TABLE["bytes"], "holds uint8, but the model was trained on uint16 divided"),
        ("shares", 1, TABLE["bits"], ""),
        ("measured", 1, TABLE["bytes"] - 0.5, ""),
        ("measured", 1, TABLE["shares"], ""),
        ("bytes", 1, TABLE["deep"], ""),
        ("bytes", 255, TABLE["bytes"].astype(np.int64), ""),
        ("bytes", 255, TABLE["shares"], ""),
    ],
)
def test_a_table_of_numbers_in_other_units_is_refused(was, scale, now, said, tmp_path, capsys):
    x, done = images.inputs("t.npz", TABLE[was], scale, None)
    np.save(tmp_path / "x.npy", now)
    kept = Prepared("k", "classification", 2, {"input_shape": (3,)}, done)
    if said:
        with pytest.raises(ConfigError, match=said):
            given.examples(kept, tmp_path / "x.npy")
        return
    found = given.examples(kept, tmp_path / "x.npy")
    divided = scale != 1 and now.dtype.kind == "f"
    want = torch.from_numpy(now.astype(np.float32) / (1 if divided else scale))
    assert found.dtype == x.dtype and torch.allclose(found, want)
    assert ("divided by 255 already" in capsys.readouterr().err) == divided


def test_vocabulary_codes_are_not_scaled_in_any_file_format(tmp_path):
    _, done = images.inputs("t.npz", np.array([[1, 2], [3, 0]]), None, None)
    kept = Prepared("k", "classification", 2, {"input_shape": (2,)}, done)
    for name, x in (("u", np.array([[3, 1]], np.uint8)), ("f", np.array([[3.0, 1.0]]))):
        np.save(tmp_path / f"{name}.npy", x)
        assert given.examples(kept, tmp_path / f"{name}.npy").tolist() == [[3, 1]]


def test_a_csv_table_in_other_units_is_refused(tmp_path):
    for trained, asked, why in (
        ("0.5,0.1\n0.25,1", "128,20", "fractions of 0 to 1"),
        ("128,20\n9,3", "0.5,0.1", "trained on whole numbers"),
        ("128,20\n9,3", "128.5,20", None),
        ("0.5,2.1\n0.25,1", "3,4", None),
    ):
        rows = [f"{row},{i % 2}" for i, row in enumerate(trained.split("\n") * 20)]
        (tmp_path / "t.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")
        (tmp_path / "new.csv").write_text(f"a,b\n{asked}\n")
        kept = Prepared.of(Csv(str(tmp_path / "t.csv")).load(0))
        if why is None:
            assert given.examples(kept, tmp_path / "new.csv").shape == (1, 2)
            continue
        with pytest.raises(ConfigError, match=why):
            given.examples(kept, tmp_path / "new.csv")


def test_grey_images_may_lack_the_axis_of_their_channel(tmp_path):
    x = np.random.default_rng(0).random((2, 4, 4))
    for name, array in (("many", x), ("one", x[0]), ("full", x[:, None])):
        np.save(tmp_path / f"{name}.npy", array)
        found = given.examples(known((1, 4, 4), pixels=True), tmp_path / f"{name}.npy")
        assert torch.equal(found[0, 0], torch.from_numpy(x[0]).float()), name


def test_a_table_with_numbers_that_are_none_is_not_predicted(tmp_path):
    for value, message in (
        ("nan", "line 3: column 'a' holds a missing value"),
        ("inf", "NaN or infinite"),
    ):
        (tmp_path / "x.csv").write_text(f"a,b\n1,2\n{value},3\n")
        with pytest.raises(ConfigError, match=message):
            given.examples(known((2,), columns=("a", "b")), tmp_path / "x.csv")


def test_whole_numbers_are_scaled_where_the_model_has_no_vocabulary():
    path, x = Path("x.npy"), torch.tensor([[1, 2]])
    linear = torch.nn.Linear(2, 3)
    assert torch.equal(use.outputs(linear, x, path)[0], linear(x.float()))
    table = torch.nn.Embedding(4, 3)
    assert torch.equal(use.outputs(table, x, path)[0], table(x))
    with pytest.raises(ConfigError, match=r"x\.npy: the model cannot take its examples \[1, 2\]"):
        use.outputs(torch.nn.Linear(5, 3), x, path)


def test_arrays_with_the_channels_last_are_turned_as_in_training(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 4, 6, 3))
    np.save(tmp_path / "x.npy", x)
    found = given.examples(known((3, 4, 6), channels_last=True), tmp_path / "x.npy")
    assert torch.equal(found, torch.from_numpy(x).float().permute(0, 3, 1, 2))
    np.save(tmp_path / "bad.npy", np.array(["a"]))
    with pytest.raises(ConfigError, match="must hold numbers"):
        given.examples(known((3, 4, 6)), tmp_path / "bad.npy")
    with pytest.raises(ConfigError, match="inputs of its own kind"):
        given.examples(known(()), tmp_path / "x.npy")


def test_a_run_without_a_central_test_trains_is_used_and_goes_on(folder, capsys):
    np.savez("t.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
    data = "--dataset npz --dataset.path t.npz --dataset.test-fraction 0 --model logistic --validation 0.3"
    fit = ["--privacy", "none", "--clients", "2", "--rounds", "1", "--run-dir", "run"]
    assert main(["train", *fit, *data.split()]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["test_loss"] is None and load(Path("run")).sizes == (40, 0)
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert "test_loss" not in last and last["validation_loss"] > 0
    assert main(["train", "--run-dir", "run", "--resume", "--rounds", "2"]) == 0
    assert main(["eval", "run"]) == 0
    assert "validation loss" in capsys.readouterr().out


def test_bundled_data_say_their_scale(tmp_path):
    digits = Digits().load(0)
    assert "divided by 16" in said(digits) and digits.preparation.pixels
    np.savez(tmp_path / "t.npz", x=np.arange(60).reshape(30, 2), y=np.arange(30) % 3)
    assert "inputs 2 taken as they are" in said(Npz(str(tmp_path / "t.npz")).load(0))


def test_a_client_whose_name_looks_like_markup_is_shown_as_it_is(fedtorch):
    rows = [f"{i / 60},{['[ICU]', '[/red]', 'w'][i % 3]},{i % 2}" for i in range(60)]
    Path("t.csv").write_text("\n".join(["a,h,y", *rows]) + "\n")
    data = "--dataset csv --dataset.path t.csv --dataset.client h --clients null --model logistic"
    code, out, err = fedtorch(
        "train", "--privacy", "none", "--tracking", "none", "--rounds", 1, *data.split()
    )
    assert (code, err) == (0, "")
    assert "[ICU]" in out and "[/red]" in out
    line = "inputs 1 taken as they are; features a; target y; clients by h"
    assert f"data: classification into 2 classes (0 to 1); {line}" in out


def test_a_record_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / FILE).write_text("{}")
    monkeypatch.setattr(type(tmp_path), "read_text", closed)
    with pytest.raises(ConfigError, match=r"data\.json cannot be read: Permission denied"):
        load(tmp_path)
