import json
import sys

import numpy as np
import pytest

from fedtorch import ConfigError
from fedtorch.data import Custom, HuggingFace, hub, partition
from fedtorch.data.hub import _array
from fedtorch.options import find


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    pytest.importorskip("datasets")
    return tmp_path


def write(folder, rows: int) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        json.dumps({"features": [i * 0.1, 1.0], "label": i % 3, "ward": f"w{i % 2}"})
        for i in range(rows)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines))


def test_a_local_folder_loads_without_a_network(offline):
    write(offline / "clinic", 30)
    data = HuggingFace(str(offline / "clinic"), x="features", client="ward").load(0)
    assert (len(data.train) + len(data.test), data.outputs) == (30, 3) and len(data.test) < 15
    ids, parts = partition(data, None, None, 0)
    assert sorted(ids) == ["w0", "w1"]
    rows = data.train.tensors[0][parts[ids.index("w0")]][:, 0]
    assert all(round(float(v) * 10) % 2 == 0 for v in rows)


def test_a_folder_of_pictures_becomes_image_tensors(offline):
    image = pytest.importorskip("PIL.Image")
    for part, n in (("train", 6), ("test", 2)):
        for k in range(n):
            folder = offline / "pictures" / part / ("dark" if k % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (5, 4), (0, 0, 0) if k % 2 else (255, 128, 0)).save(
                folder / f"{k}.png"
            )
    data = HuggingFace(str(offline / "pictures")).load(0)
    assert (len(data.train), len(data.test), data.outputs) == (6, 2, 2)
    assert data.facts["input_shape"] == (3, 4, 5)
    x, y = data.train.tensors
    # class folders are numbered by name: dark is 0, light is 1
    assert all(float(v[0].mean()) == float(label) for v, label in zip(x, y, strict=True))
    assert float(x.max()) == 1.0


@pytest.mark.parametrize("parts", [("train", "test"), ("train",), ("alone",), ("validation",)])
def test_a_folder_that_save_to_disk_wrote_is_loaded(offline, parts):
    import datasets

    label = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(x=datasets.List(datasets.Value("float32")), label=label)
    rows = {"x": [[float(k), 1.0] for k in range(20)], "label": [k % 2 for k in range(20)]}
    made = datasets.Dataset.from_dict(rows, features)
    path = str(offline / "saved")
    (
        made if parts == ("alone",) else datasets.DatasetDict(dict.fromkeys(parts, made))
    ).save_to_disk(path)
    if parts == ("validation",):
        with pytest.raises(ConfigError, match="has no part 'train'; it has validation"):
            HuggingFace(path, x="x").load(0)
        return
    data = HuggingFace(path, x="x").load(0)
    assert len(data.train) + len(data.test) == (40 if "test" in parts else 20)
    assert data.preparation.classes == ("cat", "dog") and data.name == "saved"


@pytest.mark.parametrize(
    "labels, classes, first",
    [
        (["b", "a", "b"], ("a", "b"), 1),
        ([True, False, True], (False, True), 1),
        ([3, 1, 3], (1, 3), 1),
    ],
    ids=["names", "truth", "gaps"],
)
def test_labels_may_be_names(offline, labels, classes, first):
    lines = [json.dumps({"x": [float(k)], "y": labels[k % 3]}) for k in range(12)]
    (offline / "named").mkdir()
    (offline / "named" / "train.jsonl").write_text("\n".join(lines))
    data = HuggingFace(str(offline / "named"), x="x", y="y", test_fraction=0.0).load(0)
    assert (data.preparation.classes, data.outputs) == (classes, 2)
    assert int(data.train.tensors[1][0]) == first


def test_a_picture_of_any_kind_is_read_by_its_colours():
    image = pytest.importorskip("PIL.Image")
    grey = image.fromarray(np.array([[5, 200]], np.uint8))
    for mode in ("L", "1", "P", "RGB", "RGBA", "LA"):
        made, read = grey.convert(mode), _array(grey.convert(mode))
        assert read.dtype == np.uint8 and read.shape == ((1, 2) if mode in "L1" else (1, 2, 3))
        assert np.array_equal(read, np.asarray(made.convert("L" if read.ndim == 2 else "RGB")))
    for dtype in (np.uint16, np.int32):  # as Pillow holds sixteen bits
        deep = _array(image.fromarray(np.array([[7, 65535]], dtype)))
        assert (deep.dtype, deep.tolist()) == (np.uint16, [[7, 65535]])
    for wrong in (-1, 65536):
        with pytest.raises(ValueError, match="goes beyond 16 bits"):
            _array(image.fromarray(np.array([[7, wrong]], np.int32)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"x": "pixels"}, "no column 'pixels'; it has features, label, ward"),
        ({"x": "features", "y": "features"}, "column 'features' must hold a class for each"),
        ({"x": "ward"}, "column 'ward' must hold images or lists of numbers"),
    ],
)
def test_columns_that_do_not_fit_are_refused(offline, options, message):
    write(offline / "clinic", 12)
    with pytest.raises(ConfigError, match=message):
        HuggingFace(str(offline / "clinic"), **options).load(0)


def test_a_name_that_cannot_be_loaded_is_one_sentence(offline):
    with pytest.raises(
        ConfigError, match=r"'no/such' cannot be loaded: .* \(is this machine online"
    ):
        HuggingFace("no/such").load(0)


def test_a_dataset_without_a_name_is_asked_for(offline):
    with pytest.raises(ConfigError, match="which dataset, by its name on the hub or its folder"):
        HuggingFace().load(0)


def test_without_the_extra_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(ConfigError, match=r"pip install 'fedtorch\[hf\]'"):
        HuggingFace("x").load(0)


def test_custom_data_comes_from_a_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ward_data.py").write_text(
        "import torch\n"
        "from fedtorch.data import from_tensors\n"
        "def load():\n"
        "    x, y = torch.randn(20, 2), torch.arange(20) % 2\n"
        "    return from_tensors('ward', (x, y), (x, y), 'classification', 2)\n"
        "def wrong():\n"
        "    return 3\n"
        "def broken():\n"
        "    raise OSError('disk is gone')\n"
    )
    assert Custom("ward_data:load").load(0).name == "ward"
    with pytest.raises(ConfigError, match=r"must return fedtorch\.data\.Data, not int"):
        Custom("ward_data:wrong").load(0)
    with pytest.raises(ConfigError, match="ward_data:broken failed: OSError: disk is gone"):
        Custom("ward_data:broken").load(0)


@pytest.mark.parametrize("path", ["", "nothing", "no.such.module", "json:nothing", "a b:c", ":x"])
def test_paths_to_nowhere_are_refused(path):
    with pytest.raises(ConfigError, match="cannot import"):
        find(path)


def test_a_module_that_fails_to_import_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_written.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"cannot import 'half_written:f': SyntaxError"):
        find("half_written:f")
