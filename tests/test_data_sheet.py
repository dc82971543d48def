import numpy as np
import pytest

from fedtorch import ConfigError
from fedtorch.data import separated
from fedtorch.data.sheet import Format


def file(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", ", ", "; "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_and_spaces_around_values(tmp_path, separator, end):
    lines = [["a", "b", "y"], ["1.5", "2", "no"], ["-3e2", "+.5", "yes"]]
    text = end.join(separator.join(line) for line in lines)
    found = separated.read(file(tmp_path, text))
    assert found.header == lines[0] and found.rows == lines[1:] and found.lines == [2, 3]
    assert found.numbers("b").tolist() == [2.0, 0.5] and found.numbers("a").tolist() == [
        1.5,
        -300.0,
    ]
    said = [] if separator[0] == "," else [f"columns are separated by {separator.strip(' ')!r}"]
    assert list(found.notes) == said


def test_a_name_with_an_accent_a_mark_of_byte_order_and_blank_lines(tmp_path):
    found = separated.read(file(tmp_path, "\ufeff\u00e2ge,y\n\n1,2\n \n3,4\n"))
    assert found.header == ["\u00e2ge", "y"] and found.column("y") == ["2", "4"]


def test_decimal_commas_where_they_are_said(tmp_path):
    path = file(tmp_path, "a;y\n0,25;1\n7;0\n")
    assert separated.read(path, Format(decimal=",")).numbers("a").tolist() == [0.25, 7.0]
    with pytest.raises(
        ConfigError, match=r"'0,25', not a number; a decimal comma.*--dataset.decimal"
    ):
        separated.read(path).numbers("a")
    with pytest.raises(ConfigError, match=r"dataset\.decimal must be"):
        separated.read(path, Format(decimal="x"))


@pytest.mark.parametrize("text", ["1_0", "\uff11\uff12", "0x10", "1,5", "one", "True", "1e", "--1"])
def test_what_is_no_number_is_named_with_its_line(tmp_path, text):
    path = file(tmp_path, f'a,y\n1,0\n"{text}",1\n')
    with pytest.raises(ConfigError, match=r"line 3: column 'a' holds .* not a number"):
        separated.read(path).numbers("a")


@pytest.mark.parametrize("mark", ["", "?", "NA", "null", "-", "NaN", "#N/A", "<NA>"])
def test_a_missing_value_is_called_one(tmp_path, mark):
    found = separated.read(file(tmp_path, f"a,y\n1,0\n{mark},1\n"))
    assert np.isnan(found.numbers("a")).tolist() == [False, True]
    assert "a missing value: --dataset.missing drop" in str(found.wrong(1, "a", mark))
    more = separated.read(file(tmp_path, "a,y\n-9,0\n"), Format(na=("-9",)))
    assert np.isnan(more.numbers("a")).all()


@pytest.mark.parametrize("day", ["2021-03-04", "4.3.2021", "04/03/21", "2021-03-04T10:00", "10:30"])
def test_a_date_is_called_one(tmp_path, day):
    with pytest.raises(ConfigError, match=r"line 2: column 'a' .* a date or time: .*drop a"):
        separated.read(file(tmp_path, f"a,y\n{day},0\n")).numbers("a")


@pytest.mark.parametrize(
    "text",
    [
        "0.37,11.7,20,1\n0.74,10,26,0\n",
        "1,2,3\n4,5,6\n",
        "0,1,2\n4,5,6\n",
        "63.0,1.0,1.0,?,1.0\n67.0,1.0,4.0,2,0\n",
        "5.1,3.5,setosa\n4.9,3.0,setosa\n6,3,virginica\n",
        "M,old,yes\nF,old,no\nF,new,yes\nM,new,no\n",
    ],
)
def test_a_first_line_that_is_an_example_is_no_header(tmp_path, text):
    with pytest.raises(ConfigError, match="has no header: its first line reads"):
        separated.read(file(tmp_path, text))


def test_numbers_may_be_part_of_names(tmp_path):
    for header in ("0,1,y", "age,2020,2021,y", ",a,y"):
        width = header.count(",") + 1
        assert separated.read(
            file(tmp_path, f"{header}\n" + ",".join("7" * width))
        ).header == header.split(",")


def test_other_encodings_are_named_or_known_by_their_mark(tmp_path):
    path = file(tmp_path, "\u00e2ge,y\n1,2\n", "latin-1")
    with pytest.raises(ConfigError, match=r"CSV file in UTF-8: .*give --dataset.encoding latin-1"):
        separated.read(path)
    found = separated.read(path, Format(encoding="latin-1"))
    assert found.header == ["\u00e2ge", "y"] and found.notes == ("read as latin-1",)
    marked = separated.read(file(tmp_path, "\u00e2ge\ty\n1\t2\n", "utf-16"))
    assert marked.header == ["\u00e2ge", "y"] and "read as utf-16" in marked.notes
    with pytest.raises(ConfigError, match=r"dataset.encoding 'klingon'"):
        separated.read(path, Format(encoding="klingon"))
    with pytest.raises(ConfigError, match=r"CSV file in ascii: .*; save it as UTF-8"):
        separated.read(path, Format(encoding="ascii"))


@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("separator", [";", "\t", "|", "  ", " "])
def test_files_without_a_header_are_read_by_the_names_given(tmp_path, separator, decimal):
    names = ("a", "b", "y")
    lines = [
        [f"{i},25" if decimal == "," else f"{i}.25", str(i % 7), "NPA"[i % 3]] for i in range(70)
    ]
    path = file(tmp_path, "\n".join(separator.join(line) for line in lines))
    if decimal == ".":
        with pytest.raises(
            ConfigError, match=r"has no header: .* its 3 columns .*--dataset.columns"
        ):
            separated.read(path)
    found = separated.read(path, Format(columns=names, decimal=decimal))
    assert found.header == [*names] and len(found.rows) == 70 and found.lines[0] == 1
    assert found.numbers("a").tolist() == [i + 0.25 for i in range(70)]
    assert "columns are separated by" in found.notes[0]
    with pytest.raises(ConfigError, match=r"line 1: 3 values, but dataset.columns names 2"):
        separated.read(path, Format(columns=names[:2], decimal=decimal))


def test_separators_that_are_given_and_quoted_ones(tmp_path):
    path = file(tmp_path, 'a;b;y\n1;"x; y";0\n2;"p\nq; r";1\n')
    assert separated.read(path).column("b") == ["x; y", "p\nq; r"]
    assert separated.read(path, Format(separator=";")).header == ["a", "b", "y"]
    with pytest.raises(ConfigError, match=r"dataset.separator must be one character"):
        Format(separator="ab")
    with pytest.raises(
        ConfigError, match=r"dataset.columns must name each column once, but has 'a'"
    ):
        Format(columns=("a", "a"))
    named = file(tmp_path, "a,y\n1,0\n")
    with pytest.raises(ConfigError, match="names its columns in its first line: leave out"):
        separated.read(named, Format(columns=("a", "y")))


def test_other_columns_without_a_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="column 3 has no name"):
        separated.read(file(tmp_path, "a,y,\n1,2,\n"))


def test_columns_of_plain_numbers_are_those_that_are_looked_at_one_by_one(tmp_path):
    cells = ["1", "+.5", "-3e2", "2E-3", "7.", "-0"]
    plain = separated.read(file(tmp_path, "a,y\n" + "".join(f"{c},0\n" for c in cells)))
    mixed = separated.read(
        file(tmp_path, "a,y\n" + "".join(f"{c},0\n" for c in [*cells, "inf", "?"]))
    )
    assert (
        plain.plain("a").tolist() == mixed.numbers("a")[:6].tolist() == [1, 0.5, -300, 0.002, 7, 0]
    )
    assert mixed.plain("a") is None
    for odd in ("1e", "--1", "e5", ".", "1-2"):
        with pytest.raises(ConfigError, match=r"line 3: column 'a' holds .* not a number"):
            separated.read(file(tmp_path, f"a,y\n1,0\n{odd},1\n")).numbers("a")


def test_lines_of_several_lengths_are_cut_by_what_the_first_has_most_of():
    assert separated.guessed("a;b;c\n1;2\n3\n") == ";"
    assert separated.guessed("a\n1\n") == ","
