"""A trained model put to use: what a run folder gives back, and ``fedtorch predict``."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedtorch import disk
from fedtorch.commands.given import examples, pictures_in
from fedtorch.commands.options import words_and_options
from fedtorch.commands.runs import print_damaged
from fedtorch.commands.train import train_module
from fedtorch.data import Data, prepared, tokens
from fedtorch.data.prepared import Prepared
from fedtorch.data.text import BYTES, as_bytes
from fedtorch.run import cli, files, objects, results, trust
from fedtorch.run.folder import MADE_BY
from fedtorch.training.module import forward
from fedtorch.tree import joined, leaves, parts
from fedtorch.types import ConfigError

TRUST = trust.FLAG.removeprefix("--")
LENGTH = 200
"""Characters a text model adds unless told otherwise."""


Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Trained:
    """A run's options, what it knows of its data, and its model."""

    config: Any
    known: Prepared
    model: nn.Module
    loaded: Data | None = None
    """The data themselves, where they were asked for or the model cannot be built without them."""

    @property
    def data(self) -> Data:
        """The data, which were asked for."""
        assert self.loaded is not None
        return self.loaded


def trained(
    folder: str,
    trusted: bool = False,
    load: bool = True,
    judged: bool = False,
    again: bool = False,
    path: str = "",
) -> Trained:
    """Raises ConfigError when the folder holds no run, one that has not come to its end, or code of others.

    ``trusted``: import what its config names. ``load``: the data too, which may have gone. ``judged``: its
    loss and metrics will be imported as well; ``again``: all that training imports. ``path``: where the
    data lie by now.
    """
    train = train_module()
    print_damaged([run := results.load(folder)])
    if MADE_BY in run.options:
        raise ConfigError(
            f"the run in {folder} was made in Python, where its model is: fedtorch.load({folder!r}, model)"
        )
    if isinstance(run.options.get("sites"), list):
        raise ConfigError(
            f"the run in {folder} is a federation's, and how examples are prepared is known at its sites "
            f"alone: fedtorch.load({folder!r}, model) gives the model, for examples prepared as theirs"
        )
    table = cli.read(run.folder / "config.toml")
    table = cli.merge(table, {"dataset": {"path": path}}) if path else table
    if not trusted:
        own = trust.remembered(run.folder / "config.toml")
        later = {"optimizer"} if judged else {"optimizer", "loss", "metrics", "step", "eval_step"}
        imported = {k: v for k, v in table.items() if again or k not in later}
        named = {"model": train.Config.model} | imported
        trust.check(named, {}, f"the run in {folder}", own)
    config = objects.construct(train.Config, table)
    kept = prepared.load(Path(folder))
    data = config.dataset.load(config.seed) if load or kept is None or kept.missing else None
    if data is not None and data.asks:
        paid = cast(Prepared, prepared.paid(Path(folder), data))
        data = data.asks.settled(paid.preparation)
    known = kept if data is None and kept is not None else Prepared.of(cast(Data, data))
    if load and kept is not None and not kept.same(known):
        note("these are not the data of the run: some of the test may have been trained on")
    model = train.make_model(config, known)
    files.read_model(Path(folder), model)
    return Trained(config, known, model.eval(), data)


def note(words: str) -> None:
    """Beside the output, which may be for a program."""
    print(f"note: {words}", file=sys.stderr)


def predict(argv: Sequence[str]) -> int:
    """A prediction for each example of a file, or each picture of a folder; a text model writes on."""
    words, given = words_and_options(argv, "predict", {"json": False, "length": True, TRUST: False})
    if len(words) != 2:
        raise ConfigError(f"fedtorch predict takes a run folder and a file, but got {len(words)}")
    run, path = trained(words[0], TRUST in given, load=False), Path(words[1])
    if "vocabulary" in run.known.facts or run.known.facts.get("language"):
        more = write_on(run, _text(path), _length(given.get("length", str(LENGTH))))
        print(json.dumps({"continuation": more}) if "json" in given else more)
        return 0
    if "length" in given:
        raise ConfigError("--length is for models of texts, which go on writing: leave it out")
    for file in pictures_in(path) if path.is_dir() else [path]:
        x = examples(run.known, file)
        output = joined(outputs(run.model, x, file))
        name = {"file": str(file.relative_to(path))} if file != path else {}
        for row in described(output, run.known, len(x)):
            words = [*name.values(), str(row["prediction"])]
            print(json.dumps(name | row) if "json" in given else "\t".join(words))
    return 0


def outputs(model: nn.Module, x: Tensor, path: Path) -> list[Any]:
    """What the model gives, a part at a time; whole numbers are amounts where it takes no such."""
    try:
        with torch.no_grad():
            return [forward(model, part) for part in x.split(512)]
    except Exception as e:
        if x.dtype == torch.int64:
            return outputs(model, x.float(), path)
        raise ConfigError(
            f"{path}: the model cannot take its examples {list(x.shape)}: {str(e).partition(chr(10))[0]}"
        ) from e


def described(output: Any, known: Prepared, n: int) -> list[dict[str, Any]]:
    """The class, by its name, and its probability, or the number predicted; of maps, for each position.

    Of several outputs the one named logits, or each by its name: as it is, if it is not of the data's kind.
    Raises ConfigError where there is none for each of the ``n`` examples.
    """
    kind, classes = known.kind, known.preparation.classes
    if not isinstance(output, Tensor):
        named = {k: v for k, v in parts_by_name(output).items() if _has_rows(v, n)}
        if "logits" in named:
            return described(named["logits"], known, n)
        if not named:
            what = type(output).__name__
            raise ConfigError(
                f"the model gives a {what} without a tensor that has a row for each example"
            )
        each = {k: described(v, _told(v, known), n) for k, v in named.items()}
        asked = [
            w for w in ("prediction", "probability") if any(w in rows[0] for rows in each.values())
        ]
        return [
            {w: {k: rows[i][w] for k, rows in each.items() if w in rows[i]} for w in asked}
            for i in range(n)
        ]
    if kind == "classification":
        chance, label = output.softmax(1).max(1)
    elif kind == "binary":
        sure = output.flatten(1).squeeze(-1).sigmoid()
        chance, label = sure, (sure > 0.5).long()
    else:
        return [{"prediction": v} for v in output.flatten(1).squeeze(-1).tolist()]
    pairs = zip(label.tolist(), chance.tolist(), strict=True)
    return [{"prediction": _class_name(y, classes), "probability": p} for y, p in pairs]


def parts_by_name(output: Any) -> dict[str, Any]:
    """Parts of a model's output by name, or by place."""
    keys = list(output) if isinstance(output, Mapping) else getattr(output, "_fields", None)
    if keys is None and is_dataclass(output):
        keys = [f.name for f in fields(output)]
    inside = parts(output) or []
    return dict(zip(map(str, keys or range(len(inside))), inside, strict=True))


def _told(value: Any, known: Prepared) -> Prepared:
    """What is known, but that a part with another number of columns than there are classes is numbers."""
    columns = value.shape[1:2].numel() if isinstance(value, Tensor) and value.dim() > 1 else 0
    fits = not isinstance(value, Tensor) or columns == known.outputs
    return known if fits else replace(known, kind="regression")


def _has_rows(value: Any, n: int) -> bool:
    """Whether there is a tensor with a row for each example, and none without."""
    return bool(found := leaves(value)) and all(t.dim() and len(t) == n for t in found)


def _class_name(label: Any, classes: Sequence[Any]) -> Any:
    if isinstance(label, list):
        return [_class_name(y, classes) for y in label]
    return classes[label] if classes else label


def write_on(run: Trained, start: str, length: int) -> str:
    """The most likely next character or token, again and again."""
    encode, decode = _language(run.known.facts)
    codes = encode(start)
    if not codes:
        raise ConfigError("the file to write on from has no text")
    first, window = len(codes), run.known.facts["input_shape"][0]
    with torch.no_grad():
        for _ in range(length):
            output = forward(run.model, torch.tensor([codes[-window:]]))
            codes.append(int(output[0, :, -1].argmax()))
    return decode(codes[first:])


def _language(facts: Mapping[str, Any]) -> tuple[Encode, Decode]:
    """Text to numbers and back: by a tokenizer, or by the characters that were trained on."""
    if "tokenizer" in facts:
        known = tokens.tokenizer(facts["tokenizer"])
        return partial(known.encode, add_special_tokens=False), known.decode
    vocabulary = facts["vocabulary"]

    def encode(text: str) -> list[int]:
        text = as_bytes(text) if vocabulary == BYTES else text
        if unknown := sorted(set(text) - set(vocabulary)):
            raise ConfigError(
                f"the file to write on from has characters the model never saw: {unknown[:5]}"
            )
        return [vocabulary.index(c) for c in text]

    def decode(codes: list[int]) -> str:
        more = "".join(vocabulary[c] for c in codes)
        return more.encode("latin-1").decode(errors="replace") if vocabulary == BYTES else more

    return encode, decode


def _text(path: Path) -> str:
    try:
        return disk.regular(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read as text: {e}") from e


def _length(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--length must be a whole number of at least 1, got {text!r}")
    return int(text)
