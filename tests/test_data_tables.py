from pathlib import Path

import numpy as np
import pytest
import torch

from fedtorch import ConfigError
from fedtorch.data import Csv, Npz, partition
from fedtorch.data.prepared import said
from fedtorch.data.scaling import by_rows


def csv(tmp_path: Path, text: str, **options: object) -> Csv:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return Csv(str(path), **options)


ROWS = "\n".join(f"{i},{i * 0.5},{'abc'[i % 3]},{i % 2}" for i in range(30))
TABLE = f"age,dose,site,sick\n{ROWS}\n"


@pytest.mark.parametrize("array", ["x_test", "y_test"])
def test_a_test_set_without_rows_is_refused(tmp_path, array):
    arrays = {"x": np.ones((4, 2)), "y": np.arange(4) % 2, "x_test": np.ones((2, 2))}
    arrays |= {"y_test": np.arange(2)}
    np.savez(tmp_path / "t.npz", **arrays | {array: arrays[array][:0]})
    with pytest.raises(ConfigError, match=f"array '{array}' must have a row for each example"):
        Npz(str(tmp_path / "t.npz")).load(0)


def test_target_client_and_features(tmp_path):
    data = csv(tmp_path, TABLE, client="site").load(0)
    assert data.kind == "classification"
    assert data.outputs == 2
    assert data.facts["in_features"] == 2
    assert len(data.train) + len(data.test) == 30 and 1 <= len(data.test) <= 14
    ids, parts = partition(data, None, None, 0)
    assert set(ids) == set("abc")
    # a row keeps its owner: age is i, and the owner is i mod 3
    ages = data.train.tensors[0][:, 0]
    assert all((ages[p] % 3 == "abc".index(k)).all() for k, p in zip(ids, parts, strict=True))


def test_the_kind_of_target_decides_the_outputs(tmp_path):
    assert csv(tmp_path, TABLE, client="site", kind="binary").load(0).facts["num_outputs"] == 1
    numbers = csv(tmp_path, TABLE, client="site", target="dose").load(0)
    assert (numbers.kind, numbers.outputs, numbers.labels) == ("regression", 1, None)


def test_standardize_uses_training_rows_alone(tmp_path):
    data = csv(tmp_path, TABLE, client="site", standardize=True).load(0)
    x = data.train.tensors[0]
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(x.std(0), torch.ones(2), atol=1e-6)
    assert not torch.allclose(data.test.tensors[0].mean(0), torch.zeros(2), atol=1e-3)


def test_two_rows_have_the_deviation_of_two():
    assert by_rows(np.array([[0.0], [2.0]]), [False]).width == pytest.approx([2**0.5])


def test_a_byte_order_mark_and_blank_lines_are_no_part_of_the_table(tmp_path):
    data = csv(tmp_path, "\ufeff" + TABLE.replace("\n", "\n\n"), client="site", target="age")
    assert data.load(0).facts["in_features"] == 2


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "is empty"),
        ("a,b\n", {}, "header but no rows"),
        ("a,b\n1,2\n3\n", {}, "line 3: 1 values, but the header names 2; the file may be cut"),
        ("a,b\n1,2\n3,x\n", {}, "line 3: column 'b' holds 'x', not a number"),
        ("a,b\n1,2\n,1\n", {}, "line 3: column 'a' holds '', not a number"),
        (TABLE, {}, "does column 'site' say who holds a row"),
        (TABLE, {"client": "ward"}, "no client column 'ward'; it has age, dose, site, sick"),
        (TABLE, {"target": "fever", "client": "site"}, "no target column 'fever'"),
        ("a\n1\n2\n", {}, "no feature columns beside 'a'"),
        ("a,a,b\n1,2,0\n1,2,1\n", {}, "names column 'a' twice"),
        ("a,b\n1,0\nnan,1\n1,0\n", {}, "line 3: column 'a' holds 'nan', not a number; a missing"),
        ("a,b\n1,0\ninf,1\n1,0\n", {}, "line 3: column 'a' holds 'inf', and numbers are at most"),
        ("a,b\n1,0\n-1e39,1\n1,0\n", {}, "line 3: column 'a' holds '-1e39', and numbers are at"),
        ("Y,a,b\n1,2,0\n", {}, "is 'Y' to be predicted, or the last column, 'b'[?] Give --dataset"),
        ("a,b\n" + "1,0\n1,1\n" * 9, {"kind": "clas"}, r"dataset\.kind must be"),
        ("a,b\n1,0\n1,2\n1,0\n", {"kind": "binary"}, "must be 0 or 1"),
        ("a,b\n" + "1,0.5\n1,2\n1,0\n" * 9, {"kind": "classification"}, "labels must be 0, 1"),
        ("a,b\n1,\0\n", {}, "not a number|line contains NUL"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, text, options, message):
    with pytest.raises(ConfigError, match=message):
        csv(tmp_path, text, **options).load(0)


def test_an_index_without_a_name_is_left_out_and_said(tmp_path):
    rows = "\n".join(f"{i},{i * 7 % 11},{'AB'[i % 2]},{i % 2}" for i in range(60))
    for first in ("", "Unnamed: 0"):
        for client in ({"client": "ward"}, {"drop": ["ward"]}):
            data = csv(tmp_path, f"{first},dose,ward,sick\n{rows}\n", **client).load(0)
            assert data.facts["in_features"] == 1
            line = said(data)
            assert "features dose" in line and "target sick" in line
            assert f"left out {first or '(a column without a name)'}" in line
            assert ("clients by ward" if "client" in client else "no column names clients") in line


def test_a_column_that_names_owners_is_asked_about_and_one_that_counts_rows_is_said(tmp_path):
    rows = "\n".join(f"{100 + i},{i % 3},{i % 7 / 7},{i % 2}" for i in range(60))
    for name in ("hospital", "Hospital_ID", "center", "site"):
        with pytest.raises(ConfigError, match=f"does column '{name}' say who holds a row"):
            csv(tmp_path, f"a,{name},b,y\n{rows}\n").load(0)
        kept = csv(tmp_path, f"a,{name},b,y\n{rows}\n", features=[name, "b"]).load(0)
        assert kept.preparation.columns == (name, "b") and kept.preparation.dropped == ("a",)
        own = csv(tmp_path, f"a,{name},b,y\n{rows}\n", client=name).load(0)
        assert own.facts["in_features"] == 2 and set(own.keys) == {"0", "1", "2"}
    left = csv(tmp_path, f"patient,ward,b,y\n{rows}\n", drop=["ward"]).load(0)
    assert "'patient' counts the rows: if it is an index, give --dataset.drop patient" in said(left)
    jumps = csv(
        tmp_path, f"patient,ward,b,y\n{rows}\n".replace("159,", "160,"), drop=["ward"]
    ).load(0)
    assert "counts the rows" not in said(jumps)


def test_an_empty_owner_and_columns_that_are_not_there_are_refused(tmp_path):
    rows = "\n".join(f"{i % 7},{'' if i == 4 else 'ab'[i % 2]},{i % 2}" for i in range(20))
    with pytest.raises(ConfigError, match="line 6: column 'who' is empty: whose row"):
        csv(tmp_path, f"a,who,y\n{rows}\n", client="who").load(0)
    with pytest.raises(ConfigError, match="no dropped column 'b'"):
        csv(tmp_path, f"a,who,y\n{rows}\n", drop=["b"]).load(0)
    with pytest.raises(ConfigError, match="no feature column 'b'"):
        csv(tmp_path, f"a,who,y\n{rows}\n", features=["b"]).load(0)


def test_names_as_targets_and_other_separators_are_said(tmp_path):
    rows = "\n".join(f"{i / 8};{'MB'[i % 2]}".replace(".", ",") for i in range(40))
    data = csv(tmp_path, f"size;diagnosis\n{rows}\n", decimal=",").load(0)
    assert (data.kind, data.outputs, data.preparation.classes) == ("classification", 2, ("B", "M"))
    sizes = torch.cat([data.train.tensors[0], data.test.tensors[0]]).flatten()
    assert sorted(sizes.tolist()) == [i / 8 for i in range(40)]
    line = said(data)
    assert "classification into 2 classes (B, M)" in line and "separated by ';'" in line
    truth = csv(tmp_path, "a,y\n" + "1,true\n2,False\n" * 9).load(0)
    assert truth.preparation.classes == (False, True)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "picture.csv").write_bytes(bytes(range(256)))
    for path in ("", "nowhere.csv", str(tmp_path), str(tmp_path / "picture.csv")):
        with pytest.raises(ConfigError, match=r"dataset\.path must be a CSV file"):
            Csv(path).load(0)


def npz(tmp_path: Path, **arrays: object) -> Npz:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, **arrays)
    return Npz(str(path))


X, Y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 4


def test_npz_with_and_without_its_own_test_set(tmp_path):
    owners = np.array(["u", "v"] * 10)
    data = npz(tmp_path, x=X, y=Y, client=owners).load(0)
    assert (len(data.train) + len(data.test), data.outputs) == (20, 4)
    assert len(data.keys) == len(data.train)
    assert set(data.keys) == {"u", "v"}
    own = npz(tmp_path, x=X, y=Y, x_test=X[:7], y_test=Y[:7], client=owners).load(0)
    assert (len(own.train), len(own.test)) == (20, 7)
    assert torch.equal(own.test.tensors[1], torch.tensor(Y[:7]))
    assert len(own.keys) == 20


IMAGES = np.random.default_rng(1).integers(0, 256, (40, 1, 6, 5))


@pytest.mark.parametrize("kind, scale", [("uint8", 255), ("uint16", 65535)])
def test_images_of_whole_numbers_are_scaled_and_it_is_said(tmp_path, kind, scale):
    images = (IMAGES * (scale // 255)).astype(kind)
    for x in (images, images[:, 0]):
        data = npz(tmp_path, x=x, y=np.arange(40) % 4).load(0)
        assert data.facts["input_shape"] == (1, 6, 5)
        pixels = torch.cat([data.train.tensors[0], data.test.tensors[0]])
        assert float(pixels.max()) <= 1 and pixels.sum() == pytest.approx(
            IMAGES.sum() / 255, rel=1e-4
        )
        assert f"divided by {scale}" in said(data) and data.preparation.pixels
    asked = npz(tmp_path, x=images.reshape(40, 30), y=np.arange(40) % 4)
    with pytest.raises(ConfigError, match=f"give --dataset.scale {scale} where it holds pixels"):
        asked.load(0)
    plain = Npz(asked.path, scale=1).load(0)
    assert float(plain.train.tensors[0].max()) > 1 and "taken as they are" in said(plain)


def test_channels_that_came_last_are_asked_about(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 6, 5, 3))
    for channels in (1, 3, 4):
        last = npz(tmp_path, x=np.zeros((40, 6, 5, channels)), y=np.arange(40) % 4)
        with pytest.raises(ConfigError, match="seems to hold its channels last"):
            last.load(0)
    path = npz(tmp_path, x=x, y=np.arange(40) % 4).path
    turned = Npz(path, channels_last=True, test_fraction=0).load(0)
    assert torch.equal(turned.train.tensors[0], torch.from_numpy(x).float().permute(0, 3, 1, 2))
    assert Npz(path, channels_last=False).load(0).facts["input_shape"] == (6, 5, 3)
    assert "--dataset.scale 255" in said(npz(tmp_path, x=IMAGES * 1.0, y=np.arange(40) % 4).load(0))


def test_yes_or_no_for_each_of_several_has_an_output_for_each(tmp_path):
    np.savez(tmp_path / "m.npz", x=X, y=np.arange(60).reshape(20, 3) % 2)
    data = Npz(str(tmp_path / "m.npz"), kind="binary").load(0)
    assert (data.outputs, data.facts["num_outputs"]) == (3, 3)


def test_what_is_made_of_inputs_and_of_targets_is_both_said(tmp_path):
    line = said(
        npz(tmp_path, x=IMAGES[:, 0].astype(np.uint8), y=np.eye(4)[np.arange(40) % 4]).load(0)
    )
    assert "get an axis for one channel" in line and "one-hot targets are read as classes" in line


def test_npz_regression_with_several_outputs(tmp_path):
    data = npz(tmp_path, x=X, y=X[:, :2] * 0.5).load(0)
    assert (data.kind, data.outputs) == ("regression", 2)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": X}, r"has no array 'y'; it has x: name them so, np\.savez"),
        ({"x": X, "y": Y[:5]}, "20 rows in x but 5 in y"),
        ({"x": X, "y": Y, "client": Y[:5]}, "20 rows in x but 5 in client"),
        ({"x": X, "y": X + 1j}, "array 'y' must hold numbers"),
        ({"x": np.array(["a"] * 20), "y": Y}, "array 'x' must hold numbers"),
        ({"x": np.array(1.0), "y": np.array(1.0)}, "array 'x' must have a row for each"),
        ({"x": X, "y": Y, "x_test": X[:3, :2], "y_test": Y[:3]}, "x_test .* shape"),
        ({"x": X, "y": Y, "x_test": X[:3], "y_test": Y[:2]}, "3 rows in x_test but 2 in y_test"),
        ({"x": np.array([object()] * 20), "y": Y}, "holds Python objects, as of rows of unequal"),
        ({"x": X, "y": Y, "client": np.array([["a"]] * 20)}, "'client' must hold a name"),
        ({"x": X, "y": Y, "client": np.array(3)}, "'client' must hold a name"),
        ({"x": X, "y": Y, "client": X[:, 0]}, "'client' must hold a name"),
        ({"x": X[:, :0], "y": Y}, "'x' must have a row for each"),
        ({"x": X, "y": Y, "x_test": X.astype("i8"), "y_test": Y}, "x is float64 but x_test int64"),
        ({"x": X, "y": Y, "x_test": X}, "has no array 'y_test'"),
        ({"x": np.where(X > 1, np.nan, X), "y": Y}, "NaN or infinite"),
    ],
)
def test_archives_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    with pytest.raises(ConfigError, match=message):
        npz(tmp_path, **arrays).load(0)


def test_damaged_archives_are_refused_and_never_half_read(tmp_path):
    whole = npz(tmp_path, x=X, y=Y)
    raw = Path(whole.path).read_bytes()
    for cut in range(0, len(raw), max(1, len(raw) // 20)):
        Path(whole.path).write_bytes(raw[:cut])
        with pytest.raises(ConfigError, match="cannot be read as an NPZ"):
            whole.load(0)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ConfigError, match="cannot be read as an NPZ"):
        Npz(str(tmp_path / "one.npy")).load(0)


def test_a_target_by_its_name_is_taken_where_it_is_last_or_the_others_are_named(tmp_path):
    rows = "\n".join(f"{i % 2},{i % 7 / 7},{i % 3 / 3}" for i in range(30))
    for options in ({"target": "a"}, {"features": ["y"]}, {"drop": ["y"]}):
        data = csv(tmp_path, f"y,a,b\n{rows}\n", **options).load(0)
        assert data.preparation.target == options.get("target", "b")
    assert csv(tmp_path, f"class,a,label\n{rows}\n").load(0).preparation.target == "label"


def test_arrays_that_are_not_read_are_said_and_may_hold_anything(tmp_path):
    path, x, y = tmp_path / "t.npz", np.ones((9, 2), "f4"), np.arange(9) % 2
    np.savez(path, x=x, y=y, about=np.array([{"made": "today"}], object), weight=x[:, 0])
    assert "arrays left out: about, weight" in said(Npz(str(path)).load(0))
    np.savez(path, x=x, y=np.array([[1], [1, 2]] * 4 + [[1]], object))
    with pytest.raises(ConfigError, match="holds Python objects"):
        Npz(str(path)).load(0)
    with pytest.raises(ConfigError, match=r"dataset\.path must be an NPZ file"):
        Npz().load(0)
    np.savez(path, x=x, y=np.stack([y, y, y], 1))
    with pytest.raises(ConfigError, match=r"the targets \[N, 3\] are whole numbers"):
        Npz(str(path)).load(0)
