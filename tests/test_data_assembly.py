"""Tables as people have them: categories, missing values, bounds, several files, new rows."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtorch import ConfigError
from fedtorch.__main__ import main
from fedtorch.data import Csv, assembly, from_pandas, prepared
from fedtorch.data.prepared import covered, said
from tests.conftest import SHARED

ROWS = [
    f"{20 + i % 50},{'abc'[i % 3]},{'Yes' if i % 5 else 'no'},{200 + i},{i % 2}" for i in range(40)
]
TABLE = "age,ward,smoker,chol,sick\n" + "\n".join(ROWS) + "\n"
WARDS = {"categories": ["ward=a|b|c"]}


def csv(tmp_path: Path, text: str = TABLE, **options: object) -> Csv:
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return Csv(str(path), **options)


def every(data) -> torch.Tensor:
    """Inputs of train and test, sorted by rows."""
    x = torch.cat([data.train.tensors[0], data.test.tensors[0]])
    return x[np.lexsort(x.T.flip(0).numpy())]


def holes(*cells: tuple[int, int]) -> str:
    """The table with some cells missing: (row, column)."""
    rows = [r.split(",") for r in ROWS]
    for i, j in cells:
        rows[i][j] = "?"
    return "age,ward,smoker,chol,sick\n" + "\n".join(map(",".join, rows)) + "\n"


def test_declared_categories_are_one_input_each_and_one_for_any_other(tmp_path):
    options = {"categories": ["ward=a|b"], "features": ["ward"], "test_fraction": 0}
    data = csv(tmp_path, **options).load(0)
    wanted = torch.eye(3)[torch.arange(40) % 3]
    assert torch.equal(data.train.tensors[0], wanted)
    assert "ward is a, b or other" in said(data)
    numbers = csv(tmp_path, "cp,y\n" + "1.0,0\n2,1\n3,0\n" * 9, categories=["cp=1|2|3"])
    assert torch.equal(every(numbers.load(0)).sum(0), torch.tensor([9.0, 9.0, 9.0, 0.0]))


def test_names_that_nobody_declared_are_asked_for_with_the_answer_at_hand(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'ward' holds names .* --dataset.categories 'ward=a\|b\|c'"
    ):
        csv(tmp_path).load(0)
    found = csv(tmp_path, categories=["found"]).load(0)
    assert found.facts["in_features"] == 1 + 4 + 1 + 1
    with pytest.raises(ConfigError, match=r"the categories of ward .* voids the privacy claim"):
        covered(found.preparation)
    commas = '?,"x, y",no,1,0\n' + "\n".join(ROWS).replace(",a,", ',"x, y",').partition("\n")[2]
    with pytest.raises(
        ConfigError, match=r"such as 'x, y'.*categories = \['ward=b\|c\|x, y'\] under"
    ):
        csv(tmp_path, "age,ward,smoker,chol,sick\n" + commas).load(0)
    covered(csv(tmp_path, **WARDS).load(0).preparation)
    with pytest.raises(ConfigError, match="sites must agree: give every site the same"):
        prepared.agreed(found, Csv(classes=["0", "1"]))
    with pytest.raises(ConfigError, match="names 'site', which is no feature"):
        csv(tmp_path, categories=["site=a|b"]).load(0)
    many = "name,a,y\n" + "\n".join(f"p{i},{i % 3},{i % 2}" for i in range(60))
    with pytest.raises(
        ConfigError, match=r"60 different names such as .p0., too many .*--dataset.drop name"
    ):
        csv(tmp_path, many).load(0)


def test_truth_is_a_number_and_a_date_is_refused_by_name(tmp_path):
    data = csv(tmp_path, features=["smoker"], test_fraction=0).load(0)
    assert data.train.tensors[0].flatten().tolist() == [float(i % 5 > 0) for i in range(40)]
    assert "smoker: true or yes is 1, false or no is 0" in said(data)
    mixed = csv(tmp_path, features=["age", "smoker"], test_fraction=0).load(0)
    assert "; smoker: true or yes is 1" in said(mixed)
    dates = TABLE.replace("age", "admitted").replace("\n2", "\n2021-03-2")
    with pytest.raises(
        ConfigError, match=r"line 2: column 'admitted' holds '2021.*--dataset.drop admitted"
    ):
        csv(tmp_path, dates, **WARDS).load(0)
    with pytest.raises(ConfigError, match="line 3: column 'age' holds '2l', not a number; encode"):
        csv(tmp_path, TABLE.replace("\n21", "\n2l"), **WARDS).load(0)


def test_a_decimal_comma_is_no_name(tmp_path):
    rows = "\n".join(f"{i},5;{i % 3};{i % 2}" for i in range(40))
    with pytest.raises(
        ConfigError, match=r"column 'age' holds '0,5', not a number; a decimal comma"
    ):
        csv(tmp_path, f"age;a;sick\n{rows}").load(0)
    assert csv(tmp_path, f"age;a;sick\n{rows}", decimal=",").load(0).facts["in_features"] == 2


def test_missing_values_are_refused_dropped_filled_or_marked(tmp_path):
    text = holes((3, 0), (7, 1), (7, 3))
    for at, column, lacks in (
        ((3, 0), "age", "holds .* a missing value: --dataset.missing drop"),
        ((7, 1), "ward", "lacks a category; --dataset.missing indicator"),
        ((9, 4), "sick", "holds .* a missing value: --dataset.missing drop"),
    ):
        with pytest.raises(ConfigError, match=f"line {at[0] + 2}: column '{column}' {lacks}"):
            csv(tmp_path, holes(at), **WARDS).load(0)
    dropped = csv(tmp_path, holes((3, 0), (7, 1), (9, 4)), **WARDS, missing="drop", client="smoker")
    data = dropped.load(0)
    assert len(every(data)) == 37 and len(data.keys) == len(data.train)
    assert "rows that lack a value are left out" in said(data)
    covered(data.preparation)
    for how, of in (("mean", np.mean), ("median", np.median)):
        data = csv(tmp_path, text, **WARDS, missing=how, test_fraction=0).load(0)
        x = data.train.tensors[0]
        assert x[3, 0] == pytest.approx(of([20 + i for i in range(40) if i != 3]))
        assert x[7, 1:5].tolist() == [0, 0, 0, 1]  # another ward
        with pytest.raises(
            ConfigError, match=f"the {how} of age, smoker, chol .* voids the privacy claim"
        ):
            covered(data.preparation)
        public = csv(tmp_path, text, **WARDS, missing=how, fill=["age=50", "chol=240", "smoker=1"])
        covered(public.load(0).preparation)
    marked = csv(
        tmp_path, text, **WARDS, missing="indicator", bounds=["age=0:100"], test_fraction=0
    )
    x = marked.load(0).train.tensors[0]
    assert (
        x.shape[1] == 4 + 3 * 2
        and x[3, :2].tolist() == [0, 1]
        and x[4, :2].tolist() == pytest.approx([-0.52, 0])
    )
    covered(marked.load(0).preparation)
    filled = csv(tmp_path, holes((3, 0)), **WARDS, fill=["age=51"], test_fraction=0).load(0)
    assert filled.train.tensors[0][3, 0] == 51 and "missing age is 51" in said(filled)
    with pytest.raises(ConfigError, match="every row lacks a value"):
        csv(tmp_path, "a,b,y\n1,?,0\n?,2,1\n", missing="drop").load(0)


def test_public_bounds_scale_and_columns_far_apart_are_named(tmp_path):
    data = csv(tmp_path, **WARDS, bounds=["age=20:60", "chol=100:300"], test_fraction=0).load(0)
    x = data.train.tensors[0]
    assert torch.allclose(x[:, 0], (torch.arange(40.0) - 20) / 20)
    assert torch.allclose(x[:, -1], torch.arange(40.0) / 100)
    assert "inputs 7 with age, chol scaled by public bounds" in said(data)
    wide = "rate,income,y\n" + "\n".join(f"{i / 10},{i * 1e4},{i % 2}" for i in range(30))
    line = said(csv(tmp_path, wide).load(0))
    assert "income is over 1,000 times as large as 'rate'" in line and "income=LOW:HIGH" in line
    assert "over 1,000" not in said(csv(tmp_path, wide, bounds=["income=0:3e5"]).load(0))
    assert "over 1,000" not in said(csv(tmp_path, wide).load(0), strict=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bounds": ["age=20"]}, "dataset.bounds age=20 must be two numbers"),
        ({"bounds": ["age=9:2"]}, "dataset.bounds age=9:2 must be two numbers"),
        ({"bounds": ["age"]}, "dataset.bounds must read age=20:90"),
        ({"bounds": ["ward=0:1"]}, "names 'ward', which is no column of numbers"),
        ({"fill": ["age=x"]}, "dataset.fill age must be a number"),
        ({"fill": ["ward=1"]}, "names 'ward', which is no column of numbers"),
        ({"standardize": True, "bounds": ["age=0:9"]}, "both scale: give one"),
        ({"standardize": "private"}, "needs a rough public range"),
        ({"standardize": "perhaps"}, "dataset.standardize must be"),
        ({"missing": "zero"}, "dataset.missing must be"),
        ({"positive": ["2"]}, "no row's 'sick' is 2"),
        ({"positive": ["1"], "kind": "regression"}, "leave out dataset.classes and regression"),
        ({"test": "nowhere.csv"}, "dataset.test must be a CSV file"),
        ({"drop": ["sick"]}, "is what is to be predicted, and dataset.drop leaves out that column"),
        ({"client": "sick"}, "is what is to be predicted, and dataset.client takes"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        csv(tmp_path, **WARDS, **options).load(0)


def test_values_that_mean_yes(tmp_path):
    rows = "\n".join(f"{i % 7},{i % 5}" for i in range(50))
    data = csv(tmp_path, f"a,num\n{rows}", positive=["1.0", "2", "3", "4"], test_fraction=0).load(0)
    assert (data.kind, data.preparation.classes) == ("binary", ("no", "yes"))
    assert data.train.tensors[1].tolist() == [float(i % 5 > 0) for i in range(50)]
    two = csv(tmp_path, f"a,num\n{rows}", positive=["4"], kind="classification").load(0)
    assert (two.kind, two.outputs) == ("classification", 2)
    odd = csv(tmp_path, f"a,num\n{rows}", positive=["4", "5", "yse"]).load(0)
    assert "no row's 'num' is 5 or yse (dataset.positive)" in odd.preparation.remarks
    assert not data.preparation.remarks


def test_several_files_are_a_client_each_and_a_test_file_is_the_test(tmp_path):
    for k, name in enumerate(("north", "south")):
        (tmp_path / f"{name}.csv").write_text(
            "a,b,y\n" + "\n".join(f"{i},{k},{i % 2}" for i in range(9))
        )
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "held.data").write_text("y,b,a\n" + "1,5,7\n0,6,8\n")
    for path in (str(tmp_path / "*.csv"), str(tmp_path / "[ns]o*.csv")):
        data = Csv(path, test=str(tmp_path / "held.data"), target="y").load(0)
        assert set(data.keys) == {"north", "south"} and "clients by file" in said(data)
        owners = [{"north": 0.0, "south": 1.0}[k] for k in data.keys]
        assert data.train.tensors[0][:, 1].tolist() == owners
        assert data.test.tensors[0].tolist() == [[7, 5], [8, 6]]
        assert data.test.tensors[1].tolist() == [1, 0]
    assert len(every(Csv(str(tmp_path), target="y").load(0))) == 20
    with pytest.raises(ConfigError, match="no file is called so"):
        Csv(str(tmp_path / "*.tsv")).load(0)
    (tmp_path / "south.csv").write_text("a,c,y\n1,2,0\n")
    with pytest.raises(
        ConfigError, match=r"south.csv does not have the columns of .*north.csv: b, c"
    ):
        Csv(str(tmp_path / "*.csv")).load(0)
    (tmp_path / "south.csv").write_text("a,b,y\n1,2,0\n1,two,0\n")
    with pytest.raises(ConfigError, match=r"south.csv, line 3: column 'b' holds 'two'"):
        Csv(str(tmp_path / "*.csv")).load(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"the folder .* has none"):
        Csv(str(tmp_path / "empty")).load(0)


def test_new_rows_are_prepared_as_the_training_was(tmp_path):
    options = dict(WARDS, missing="indicator", bounds=["age=20:60"], test_fraction=0)
    text = holes((3, 0), (7, 1))
    data = csv(tmp_path, text, **options).load(0)
    new = tmp_path / "new.csv"
    new.write_text(
        "sick;chol;ward;age;smoker\n"
        + "".join(
            f"0;{r[3]};{r[1]};{r[0]};{r[2]}\n"
            for r in (line.split(",") for line in text.splitlines()[1:])
        )
    )
    assert torch.equal(assembly.unlabelled(new, data.preparation), data.train.tensors[0])
    named = csv(
        tmp_path,
        text.partition("\n")[2],
        **options,
        columns=["age", "ward", "smoker", "chol", "sick"],
    ).load(0)
    body = [line.split(",") for line in text.splitlines()[1:]]
    short, whole = [",".join(r[:-1]) for r in body], [",".join(r) for r in body]
    head = "age,ward,smoker,chol"
    for lines in (short, whole, [head, *short], [f"{head},sick", *whole]):
        new.write_text("\n".join(lines))
        assert torch.equal(assembly.unlabelled(new, named.preparation), named.train.tensors[0])
    new.write_text("age,ward\n1,a\n")
    with pytest.raises(ConfigError, match="has no column 'smoker', which the model was trained on"):
        assembly.unlabelled(new, named.preparation)
    dropped = csv(tmp_path, text, **WARDS, missing="drop").load(0).preparation
    new.write_text("age,ward,smoker,chol\n30,?,no,200\n")
    with pytest.raises(
        ConfigError, match=r"line 2: column 'ward' .* a missing value, .* leave the row out"
    ):
        assembly.unlabelled(new, dropped)
    new.write_text('age,ward,smoker,chol\n"30,5",a,no,200\n')  # no option of a run helps there
    with pytest.raises(ConfigError, match=r"not a number; new rows are read as .* with a point"):
        assembly.unlabelled(new, dropped)


def test_a_data_frame_has_the_options_of_a_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(csv(tmp_path).path)
    frame["smoker"] = frame["smoker"] == "Yes"
    frame.loc[3, "age"] = float("nan")
    options = {
        "bounds": {"age": (20, 60)},
        "fill": {"age": 40},
        "test_fraction": 0,
        "client": "sick",
    }
    data = from_pandas(
        frame, target="chol", kind="regression", categories={"ward": "abc"}, **options
    )
    x = data.train.tensors[0]
    assert (
        x.shape == (40, 6)
        and x[3, 0] == 0
        and x[4].tolist() == pytest.approx([-0.8, 0, 1, 0, 0, 1])
    )
    assert set(data.keys) == {"0", "1"} and data.train.tensors[1][2] == 202
    frame["ward"] = pandas.Categorical(frame["ward"], ["c", "b", "a"])
    frame["sick"] = pandas.Categorical(np.where(frame["sick"] == 1, "ill", "well"), ["well", "ill"])
    typed = from_pandas(frame.set_index(frame.index + 5), fill={"age": 40}, test=frame.iloc[:7])
    assert typed.preparation.classes == ("well", "ill") and len(typed.test) == 7
    assert typed.preparation.categories[1] == ("c", "b", "a")
    with pytest.raises(
        ConfigError, match=r"the data frame, row 3: column 'age' .* a missing value"
    ):
        from_pandas(frame)
    with pytest.raises(ConfigError, match="from_pandas has no option 'path'"):
        from_pandas(frame, path="x")
    with pytest.raises(ConfigError, match="a data frame is asked for, but got a list"):
        from_pandas([1, 2])
    frame["when"] = pandas.Timestamp("2021-01-01")
    with pytest.raises(ConfigError, match=r"column 'when' holds '2021-01-01 00:00:00'.* a date"):
        from_pandas(frame, target="sick", fill={"age": 40})


def test_what_a_data_frame_leaves_missing_or_sets_apart_is_not_guessed():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [0.5, 1.5, 2.5] * 8, "y": [0, 1, 1] * 8})
    odd = frame.assign(w=pandas.Categorical(["x|y", "z", "z"] * 8))
    with pytest.raises(
        ConfigError, match=r"column 'w' has a category 'x\|y', and \| sets .* apart"
    ):
        from_pandas(odd, target="y")
    with pytest.raises(ConfigError, match=r"column 'w' has a category 'x\|y'"):
        from_pandas(odd.assign(w=odd.w.astype(str)), target="y", categories={"w": ["x|y", "z"]})
    holders = frame.assign(who=pandas.array([None, 1, 2] * 8, dtype="Int64"))
    with pytest.raises(ConfigError, match=r"row 0: column 'who' holds '<NA>', a missing .* whose"):
        from_pandas(holders, target="y", client="who")
    with pytest.raises(ConfigError, match=r"'1 days 02:00:00', not a number; a date or time"):
        from_pandas(frame.assign(t=pandas.to_timedelta([26] * 24, unit="h")), target="y")


def test_an_index_with_a_name_is_not_what_a_parquet_file_predicts(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": [0.5, 1.5] * 9, "y": [0, 1] * 9, "ward": [7, 7, 8] * 6})
    frame.set_index("ward").to_parquet(tmp_path / "t.parquet")
    data = Csv(str(tmp_path / "t.parquet"), test_fraction=0).load(0)
    assert data.train.tensors[0].tolist() == frame[["ward", "a"]].to_numpy().tolist()
    assert data.train.tensors[1].tolist() == frame["y"].tolist()


def test_a_parquet_file_is_the_table_it_was_written_from(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv(csv(tmp_path).path)
    frame.to_parquet(tmp_path / "t.parquet")
    one = Csv(str(tmp_path / "t.parquet"), **WARDS).load(0)
    two = csv(tmp_path, **WARDS).load(0)
    assert torch.equal(one.train.tensors[0], two.train.tensors[0])
    assert torch.equal(one.test.tensors[1], two.test.tensors[1])
    assert torch.equal(
        assembly.unlabelled(tmp_path / "t.parquet", one.preparation),
        assembly.unlabelled(tmp_path / "table.csv", one.preparation),
    )
    frame.index = [7 * i % 41 for i in range(40)]
    frame.to_parquet(tmp_path / "t.parquet")
    indexed = Csv(str(tmp_path / "t.parquet"), **WARDS).load(0)
    assert torch.equal(indexed.train.tensors[0], two.train.tensors[0])
    assert "pandas' index is left out" in said(indexed)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match="must be a parquet file"):
        Csv(str(tmp_path / "bad.parquet")).load(0)


@pytest.mark.skipif(
    not (SHARED / "heart-disease").is_dir(), reason="the heart disease files are not there"
)
def test_the_pages_command_goes_from_four_hospitals_files_to_a_private_model(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("heart").mkdir()
    for file in (SHARED / "heart-disease").glob("*.data"):  # as they are downloaded
        (Path("heart") / file.name).write_text(file.read_text().replace("NaN", "?"))
    page = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text()
    command = page[page.index("fedtorch train --dataset csv --dataset.path 'heart") :]
    words = shlex.split(command[: command.index("```")].replace("\\\n", " "))
    assert main([*words[1:], "--run-dir", "r", "--tracking", "none"]) == 0
    said = capsys.readouterr().out
    assert "clients by file" in said and "age, trestbps, chol, thalach, oldpeak scaled" in said
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["clients"] == 4 and summary["epsilon"] <= 8
    assert summary["test_accuracy"] > 0.65  # 0.78 in the mean over seeds, deviation 0.02
    rows = json.loads(Path("r/data.json").read_text())["sizes"]
    assert sum(rows) == 740  # without a missing value in the ten columns
    Path("new.csv").write_text(
        "63,1,4,140,260,0,1,112,1,3,2,?,?\n29,0,2,120,210,0,0,170,0,0,1,?,?\n"
    )
    assert main(["predict", "r", "new.csv", "--json"]) == 0
    old, young = map(json.loads, capsys.readouterr().out.splitlines())
    assert old["prediction"] in ("yes", "no") and old["probability"] > young["probability"]
