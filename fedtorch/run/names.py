"""The short names a config may use."""

import dataclasses
from typing import Any

CHOICES: dict[str, dict[str, str]] = {
    "dataset": {
        "digits": "fedtorch.data.Digits",
        "idx": "fedtorch.data.Idx",
        "mnist": "fedtorch.data.Idx",
        "folder": "fedtorch.data.ImageFolder",
        "text": "fedtorch.data.Text",
        "labelled-text": "fedtorch.data.LabelledText",
        "csv": "fedtorch.data.Csv",
        "npz": "fedtorch.data.Npz",
        "hf": "fedtorch.data.HuggingFace",
        "custom": "fedtorch.data.Custom",
    },
    "lora": {"on": "fedtorch.run.huggingface.LoRA"},
    "partition": {
        "iid": "fedtorch.data.Iid",
        "dirichlet": "fedtorch.data.Dirichlet",
        "shards": "fedtorch.data.Shards",
        "quantity": "fedtorch.data.QuantitySkew",
        "natural": "fedtorch.data.Natural",
    },
    "strategy": {
        "fedavg": "fedtorch.strategies.FedAvg",
        "fedprox": "fedtorch.strategies.FedProx",
        "scaffold": "fedtorch.strategies.Scaffold",
        "fedbn": "fedtorch.strategies.FedBN",
        "fedper": "fedtorch.strategies.FedPer",
        "lg": "fedtorch.strategies.LGFedAvg",
        "fedrep": "fedtorch.strategies.FedRep",
        "fedbabu": "fedtorch.strategies.FedBABU",
        "ditto": "fedtorch.strategies.Ditto",
        "apfl": "fedtorch.strategies.APFL",
        "pfedme": "fedtorch.strategies.PFedMe",
        "ifca": "fedtorch.strategies.IFCA",
        "qfedavg": "fedtorch.strategies.QFedAvg",
        "fednova": "fedtorch.strategies.FedNova",
        "fedexp": "fedtorch.strategies.FedExP",
        "feddyn": "fedtorch.strategies.FedDyn",
        "moon": "fedtorch.strategies.MOON",
        "client-momentum": "fedtorch.strategies.ClientMomentum",
    },
    "strategy.server": {
        "sgd": "fedtorch.training.optimizer.ServerSGD",
        "adam": "fedtorch.training.optimizer.ServerAdam",
        "yogi": "fedtorch.training.optimizer.ServerYogi",
        "adagrad": "fedtorch.training.optimizer.ServerAdagrad",
        "lamb": "fedtorch.training.optimizer.ServerLAMB",
    },
    "aggregator": {
        "mean": "fedtorch.aggregation.mean.Mean",
        "median": "fedtorch.aggregation.robust.Median",
        "trimmed-mean": "fedtorch.aggregation.robust.TrimmedMean",
        "krum": "fedtorch.aggregation.vectors.Krum",
        "multi-krum": "fedtorch.aggregation.vectors.MultiKrum",
        "bulyan": "fedtorch.aggregation.vectors.Bulyan",
        "geometric-median": "fedtorch.aggregation.vectors.GeometricMedian",
        "centred-clip": "fedtorch.aggregation.vectors.CentredClip",
        "norm-bound": "fedtorch.aggregation.vectors.NormBound",
        "fltrust": "fedtorch.aggregation.vectors.FLTrust",
        "secure": "fedtorch.secure.aggregator.Secure",
        "he": "fedtorch.secure.he.HE",
    },
    "aggregator.pre": {
        "nnm": "fedtorch.aggregation.mixing.NNM",
        "bucketing": "fedtorch.aggregation.mixing.Bucketing",
    },
    "channel": {
        "topk": "fedtorch.channel.topk.TopK",
        "randk": "fedtorch.channel.topk.RandomK",
        "qsgd": "fedtorch.channel.quantise.QSGD",
        "sign": "fedtorch.channel.quantise.Sign",
        "powersgd": "fedtorch.channel.lowrank.PowerSGD",
    },
    "participation": {
        "everyone": "fedtorch.rounds.participation.Everyone",
        "uniform": "fedtorch.rounds.participation.Uniform",
        "poisson": "fedtorch.rounds.participation.Poisson",
    },
    "pace": {
        "synchronous": "fedtorch.rounds.synchronous.Synchronous",
        "over-selected": "fedtorch.rounds.synchronous.OverSelected",
        "buffered": "fedtorch.rounds.buffered.Buffered",
        "asynchronous": "fedtorch.rounds.buffered.Asynchronous",
    },
    "pace.clock": {
        "simulated": "fedtorch.rounds.clock.Clock",
        "trace": "fedtorch.rounds.clock.Trace",
    },
    "privacy": {
        "sample": "fedtorch.privacy.SampleLevel",
        "client": "fedtorch.privacy.ClientLevel",
        "local": "fedtorch.privacy.LocalDP",
        "distributed": "fedtorch.privacy.DistributedDP",
    },
    "privacy.adaptive": {"on": "fedtorch.privacy.AdaptiveClip"},
    "privacy.bands": {"on": "fedtorch.privacy.Bands"},
    "audit": {"on": "fedtorch.run.audited.Audit"},
    "threat": {
        "sign-flip": "fedtorch.rounds.attacks.SignFlip",
        "gauss": "fedtorch.rounds.attacks.Gauss",
        "label-flip": "fedtorch.rounds.attacks.LabelFlip",
        "alie": "fedtorch.rounds.attacks.Alie",
        "ipm": "fedtorch.rounds.attacks.Ipm",
        "min-max": "fedtorch.rounds.attacks.MinMax",
        "min-sum": "fedtorch.rounds.attacks.MinSum",
        "mimic": "fedtorch.rounds.attacks.Mimic",
        "backdoor": "fedtorch.rounds.backdoor.Backdoor",
    },
    "schedule": {
        "constant": "fedtorch.rounds.schedules.Constant",
        "exponential": "fedtorch.rounds.schedules.Exponential",
        "step": "fedtorch.rounds.schedules.Step",
        "cosine": "fedtorch.rounds.schedules.Cosine",
    },
    "tracking": {
        "tensorboard": "fedtorch.tracking.TensorBoard",
        "mlflow": "fedtorch.tracking.MLflow",
        "wandb": "fedtorch.tracking.WandB",
    },
    "engine": {
        "local": "fedtorch.engines.Local",
        "processes": "fedtorch.engines.Processes",
        "ray": "fedtorch.engines.Ray",
        "flower": "fedtorch.sites.flower.Flower",
    },
}
"""Short names of each choice; the dotted path is what a user's own class is given by."""

WANTED = {
    "dataset": ("load", "it must be a dataclass with a method load(seed)"),
    "lora": ("fedtorch.run.huggingface.LoRA", "it must be a subclass of LoRA"),
    "partition": ("fedtorch.data.Partition", "it must be a subclass of fedtorch.data.Partition"),
    "strategy": ("fedtorch.strategies.Strategy", "it must be a subclass of fedtorch.Strategy"),
    "strategy.server": (
        "fedtorch.training.optimizer.ServerOptimizer",
        "it must be a subclass of fedtorch.training.optimizer.ServerOptimizer",
    ),
    "aggregator": ("start", "it must be a dataclass with a method start(), as of fedtorch.Robust"),
    "aggregator.pre": (
        "fedtorch.aggregation.mixing.Mixing",
        "it must be a subclass of fedtorch.aggregation.mixing.Mixing",
    ),
    "channel": ("fedtorch.channel.base.Stage", "it must be a subclass of fedtorch.Stage"),
    "participation": (
        "fedtorch.rounds.participation.Participation",
        "it must be a subclass of fedtorch.rounds.participation.Participation",
    ),
    "pace": ("step", "it must be a dataclass with the methods check and step"),
    "pace.clock": ("seconds", "it must be a dataclass with a method seconds"),
    "privacy": ("fedtorch.privacy.Privacy", "it must be a subclass of fedtorch.privacy.Privacy"),
    "privacy.adaptive": ("fedtorch.privacy.AdaptiveClip", "it must be a subclass of AdaptiveClip"),
    "privacy.bands": ("fedtorch.privacy.Bands", "it must be a subclass of Bands"),
    "audit": ("fedtorch.run.audited.Audit", "it must be a subclass of Audit"),
    "schedule": ("__call__", "it must be a dataclass that can be called with the round"),
    "threat": (
        "fedtorch.rounds.threat.Threat",
        "it must be a subclass of fedtorch.rounds.threat.Threat",
    ),
    "tracking": (
        "fedtorch.tracking.Tracking",
        "it must be a subclass of fedtorch.tracking.Tracking",
    ),
    "engine": ("open", "it must be a dataclass with a method open(model, clients, recipe)"),
}
"""What a class of the user's own must be for each choice: a base class or a method, and that in words."""

SEVERAL = {"channel"}
"""Choices of several parts in order: ``topk:0.01,qsgd``, or a list of tables."""

NONE_USUAL = {"threat"}
"""Choices that are off unless one is named: options alone do not say which is meant."""

ALIASES = {
    "learning_rate": "lr",
    "local_epochs": "epochs",
    "local_steps": "steps",
    "bs": "batch_size",
    "batch": "batch_size",
    "lrate": "lr",
    "num_clients": "clients",
    "n_clients": "clients",
    "num_rounds": "rounds",
    "n_rounds": "rounds",
    "output": "run_dir",
    "output_dir": "run_dir",
    "out": "run_dir",
    "data": "dataset",
    "data_path": "dataset.path",
    "path": "dataset.path",
    "target": "dataset.target",
    "label": "dataset.target",
    "device": "engine.device",
    "workers": "engine.workers",
    "num_workers": "engine.workers",
    "hidden": "model.hidden",
    "alpha": "partition.alpha",
    "mu": "strategy.mu",
    "algorithm": "strategy",
    "server_lr": "strategy.server.lr",
    "server_optimizer": "strategy.server",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "epsilon": "privacy.epsilon",
    "eps": "privacy.epsilon",
    "target_epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
    "noise_multiplier": "privacy.noise_multiplier",
    "max_grad_norm": "privacy.clip",
    "cohort_size": "participation.cohort_size",
    "random_seed": "seed",
    "val": "validation",
}
"""What others call an option: taken for ours where a command has no option of that name, and said."""

CALLED = {other.replace("_", "-"): ours.rpartition(".")[2] for other, ours in ALIASES.items()}
"""The same without what an option belongs to: what was likely meant in a file, or behind a dot."""

MEANT: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "strategy": {
        "fedadam": ("fedavg", {"server": "adam"}),
        "fedyogi": ("fedavg", {"server": "yogi"}),
        "fedadagrad": ("fedavg", {"server": "adagrad"}),
        "fedlamb": ("fedavg", {"server": "lamb"}),
    },
    "participation": {"all": ("everyone", {}), "full": ("everyone", {})},
    "pace": {"fedbuff": ("buffered", {}), "fedasync": ("asynchronous", {})},
}
"""Names that others give to a choice of ours with some options: the same thing, so they are taken."""


def ours(choice: str, value: Any) -> Any:
    """What is given for a choice, by our name, with the options that the name of others stands for."""
    name, options = value, dict[str, Any]()
    if isinstance(value, dict):
        name, options = value.get("name"), {k: v for k, v in value.items() if k != "name"}
    known = str(name).lower()
    known, usual = MEANT.get(choice, {}).get(known, (known, {}))
    if known not in CHOICES.get(choice, {}):
        return value
    for key, inner in usual.items():
        given = options.get(key, {})
        options[key] = {"name": inner, **given} if isinstance(given, dict) else given
    return {"name": known, **options} if options or isinstance(value, dict) else known


OFF = ("none", "null", "off", "no", "false")
"""Words for a choice that is left out."""

NEAR = {
    "privacy": {"dpsgd": "sample", "dp-sgd": "sample", "dp": "sample", "example": "sample",
                "user": "client", "central": "client", "ldp": "local", "ddp": "distributed"},
    "strategy": {"fedavgm": "fedavg with --strategy.server sgd --strategy.server.momentum 0.9",
                 "fedsgd": "fedavg with --steps 1", "fedbuff": "fedavg with --pace buffered",
                 "fedasync": "fedavg with --pace asynchronous",
                 "fedmedian": "fedavg with --aggregator median", "krum": "fedavg with --aggregator krum"},
    "aggregator": {"fedavg": "mean", "average": "mean", "avg": "mean", "secagg": "secure",
                   "trimmed": "trimmed-mean", "rfa": "geometric-median"},
    "dataset": {"cifar10": "folder or hf", "cifar": "folder or hf", "femnist": "idx", "emnist": "idx",
                "fashion-mnist": "idx", "shakespeare": "text", "image": "folder", "images": "folder",
                "tsv": "csv", "parquet": "csv", "huggingface": "hf"},
    "partition": {"noniid": "dirichlet", "non-iid": "dirichlet", "label-skew": "dirichlet or shards",
                  "pathological": "shards"},
    "participation": {"random": "uniform"},
    "engine": {"gpu": "local with --engine.device cuda", "cuda": "local with --engine.device cuda",
               "multiprocessing": "processes"},
}  # fmt: skip
"""What is likely meant by a name of elsewhere: to be asked, not to be taken for granted."""

FREE = {"model", "optimizer"}
"""Choices whose options belong to a function that is only found later: a table ``<name>_args``."""


Group = tuple[list[tuple[str, str | None]], dict[str, Any]]
"""Names with what stands behind their colons, and the options that are given beside them."""


def grouped(choice: str, value: Any) -> list[Group]:
    """What is given for a choice of several: a text ``topk:0.01,qsgd``, a table, or a list of such."""
    if isinstance(value, (list, tuple)):
        return [group for part in value for group in grouped(choice, part)]
    options: dict[str, Any] = {}
    if isinstance(value, dict):
        options = {k: v for k, v in value.items() if k != "name"}
        value = value.get("name", next(iter(CHOICES[choice])))
    if value is None:
        return []
    names = []
    for word in str(value).strip("[] ").split(","):
        name, colon, of = word.strip().partition(":")
        ours = name.lower() in CHOICES[choice]  # package.module:Class is one name
        names.append((name, of if colon else None) if ours else (word.strip(), None))
    return [(names, options)]


def worded(part: Any) -> str:
    """A choice and its options by the names that flags have, without what is left open."""
    given = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    options = [
        f"{k.replace('_', ' ')} {worded(v) if dataclasses.is_dataclass(v) else written(v)}"
        for k, v in given.items()
        if v is not None and v not in ((), "auto")
    ]
    return written(part).lower() + (f" ({', '.join(options)})" if options else "")


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def default(f: "dataclasses.Field[Any]") -> Any:
    """What a field is where nothing is given."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def written(value: Any) -> str:
    """A value as a flag takes it; a choice by its short name."""
    if dataclasses.is_dataclass(value):
        paths = {p.rpartition(".")[2]: n for names in CHOICES.values() for n, p in names.items()}
        return paths.get(type(value).__name__, type(value).__name__)
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else "''" if value in ("", {}) else str(value)
