import gzip

import pytest

from fedtorch import ConfigError
from fedtorch.data import Csv

ROWS = [f"{i / 40:.3f},{i % 7},{i % 2}" for i in range(40)]


def load(path, text, **options):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Csv(str(path), test_fraction=0.0, **options).load(0)


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ("1,234", "thousands .* take the signs out; or, if it is a decimal comma"),
        ("1,234,567.5", "thousands that are set apart. take the signs out"),
        ("1'234", "thousands that are set apart"),
        ("0,5", r"a decimal comma\?"),
        ("12%", r"take its sign out of the column, or .*--dataset\.drop a"),
        ("$12.50", "take its sign out"),
        ("<5", "take its sign out"),
        ("2020-01-31", "a date or time"),
        (".", r"missing value: --dataset\.na '\.'"),
    ],
)
@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
def test_what_is_meant_as_a_number_is_told_the_fix(tmp_path, value, fix, every):
    if every and value == ".":  # a column of nothing but one name is one of categories
        fix = "--dataset.categories"
    rows = [f'"{value}",{k % 7},{k % 2}' if every or k == 4 else r for k, r in enumerate(ROWS)]
    with pytest.raises(ConfigError, match=fix):
        load(tmp_path / "t.csv", "\n".join(["a,b,y", *rows]))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (gzip.compress(b"a,b\n1,2"), "compressed by gzip: unpack it first"),
        (b"PK\x03\x04" + bytes(30), "a zip archive, as spreadsheets are: save the table as CSV"),
        ('[{"a": 1}]', "JSON: save the table as CSV, or give a data frame"),
        ("<html>404</html>", "a page, or XML"),
        ("sep=;\na;b\n1;2", r"line 1 is a spreadsheet's mark.* --dataset\.separator ';'"),
        ("# by hand\na,b\n1,2", "line 1 looks like a remark: take such lines out"),
        ("a,a,y\n1,2,0", "names column 'a' twice: give each a name of its own"),
        ("a,b,y,\n1,2,0,", "column 4 has no name; .* take out what ends each line"),
    ],
    ids=["gzip", "zip", "json", "page", "sep", "remark", "twice", "comma"],
)
def test_what_is_no_table_is_told_what_it_is(tmp_path, text, why):
    with pytest.raises(ConfigError, match=why):
        load(tmp_path / "t.csv", text)


def test_a_target_is_told_what_fits_a_target(tmp_path):
    gap = "\n".join(["a,b,y", *ROWS, "1,2,"])
    with pytest.raises(ConfigError, match=r"missing drop leaves such rows out$"):
        load(tmp_path / "t.csv", gap)
    assert len(load(tmp_path / "t.csv", gap, missing="drop").train) == 40
    mixed = "\n".join(["a,b,y", *ROWS, "1,2,other"])
    with pytest.raises(ConfigError, match=r"where 'y' holds classes give --dataset\.kind class"):
        load(tmp_path / "t.csv", mixed)
    found = load(tmp_path / "t.csv", mixed, kind="classification")
    assert found.preparation.classes == ("0", "1", "other")


def test_a_single_training_row_is_still_a_row(tmp_path):
    (tmp_path / "held.csv").write_text("a,b,y\n3,4,0\n5,6,1")
    data = load(tmp_path / "t.csv", "a,b,y\n1,2,0", test=str(tmp_path / "held.csv"))
    assert data.train.tensors[0].tolist() == [[1.0, 2.0]]
