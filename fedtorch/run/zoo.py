"""Find and build a model: the file name is the registry.

``mlp`` is ``models/mlp.py`` (of the working folder first, then of fedtorch); ``path/file.py:Name`` and
``package.module:Name`` name anything else. A file offers ``build(...)`` or an ``nn.Module`` class, of
several the one that is no part of another. Of the data's facts (input_shape, in_features, in_channels,
num_classes, vocab_size, ...) a model is given those its signature asks for by name; the user's own
arguments come on top.
"""

import ast
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fedtorch.options import from_here, imported, near, run_file
from fedtorch.types import ConfigError

PACKAGE = Path(__file__).parents[1]


def folders() -> list[Path]:
    """Where models are looked up: ./models, then the zoo beside or inside the package."""
    found = [Path("models"), PACKAGE / "models", PACKAGE.parent / "models"]
    return [f for f in found if f.is_dir()]


def names() -> list[str]:
    """Every model that can be named without a path."""
    return sorted({p.stem for f in folders() for p in f.glob("*.py") if not p.stem.startswith("_")})


def file(name: str) -> Path | None:
    """Where the model of this name is."""
    return next((f / f"{name}.py" for f in folders() if (f / f"{name}.py").is_file()), None)


def elsewhere(name: str) -> str | None:
    """The file of the working folder that a name stands for; None: it is fedtorch's own, or nobody's."""
    found = file(name)
    return None if found is None or _ours(found) else str(found)


def _ours(path: Path) -> bool:
    return path.resolve().parent in [(f / "models").resolve() for f in (PACKAGE, PACKAGE.parent)]


def build(spec: str, facts: Mapping[str, Any], args: Mapping[str, Any]) -> nn.Module:
    """The model ``spec``; raises ConfigError naming what there is or what does not fit."""
    make = maker_of(spec)
    if isinstance(make, type) and not issubclass(make, nn.Module):
        raise ConfigError(
            f"model {spec!r} is a class, but no subclass of nn.Module: name one that is"
        )
    try:
        takes = inspect.signature(make).parameters
    except (TypeError, ValueError) as e:
        raise ConfigError(f"model {spec!r} cannot be called: {e}") from e
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for name in args:
        if name not in takes and not open_ended:
            known = ", ".join(takes) or "no arguments"
            hint = near(name, takes)
            raise ConfigError(f"model {spec!r} has no argument {name!r}; it takes {known}{hint}")
    given = {k: v for k, v in facts.items() if k in takes} | dict(args)
    missing = [
        n
        for n, p in takes.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and n not in given
    ]
    if missing:
        raise ConfigError(
            f"model {spec!r} needs {', '.join(missing)}; give it as --model.{missing[0]} VALUE"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # which is refused below
            model = make(**given)
    except Exception as e:
        odd = _odd(takes, args)
        raise ConfigError(odd or f"model {spec!r} cannot be built with {given}: {e}") from e
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {spec!r} gave a {type(model).__name__}, not an nn.Module: return the model"
        )
    for name, p in model.named_parameters():
        if not is_lazy(p) and not p.numel():
            raise ConfigError(
                f"model {spec!r} with {given} has no numbers in {name} {list(p.shape)}"
            )
    return model


def _odd(takes: Mapping[str, inspect.Parameter], args: Mapping[str, Any]) -> str:
    """The first of what was typed that is no number where one is wanted, in words."""
    kinds = {int: "a whole number", float: "a number"}
    for name, value in args.items():
        kind = kinds.get(takes[name].annotation) if name in takes else None
        if kind and isinstance(value, str):
            return f"--model.{name} must be {kind}, got {value!r}"
    return ""


def maker_of(spec: str) -> Callable[..., Any]:
    """The function or class that makes the model."""
    where, _, attr = spec.partition(":")
    if where.endswith(".py"):
        module = _from_file(Path(where))
    elif ":" in spec:
        module = imported(where, spec)
    else:
        if not spec.replace("-", "_").isidentifier():  # a path in it would leave the model folders
            raise ConfigError(f"model {spec!r} is neither a name nor path/file.py:Name")
        path = file(spec)
        if path is None:
            raise ConfigError(
                f"unknown model {spec!r}; there are {', '.join(names())}, or give path/file.py:Name"
                f"{near(spec, names())}"
            )
        module = _from_file(path)
    if attr:
        if not hasattr(module, attr):
            raise ConfigError(f"{where} has no {attr!r}{near(attr, vars(module))}")
        return getattr(module, attr)  # type: ignore[no-any-return]
    return _maker(module, where)


def _maker(module: ModuleType, where: str) -> Callable[..., Any]:
    if callable(getattr(module, "build", None)):
        return module.build  # type: ignore[no-any-return]
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, nn.Module) and c.__module__ == module.__name__
    ]
    if not own:
        raise ConfigError(
            f"{where} has neither build() nor an nn.Module class: write one, such as "
            "def build(in_features: int, num_outputs: int), which returns the model"
        )
    parts = _parts(module)
    whole = [c for c in own if c.__name__ not in parts] or own[-1:]
    if len(whole) > 1:
        names = ", ".join(c.__name__ for c in whole)
        example = f"{module.__file__ or where}:{whole[-1].__name__}"
        raise ConfigError(f"{where} has several models, {names}: name one, --model {example}")
    return whole[0]


def _parts(module: ModuleType) -> set[str]:
    """Names of classes that others of the same file are made of."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # there is no source
        return set()
    made = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    return {
        name.id
        for one in made
        for name in ast.walk(one)
        if isinstance(name, ast.Name) and name.id != one.name
    }


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"there is no model file {str(path)!r}")
    if not _ours(path):
        from_here()
    try:
        return run_file(f"fedtorch_model_{path.stem}", path)
    except (Exception, SystemExit) as e:
        raise ConfigError(
            f"model file {path} fails to import: {type(e).__name__}: {e}{_beside(path, e)}"
        ) from e


def _beside(path: Path, error: BaseException) -> str:
    """The fix where a file imports one that lies beside it; names are looked up from where one starts."""
    if not isinstance(error, ImportError):
        return ""
    name = (error.name or "").partition(".")[0]
    near = [p for p in (path.parent / f"{name}.py", path.parent / name) if name and p.exists()]
    if not near and "relative import" not in str(error):
        return ""
    try:
        folders = path.parent.resolve().relative_to(Path.cwd().resolve()).parts
    except ValueError:  # it lies elsewhere
        folders = ()
    package = ".".join(folders)
    fix = (
        f"write from {package} import {name or '...'}"
        if package
        else "set PYTHONPATH to its folder"
    )
    return f"; what lies beside it is found from the folder you start in: {fix}"
