"""Options: by name alone, of the right kind, within their range."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from fedtorch import (
    Client,
    ClientOptimizer,
    ConfigError,
    Everyone,
    FedAvg,
    FedProx,
    Poisson,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    Strategy,
    TopK,
    Uniform,
)
from fedtorch.data import Csv, Digits, Dirichlet, HuggingFace, Idx, Npz, QuantitySkew, Shards, Text
from fedtorch.engines import Local, Processes, Ray
from fedtorch.options import COUNT, INSIDE, SHARE, fit, shown
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel, LocalDP, Nothing, SampleLevel
from fedtorch.rounds.schedules import Cosine, Exponential, Step
from fedtorch.run import cli
from fedtorch.sites.engine import Sites
from fedtorch.sites.serve import ServeConfig
from fedtorch.sites.site import SiteConfig
from fedtorch.tracking import TensorBoard
from fedtorch.training.optimizer import ServerAdagrad, ServerSGD, ServerYogi
from train import Config

BY_NAME = [
    *(SampleLevel, ClientLevel, LocalDP, AdaptiveClip, Bands),
    *(FedAvg, FedProx, Scaffold, ServerSGD, ServerAdam, ServerYogi, ServerAdagrad),
    *(Everyone, Uniform, Poisson, Exponential, Step, Cosine),
    *(Local, Processes, Ray, Sites, Dirichlet, Shards, QuantitySkew, Digits, TensorBoard),
    *(Config, SiteConfig, ServeConfig),
]
FIRST_BY_PLACE = [Csv, Npz, Idx, Text, HuggingFace]


@pytest.mark.parametrize("options", BY_NAME)
def test_no_option_goes_by_its_place(options: Callable[..., Any]) -> None:
    # SampleLevel(3) looked like an epsilon and was the clipping norm
    with pytest.raises(TypeError, match="positional"):
        options(1)


@pytest.mark.parametrize("options", FIRST_BY_PLACE)
def test_a_data_set_takes_its_path_by_place_and_no_more(options: Callable[..., Any]) -> None:
    assert options("here").path == "here"
    with pytest.raises(TypeError, match="positional"):
        options("here", "there")


def test_a_recipe_and_a_server_take_what_they_are_named_for() -> None:
    with pytest.raises(TypeError, match="positional"):
        Recipe(FedAvg(), None)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Server(None, [], Recipe(), Everyone())  # type: ignore[misc, arg-type]


KINDS = [*BY_NAME, *FIRST_BY_PLACE, Recipe]
NEEDED: dict[Any, dict[str, Any]] = {
    SiteConfig: {"name": "a", "insecure": True},
    ServeConfig: {"sites": ["a"], "input_shape": [3], "insecure": True},
}
FREE = {"seed", "insecure_seed"}
"""Any whole number will do."""
FROM_ZERO = {
    "finetune_steps",
    "metrics_epsilon",  # none is released
    "mu",
    "floor",
    "momentum",
    "beta1",
    "beta2",
    "dropout",
    "validation",
    "test_fraction",
    "client_runs",
    "lr_warmup",
    "lr_floor",
}
UP_TO_ONE = {
    "momentum",
    "beta1",
    "beta2",
    "dropout",
    "validation",
    "test_fraction",
    "quantile",
    "decay",
}
UP_TO_ONE |= {"rate", "sample_rate", "floor", "lr_floor", "delta", "max_delta"}


def numbers() -> list[Any]:
    """Every option of ours that is a number."""
    return [
        pytest.param(cls, f.name, hint, id=f"{cls.__name__}.{f.name}")
        for cls in KINDS
        if cls is not Sites  # the server's own, made from its checked options
        for f in fields(cls)
        if (hint := get_type_hints(cls)[f.name]) in (int, float, int | None, float | None)
    ]


@pytest.mark.parametrize(("cls", "name", "hint"), numbers())
def test_every_number_is_a_number_within_its_range(cls: Any, name: str, hint: Any) -> None:
    bad = [True, "1", [1], torch.ones(1)]
    bad += [] if name in FREE else [math.nan, math.inf, -math.inf, -1, -0.5]
    bad += [] if hint in (float, float | None) and name not in UP_TO_ONE else [1.5]
    bad += [] if name in FREE | FROM_ZERO else [0]
    bad += [] if hint in (int | None, float | None) else [None]
    for value in bad:
        with pytest.raises(ConfigError, match=rf"\b{name} (must|is)\b|--{name}"):
            cls(**NEEDED.get(cls, {}) | {name: value})


@pytest.mark.parametrize("cls", [c for c in KINDS if c is not Sites])
def test_switches_and_words_are_what_they_should_be(cls: Any) -> None:
    for f in fields(cls):
        kind = get_type_hints(cls)[f.name]
        wrong: list[Any] = (
            [0, 1, None, "true"] if kind is bool else [3, b"x"] if kind is str else []
        )
        wrong = ["sideways", 3.5] if hasattr(kind, "__args__") and "Literal" in str(kind) else wrong
        for value in wrong:
            with pytest.raises(ConfigError, match=f.name):
                cls(**NEEDED.get(cls, {}) | {f.name: value})


def test_numbers_of_numpy_become_numbers() -> None:
    made = Recipe(lr=np.float32(0.5), epochs=np.int64(3), drop_last=np.bool_(True))
    assert (made.lr, made.epochs, made.drop_last) == (0.5, 3, True)
    assert [type(v) for v in (made.lr, made.epochs, made.drop_last)] == [float, int, bool]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": 3},
            r"optimizer must be a name, a class or a function fn\(model, lr\), got 3",
        ),
        ({"lr": "0.1"}, "lr must be a number.*, got '0.1'"),
        ({"privacy": True}, "privacy must be a Privacy, got True"),
        ({"privacy": SampleLevel}, r"got the class SampleLevel \(write SampleLevel\(\.\.\.\)\)"),
        ({"strategy": FedProx}, r"strategy must be a Strategy, got the class FedProx"),
        ({"strategy": "fedavg"}, "strategy must be a Strategy, got 'fedavg'"),
        ({"loss": "mse"}, "loss must be a function, got 'mse'"),
        ({"loss": nn.MSELoss}, r"loss must be a function, got the class MSELoss \(write MSELoss"),
        ({"batch_size": 1.5}, "batch_size must be a whole number or None, got 1.5"),
    ],
)
def test_a_recipe_of_wrong_things_is_one_sentence(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"participation": 0.5}, "participation must be a Participation, got 0.5"),
        ({"participation": Uniform}, "got the class Uniform"),
        ({"schedule": 0.9}, "schedule must be a function, got 0.9"),
        ({"schedule": Cosine}, "schedule must be a function, got the class Cosine"),
        ({"engine": "processes"}, "engine must be an Engine, got 'processes'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"recipe": FedAvg()}, "recipe must be a Recipe, got FedAvg"),
    ],
)
def test_a_server_of_wrong_things_is_one_sentence(options: Any, message: str) -> None:
    own = Client("a", (torch.randn(4, 3), torch.randint(2, (4,))))
    with pytest.raises(ConfigError, match=message):
        Server(nn.Linear(3, 2), [own], **options)


def test_an_optimizer_is_named_in_words_and_rounds_are_counted() -> None:
    assert ClientOptimizer(torch.optim.SGD).words == ClientOptimizer("SGD").words == "SGD"
    with pytest.raises(ConfigError, match=r"optimizer\.args must be a dict, got 0\.9"):
        ClientOptimizer("sgd", 0.9)  # type: ignore[arg-type]
    server = Server(nn.Linear(3, 2), [Client("a", (torch.randn(4, 3), torch.arange(4) % 2))])
    for n in (1.5, "3", -1, True):
        with pytest.raises(ConfigError, match="rounds must be"):
            next(server.rounds(n))  # type: ignore[arg-type]
    assert [*server.rounds(0)] == []


def test_a_server_names_what_is_no_model_and_what_are_no_clients() -> None:
    own = Client("a", (torch.randn(4, 3), torch.randint(2, (4,))))
    with pytest.raises(ConfigError, match="the model must be a Module, got the class Linear"):
        Server(nn.Linear, [own])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the clients must be a list, got Client"):
        Server(nn.Linear(3, 2), own)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="each of the clients must be a Client, got tuple"):
        Server(nn.Linear(3, 2), [("a", own.data)])  # type: ignore[list-item]


def test_clients_whose_id_and_data_are_swapped_and_data_of_numpy() -> None:
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.raises(ConfigError, match=r"id of a client.* must be text.*, got tuple"):
        Client((x, y), "a")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"id of a client.* must be text.*, got Tensor"):
        Client(x, y)  # type: ignore[arg-type]
    assert Client(7, (x, y)).id == "7"
    assert len(Client("a", (x.numpy(), y.numpy()))) == 4


@dataclass(frozen=True)
class Mine(Strategy):
    """Of a user, who may annotate as they like."""

    pull: float = 0.1
    top: float = math.inf
    how: Literal["up", "down"] = "up"
    call: "Unknown | None" = None  # type: ignore[name-defined]  # noqa: F821


def test_a_strategy_of_ones_own_is_checked_where_its_annotations_can_be_read() -> None:
    assert Mine(pull=2).top == math.inf

    @dataclass(frozen=True)
    class Plain(Strategy):
        pull: float = 0.1
        top: float = math.inf
        names: list[str] | None = None
        call: Callable[[int], int] | None = None

    assert Plain(top=3, names=["a"], call=abs).top == 3
    wrong: list[tuple[str, Any]] = [("pull", "0.2"), ("pull", math.nan), ("names", [1])]
    for name, value in [*wrong, ("call", 3), ("pull", 10**400)]:
        with pytest.raises(ConfigError, match=rf"strategy\.{name} must be"):
            Plain(**{name: value})


def test_the_ends_of_a_range() -> None:
    assert [SHARE.holds(v) for v in (0, 0.5, 1, math.nan)] == [True, True, False, False]
    assert [INSIDE.holds(v) for v in (0, 0.5, 1)] == [False, True, False]
    assert [COUNT.holds(v) for v in (0, 1, 10**30, math.inf)] == [False, True, True, False]


def test_a_message_shows_no_data() -> None:
    assert shown(torch.ones(3)) == "Tensor" and shown("x" * 100) == "'" + "x" * 59
    assert fit("a", None, int | None) is None and fit("a", 3, Any) == 3
    assert fit("a", np.float64(0.5), float) == 0.5


def test_the_command_and_python_have_one_set_of_defaults() -> None:
    made = Recipe()
    for config in (Config(), ServeConfig(**NEEDED[ServeConfig])):
        for name in ("strategy", "lr", "epochs", "steps", "batch_size", "drop_last"):
            assert getattr(config, name) == getattr(made, name), name
        # but for privacy, which is the command's default alone, as README says
        assert config.privacy == SampleLevel() and made.privacy == Nothing()
    assert made.learning_rate == 0.1 and Recipe(privacy=SampleLevel()).learning_rate == 1.0
    assert Recipe(lr=0.3, privacy=SampleLevel()).learning_rate == 0.3
    assert Recipe(privacy=ClientLevel()).learning_rate == 0.1


@pytest.mark.parametrize("choice", ["privacy", "strategy.server", "tracking", "privacy.adaptive"])
def test_an_option_of_a_choice_that_is_none_is_refused(choice: str) -> None:
    option = {"privacy": "epsilon", "tracking": "every"}.get(choice, "lr")
    outer = ["--privacy", "client"] if choice == "privacy.adaptive" else []
    words = [f"--{choice}", "none", f"--{choice}.{option}", "3"]
    for flags in (words, words[2:] + words[:2]):
        with pytest.raises(ConfigError, match=rf"{choice} is none, which has no {choice}.{option}"):
            cli.parse(Config, [*outer, *flags])
    cli.parse(Config, [*outer, *words[:2]])


def test_a_config_file_with_options_is_overruled_by_none(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[privacy]\nepsilon = 3\n")
    found = cli.parse(Config, ["--config", str(tmp_path / "run.toml"), "--privacy", "none"])
    assert found.privacy is None


def test_fix_model_from_python_trains_a_copy_without_the_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    own = [Client("a", (torch.randn(20, 3), torch.randint(2, (20,))))]
    plan = SampleLevel(noise_multiplier=1.0, rounds=1)
    with pytest.raises(ConfigError, match="BatchNorm"):
        Server(net, own, Recipe(privacy=plan))
    server = Server(net, own, Recipe(privacy=replace(plan, fix_model=True)))
    assert any("server.model is a copy" in n for n in server.notes)
    before = server.model[2].weight.clone()  # type: ignore[index]
    server.round()
    assert isinstance(server.model[1], nn.GroupNorm)  # type: ignore[index]
    assert not torch.equal(before, server.model[2].weight)  # type: ignore[index]
    assert isinstance(net[1], nn.BatchNorm1d)


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (FedProx(mu=0.3, server=ServerAdam(lr=0.1)), "FedProx(server=ServerAdam(lr=0.1), mu=0.3)"),
        (FedAvg(), "FedAvg()"),
        (
            Recipe(FedProx(mu=0.2), lr=0.1),
            "Recipe(lr=0.1, strategy=FedProx(mu=0.2), loss=cross_entropy)",
        ),
        (SampleLevel(epsilon=3.0, rounds=8), "SampleLevel(epsilon=3.0, delta=1e-05, rounds=8)"),
        (TopK(share=0.2), "TopK(share=0.2)"),
        (Uniform(cohort_size=3), "Uniform(cohort_size=3)"),
        (Local(chunk=3), "Local(chunk=3)"),
    ],
    ids=["nested", "usual", "recipe", "plan", "stage", "cohort", "engine"],
)
def test_what_is_public_shows_in_one_line_what_is_not_usual(part, shown):
    assert repr(part) == shown
