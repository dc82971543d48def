"""Whatever PyTorch users hold data in becomes the same batches, or one error with a fix that works."""

from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    StackDataset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fedtorch import Client, ConfigError, Recipe, Server, evaluate
from fedtorch.data import Data
from fedtorch.data.base import subset
from fedtorch.privacy import SampleLevel
from fedtorch.training.batches import Collated, fetch
from fedtorch.training.datasets import as_dataset
from fedtorch.tree import leaves

X = torch.arange(24.0).view(8, 3)
Y = torch.arange(8) % 2
INDEX = torch.tensor([6, 1, 1, 3])


def table() -> pd.DataFrame:
    made = pd.DataFrame(X.numpy(), columns=["age", "dose", "weight"])
    return made.assign(sick=Y.numpy())


PAIRS = {
    "tensors": (X, Y),
    "a list of two": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "arrays of other order in memory": (np.asfortranarray(X.numpy()), Y.numpy()[::-1][::-1]),
    "arrays of another byte order": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "a DataFrame and a Series": (table()[["age", "dose", "weight"]], table()["sick"]),
    "TensorDataset": TensorDataset(X, Y),
    "StackDataset": StackDataset(X, Y),
    "a list of examples": [*zip(X, Y, strict=True)],
    "DataLoader": DataLoader(TensorDataset(X, Y), 4, shuffle=True),
}


@pytest.mark.parametrize("data", PAIRS.values(), ids=PAIRS)
def test_pairs_of_every_kind_are_the_same_batch(data):
    x, y = fetch(as_dataset(data, "client a"), INDEX)
    assert torch.equal(x, X[INDEX]) and torch.equal(y, Y[INDEX])
    assert x.dtype == torch.float32 and y.dtype == torch.int64


def hugging_face(**columns: object) -> Dataset:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict(columns)


def nestings() -> dict[str, object]:
    plain = hugging_face(x=X.tolist(), y=Y.tolist())
    return {
        "a dict": {"x": X, "y": Y.numpy()},
        "a dict of Series": {"x": X, "y": table()["sick"]},
        "StackDataset": StackDataset(x=X, y=Y),
        "Hugging Face": plain,
        "Hugging Face in torch's format": plain.with_format("torch"),
        "a list of dicts": [{"x": a, "y": b} for a, b in zip(X, Y, strict=True)],
    }


@pytest.mark.parametrize("kind", ["a dict", "a dict of Series", "StackDataset", "Hugging Face",
                                  "Hugging Face in torch's format", "a list of dicts"])  # fmt: skip
def test_columns_by_name_are_a_batch_by_name(kind):
    batch = fetch(as_dataset(nestings()[kind], "client a"), INDEX)
    assert [*batch] == ["x", "y"]
    assert torch.equal(batch["x"], X[INDEX]) and torch.equal(batch["y"], Y[INDEX])


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "data",
    [
        ({"cat": X.long(), "cont": X}, Y),
        ((X, {"mask": Y}), Y),
        (Pair(X, X + 1), Y),
        (X, X + 1, Y),
        StackDataset(StackDataset(X, Y), TensorDataset(X, Y)),
        (X,),
    ],
    ids=["dict", "inner dict", "named tuple", "three", "stacked", "one"],
)
def test_nestings_come_as_a_loader_would_collate_them(data):
    made = as_dataset(data, "client a")
    batch, other = fetch(made, INDEX), default_collate([made[i] for i in INDEX.tolist()])
    assert len(leaves(batch)) == len(leaves(other)) > 0
    assert all(map(torch.equal, leaves(batch), leaves(other)))
    assert [len(t) for t in leaves(fetch(made, INDEX[:0]))] == [0] * len(leaves(other))


def test_one_tensor_is_a_dataset_of_its_rows():
    for data in (X, X.numpy()):
        assert torch.equal(fetch(as_dataset(data, "client a"), INDEX), X[INDEX])


def test_arrays_are_copied_and_no_type_is_changed():
    x = X.numpy().astype("float64")
    x.setflags(write=False)
    data = as_dataset((x, Y.numpy().astype("int8")), "client a")
    assert [t.dtype for t in data.tensors] == [torch.float64, torch.int8]
    data.tensors[0].zero_()
    assert x[-1, -1] == 23


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class StreamOfLength(Stream):
    def __len__(self) -> int:
        return 8


def pad(items):
    return pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])


def refused() -> dict[str, tuple[object, str]]:
    loader = DataLoader(TensorDataset(X, Y), 4)
    words = table().assign(city="Bern", since=pd.Timestamp("2020-01-01"))
    some = pd.Series([1, None] * 4, dtype="Int64", name="sick")
    shuffled = table().sample(frac=1, random_state=0)
    text = hugging_face(text=["a", "b"], label=[0, 1])
    parts = __import__("datasets").DatasetDict(train=text)
    return {
        "stream": (Stream(), r"give list\(data\)"),
        "stream of a length": (StreamOfLength(), r"give list\(data\)"),
        "generator": (iter([1]), r"give list\(data\)"),
        "text column": ((words[["age", "city"]], Y), "column 'city' holds .*encode it as numbers"),
        "dates": ((words[["since"]], Y), "column 'since' holds dates"),
        "missing": ((X, some), "column 'sick' has missing values: fill"),
        "text": ((X, np.array(["a", "b"] * 4)), "holds <U1 .*encode it"),
        "objects": ((X, np.array([{}] * 8)), "holds object"),
        "masked": ((np.ma.masked_invalid(X.numpy()), Y), "fill it first"),
        "longdouble": ((X.numpy().astype("longdouble"), Y), "astype"),
        "frame": (table(), r"give \(df\[inputs\], df\[target\]\)"),
        "labels": ((table()[["age"]], shuffled["sick"]), r"reset_index\(drop=True\)"),
        "hf text": (text, r"remove_columns\('text'\)"),
        "hf parts": (parts, r"has parts \(train\): give one"),
        "numbers": (3, "data must be tensors|not map-style"),
        "nested": (
            (torch.nested.nested_tensor([*X], layout=torch.jagged), Y),
            "are nested: give a list .* collate=",
        ),
        "sparse": ((X.to_sparse(), Y), "are sparse: give them dense"),
        "no rows": ((torch.tensor(1.0), torch.tensor(2)), "one row each"),
        "stream in a loader": (DataLoader(Stream(), 2), r"give list\(data\)"),
        "whole batches": (DataLoader(TensorDataset(X, Y), None), "single examples"),
        "batch sampler": (
            DataLoader(TensorDataset(X, Y), batch_sampler=[[0, 1], [2, 3]]),
            r"sampler=fn\(seed, round\)",
        ),
        "worker_init_fn": (
            DataLoader(TensorDataset(X, Y), 4, worker_init_fn=print),
            "leave it out",
        ),
        "nothing": (loader.dataset.tensors[:0], "one row each"),
    }


@pytest.mark.parametrize("kind", refused())
def test_what_cannot_be_taken_is_refused_by_name_with_the_fix(kind):
    data, message = refused()[kind]
    for take in (lambda d: Client("a", d), lambda d: evaluate(nn.Linear(3, 2), d, {})):
        with pytest.raises(ConfigError, match=message):
            take(data)


def test_a_loader_is_taken_apart_and_what_would_be_lost_is_refused():
    data = [*zip(X, Y, strict=True)]
    client = Client("a", DataLoader(data, 4, True, collate_fn=pad, num_workers=2))
    assert isinstance(client.data, Collated) and client.data.num_workers == 2
    assert client.data.collate is pad and client.sampler is None and len(client) == 8
    explicit = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False))
    assert Client("a", explicit).data is data
    with pytest.raises(ConfigError, match="give one of the two"):
        Client("a", DataLoader(data, 4, collate_fn=pad), collate=pad)
    weighted = WeightedRandomSampler([1.0] * 8, 5)
    assert Client("a", DataLoader(data, 4, sampler=weighted)).sampler is weighted
    with pytest.raises(ConfigError, match="give one of the two"):
        Client("a", DataLoader(data, 4, sampler=weighted), sampler=lambda seed, round: [0])
    for loader in (DataLoader(data, 3, drop_last=True), DataLoader(data, 4, sampler=weighted)):
        with pytest.raises(ConfigError, match="would change the figure"):
            Client("a", data, validation=loader)


def test_numbers_of_another_type_than_the_model_s_are_named_with_the_fix():
    frame, double = table().astype("float64")[["age", "dose", "weight"]], X.numpy().astype("f8")
    model = nn.Linear(3, 2)
    for x in (frame, double, X.double()):
        for take in (
            lambda: Server(model, [Client("a", (x, Y))]),  # noqa: B023
            lambda: evaluate(model, (x, Y), ["accuracy"]),  # noqa: B023
        ):
            with pytest.raises(
                ConfigError, match=r"holds float64 and .* float32: .*astype\('float32'\)"
            ):
                take()
    server = Server(model, [Client("a", (frame.astype("float32"), table()["sick"]))])
    assert server.round()["examples"] == 8
    assert Server(nn.Linear(3, 2).double(), [Client("a", (double, Y))]).round()["examples"] == 8
    codes = pd.Series(["ill", "well"] * 4).astype("category").cat.codes
    with pytest.raises(ConfigError, match=r"labels are int8, and classes must be int64"):
        Server(model, [Client("a", (X, codes))])
    assert Server(model, [Client("a", (X, codes.astype("int64")))]).round()["examples"] == 8


@pytest.mark.parametrize("privacy", [None, SampleLevel(noise_multiplier=1.0, rounds=1)], ids=str)
def test_examples_of_unequal_size_are_told_that_they_need_a_collate(privacy):
    ragged = [(torch.zeros(2 + k % 2), 0) for k in range(6)]
    with pytest.raises(ConfigError, match=r"client a: .*Client\(\.\.\., collate=fn\)"):
        Server(nn.Linear(2, 2), [Client("a", ragged)], Recipe(privacy=privacy))


def test_a_test_set_is_read_ahead_and_judged_alike():
    model = nn.Linear(3, 2)
    plain = evaluate(model, (X, Y), ["accuracy", "auroc"], batch_size=3)
    loader = DataLoader([*zip(X, Y, strict=True)], num_workers=1)
    assert isinstance(as_dataset(loader, "a"), Collated)
    assert type(as_dataset(DataLoader(TensorDataset(X, Y), num_workers=1), "a")) is TensorDataset
    assert evaluate(model, loader, ["accuracy", "auroc"], batch_size=3) == plain


def test_data_of_ones_own_may_come_in_loaders():
    loader = DataLoader([*zip(X, Y, strict=True)], collate_fn=pad)
    data = Data("mine", loader, loader, "classification", 2)
    part = subset(data.train, torch.tensor([1, 2]))
    assert isinstance(part, Collated) and part.collate is pad and len(part) == 2
    with pytest.raises(ConfigError, match=r"mine, train examples: .*give list\(data\)"):
        Data("mine", Stream(), loader, "classification", 2)
