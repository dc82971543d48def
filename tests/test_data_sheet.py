import pytest

from fedtorch import ConfigError
from fedtorch.data import sheet


def file(tmp_path, text: str, encoding: str = "utf-8"):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t", ", ", "; "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_and_spaces_around_values(tmp_path, separator, end):
    lines = [["a", "b", "y"], ["1.5", "2", "no"], ["-3e2", "+.5", "yes"]]
    text = end.join(separator.join(line) for line in lines)
    found = sheet.read(file(tmp_path, text))
    assert found.header == lines[0] and found.rows == lines[1:] and found.lines == [2, 3]
    assert found.numbers(["b", "a"]) == [[2.0, 1.5], [0.5, -300.0]]
    assert found.separator == separator.strip(" ")


def test_a_name_with_an_accent_a_mark_of_byte_order_and_blank_lines(tmp_path):
    found = sheet.read(file(tmp_path, "\ufeff\u00e2ge,y\n\n1,2\n \n3,4\n"))
    assert found.header == ["\u00e2ge", "y"] and found.column("y") == ["2", "4"]


def test_decimal_commas_where_they_are_said(tmp_path):
    path = file(tmp_path, "a;y\n0,25;1\n7;0\n")
    assert sheet.read(path, ",").numbers(["a"]) == [[0.25], [7.0]]
    with pytest.raises(
        ConfigError, match=r"'0,25', not a number; a decimal comma.*--dataset.decimal"
    ):
        sheet.read(path).numbers(["a"])
    with pytest.raises(ConfigError, match=r"dataset\.decimal must be"):
        sheet.read(path, "x")


@pytest.mark.parametrize("text", ["1_0", "\uff11\uff12", "0x10", "1,5", "one", "True", "1e", "--1"])
def test_what_is_no_number_is_named_with_its_line(tmp_path, text):
    path = file(tmp_path, f'a,y\n1,0\n"{text}",1\n')
    with pytest.raises(ConfigError, match=r"line 3: column 'a' holds .* not a number"):
        sheet.read(path).numbers(["a"])


@pytest.mark.parametrize("mark", ["", "?", "NA", "null", "-"])
def test_a_missing_value_is_called_one(tmp_path, mark):
    with pytest.raises(ConfigError, match="missing value: fill it or drop that row"):
        sheet.read(file(tmp_path, f"a,y\n1,0\n{mark},1\n")).numbers(["a"])


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
        sheet.read(file(tmp_path, text))


def test_numbers_may_be_part_of_names(tmp_path):
    for header in ("0,1,y", "age,2020,2021,y", ",a,y"):
        width = header.count(",") + 1
        assert sheet.read(
            file(tmp_path, f"{header}\n" + ",".join("7" * width))
        ).header == header.split(",")


@pytest.mark.parametrize("encoding, hint", [("utf-16", "UTF-16"), ("latin-1", "Latin-1")])
def test_other_encodings_are_named(tmp_path, encoding, hint):
    with pytest.raises(ConfigError, match=f"CSV file in UTF-8: .*{hint}.*: save it as UTF-8"):
        sheet.read(file(tmp_path, "\u00e2ge,y\n1,2\n", encoding))


def test_other_columns_without_a_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="column 3 has no name"):
        sheet.read(file(tmp_path, "a,y,\n1,2,\n"))
