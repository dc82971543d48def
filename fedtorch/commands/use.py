"""``fedtorch eval`` and ``fedtorch predict``: a trained model put to use."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtorch import assemble, cli, runs, saved, trust
from fedtorch.commands.options import words_and_options
from fedtorch.commands.runs import tell
from fedtorch.commands.train import train_module
from fedtorch.data import Csv, Data, partition
from fedtorch.evaluate import evaluate, evaluate_clients
from fedtorch.privacy.run import mark
from fedtorch.solvers import forward
from fedtorch.types import ConfigError

TRUST = trust.FLAG.removeprefix("--")
LENGTH = 200
"""Characters a text model adds unless told otherwise."""


@dataclass(frozen=True)
class Trained:
    """A run's options, its data and its model."""

    config: Any
    data: Data
    model: nn.Module


def trained(folder: str, trusted: bool) -> Trained:
    """Raises ConfigError when the folder holds no run, one that has not come to its end, or code of others.

    ``trusted``: import what its config names.
    """
    train = train_module()
    tell([run := saved.load(folder)])
    table = cli.read(run.folder / "config.toml")
    if not trusted:
        trust.check(table, {}, f"the run in {folder}")
        trust.inside(Path(folder), table)
    config = cli.build(train.Config, table)
    data = config.dataset.load(config.seed)
    model = train.make_model(config, data)
    runs.read_model(Path(folder), model)
    return Trained(config, data, model.eval())


def evaluate_run(argv: Sequence[str]) -> int:
    """Loss and metrics on the test set, and on the clients' validation data where there is some."""
    words, given = words_and_options(argv, "eval", {"json": False, TRUST: False})
    if len(words) != 1:
        raise ConfigError(f"fedtorch eval takes one run folder, but got {len(words)}")
    run = trained(words[0], TRUST in given)
    config, data = run.config, run.data
    _, metrics = assemble.loss_and_metrics(data.kind, config.loss, config.metrics)
    figures = {f"test_{k}": v for k, v in evaluate(run.model, data.test, metrics).items()}
    private = config.privacy
    if config.validation and not (
        private and private.strict
    ):  # the clients' own rows are not covered
        ids, parts = partition(data, config.partition, config.clients, config.seed)
        clients = assemble.clients(data, ids, parts, config.validation, config.seed)
        of_clients = assemble.validation(evaluate_clients(run.model, clients, metrics))
        figures |= mark(private, of_clients) if private else of_clients
    if "json" in given:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{k.replace('_', ' '):<28} {v:.4f}" for k, v in figures.items()))
    return 0


def predict(argv: Sequence[str]) -> int:
    """A prediction for each example of a file; a text model writes on."""
    words, given = words_and_options(argv, "predict", {"json": False, "length": True, TRUST: False})
    if len(words) != 2:
        raise ConfigError(f"fedtorch predict takes a run folder and a file, but got {len(words)}")
    run, path = trained(words[0], TRUST in given), Path(words[1])
    if "vocabulary" in run.data.facts:
        more = write_on(run, _text(path), _whole(given.get("length", str(LENGTH))))
        print(json.dumps({"continuation": more}) if "json" in given else more)
        return 0
    x = examples(run, path)
    with torch.no_grad():
        output = torch.cat([forward(run.model, part) for part in x.split(512)])
    for row in described(output, run.data.kind):
        print(json.dumps(row) if "json" in given else row["prediction"])
    return 0


def described(output: Tensor, kind: str) -> list[dict[str, Any]]:
    """The class and its probability, or the number predicted."""
    if kind == "classification":
        chance, label = output.softmax(1).max(1)
        pairs = zip(label.tolist(), chance.tolist(), strict=True)
        return [{"prediction": y, "probability": p} for y, p in pairs]
    values = output.flatten(1).squeeze(-1)
    if kind == "binary":
        return [{"prediction": int(p > 0.5), "probability": p} for p in values.sigmoid().tolist()]
    return [{"prediction": v} for v in values.tolist()]


def examples(run: Trained, path: Path) -> Tensor:
    """The file's examples as the model takes them, [N, ...]."""
    shape = tuple(run.data.facts["input_shape"])
    if isinstance(run.config.dataset, Csv):
        return run.config.dataset.unlabelled(path, run.config.seed)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                array = archive["x"]
        elif path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp"):
            array = picture(path, shape)
        else:
            raise ConfigError(
                f"{path}: this run takes .npy, .npz (array x), or images .png, .jpg, .bmp"
            )
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from e
    x = torch.from_numpy(np.ascontiguousarray(array))
    x = x if x.dtype == torch.int64 else x.float()
    if x.numel() == 0 or x.numel() % math.prod(shape) or x.shape[-1:] != shape[-1:]:
        raise ConfigError(
            f"{path} holds {list(x.shape)}; the model takes examples of {list(shape)}"
        )
    return x.reshape(-1, *shape)


def picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An image scaled to what the model takes, in 0..1; light on dark, as the training data."""
    from PIL import Image

    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"{path}: the model takes {list(shape)}, which is no image")
    with Image.open(path) as image:
        sized = image.convert("L" if shape[0] == 1 else "RGB").resize((shape[2], shape[1]))
    array = np.asarray(sized, np.float32) / 255
    return array[None] if shape[0] == 1 else array.transpose(2, 0, 1)


def write_on(run: Trained, start: str, length: int) -> str:
    """The most likely next character, again and again."""
    vocabulary = run.data.facts["vocabulary"]
    unknown = sorted(set(start) - set(vocabulary))
    if unknown or not start:
        what = f"characters the model never saw: {unknown[:5]}" if unknown else "no text"
        raise ConfigError(f"the file to write on from has {what}")
    codes = [vocabulary.index(c) for c in start]
    window = run.data.facts["input_shape"][0]
    with torch.no_grad():
        for _ in range(length):
            output = forward(run.model, torch.tensor([codes[-window:]]))
            codes.append(int(output[0, :, -1].argmax()))
    return "".join(vocabulary[c] for c in codes[len(start) :])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read as text: {e}") from e


def _whole(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--length must be a whole number of at least 1, got {text!r}")
    return int(text)
