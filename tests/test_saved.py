"""A model saved and loaded: bit for bit, with what its data were, and without what would tell of rows."""

import pytest
import torch

from conftest import mlp, weights
from fedtorch import ConfigError, Record, Server, divide, from_pandas, load
from fedtorch.saved import read
from test_run_callbacks import TEST, served

pandas = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def table():
    g = torch.Generator().manual_seed(0)
    age, dose = torch.rand(60, generator=g) * 60 + 20, torch.rand(60, generator=g)
    sick = [
        "ill" if a + 40 * d > 70 else "well"
        for a, d in zip(age.tolist(), dose.tolist(), strict=True)
    ]
    frame = pandas.DataFrame(
        {"age": age, "dose": dose, "state": sick, "site": ["a", "b", "c"] * 20}
    )
    return frame, from_pandas(frame, target="state", client="site", bounds={"age": (20, 90)})


def test_a_model_comes_back_bit_for_bit_and_gives_what_the_server_gives(tmp_path):
    server = served()
    server.fit(1, progress=False)
    server.save(tmp_path / "m.safetensors")
    trained = load(str(tmp_path / "m.safetensors"), mlp())
    assert all(torch.equal(v, weights(server.model)[k]) for k, v in weights(trained.model).items())
    assert not trained.model.training and server.model.training
    x, y = TEST
    for given in (
        x,
        x.numpy(),
        (x, y),
        torch.utils.data.TensorDataset(x, y),
        pandas.DataFrame(x.numpy()),
    ):
        assert torch.equal(trained.predict(given), server.predict(given))
        # other batches are other products, which not every processor rounds alike
        assert torch.allclose(
            trained.predict(given), server.predict(given, batch_size=7), atol=1e-6
        )
    assert trained.predict(x).shape == (40, 4)
    assert repr(trained) == "Trained(Sequential, 136 parameters)" and trained.classes == ()
    with pytest.raises(ConfigError, match=r"was not kept with this model: save it with its data"):
        trained.labels(x)
    server.fit(1, callbacks=[Record(tmp_path / "run", tracking="none")], progress=False)
    assert torch.equal(load(tmp_path / "run", mlp()).predict(x), server.predict(x))


def test_preparation_and_names_of_classes_are_kept_and_nothing_of_the_rows(tmp_path, table):
    frame, data = table
    clients, _ = divide(data)
    server = Server(mlp(data.facts["in_features"], data.facts["num_outputs"]), clients)
    server.save(tmp_path / "m.safetensors", data)
    trained = load(
        tmp_path / "m.safetensors", mlp(data.facts["in_features"], data.facts["num_outputs"])
    )
    assert trained.classes == data.preparation.classes and "classes ill, well" in repr(trained)
    # a table like the one that was trained on is prepared as that was, whatever the order of its columns
    rows = frame[["site", "dose", "age"]].head(8)
    x = torch.stack([data.train[i][0] for i in range(len(data.train))])
    scaled = trained.predict(rows)
    assert set(trained.labels(rows)) <= {"ill", "well"} and len(scaled) == 8
    ages = (torch.tensor(rows["age"].to_numpy()) - 20) / 70
    assert float(x.min()) >= -1 and torch.allclose(
        scaled, trained.predict(_as(data, ages, torch.tensor(rows["dose"].to_numpy()))), atol=1e-5
    )
    with pytest.raises(ConfigError, match="has no column 'dose', which the model was trained on"):
        trained.predict(rows.drop(columns="dose"))
    told = read(tmp_path / "m.safetensors", trained.model)["prepared"]
    assert (
        '"train": ""' in told and '"test": ""' in told and '"sizes": [0, 0], "owners": ""' in told
    )


def _as(data, age, dose):
    """Inputs as the preparation makes them, by hand."""
    done = data.preparation
    columns = {"age": age * 70 + 20, "dose": dose}
    each = [
        (columns[n].double() - m) / d
        for n, m, d in zip(done.columns, done.mean or (0, 0), done.deviation or (1, 1), strict=True)
    ]
    return torch.stack(each, 1).float()


def test_what_cannot_be_saved_or_loaded_is_one_sentence(tmp_path):
    server, path = served(), tmp_path / "m.safetensors"
    server.save(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        server.save(tmp_path / "no" / "m")
    with pytest.raises(ConfigError, match="data must be"):
        server.save(path, TEST)
    with pytest.raises(ConfigError, match="there is no such file of a model"):
        load(tmp_path / "none", mlp())
    with pytest.raises(ConfigError, match=r"cannot be used: .* size mismatch for 2\.weight"):
        load(path, mlp(classes=7))
    with pytest.raises(ConfigError, match="model must be"):
        load(path, {})
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="damaged"):
        load(path, mlp())
    for x, why in (
        (torch.zeros(3, 99), "model Sequential cannot take the inputs to predict: mat1 and mat2"),
        (torch.zeros(0, 6), "has no examples"),
        (torch.zeros(3, 6).double(), "cannot take the inputs to predict"),
        ("x.csv", "must be tensors"),
    ):
        with pytest.raises(ConfigError, match=why):
            server.predict(x)
