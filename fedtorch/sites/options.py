"""Every option of a site, with the limits its owner sets to what a server may ask for, and of a server."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedtorch.data import Csv, columns
from fedtorch.data.tokens import PREFIX
from fedtorch.options import COUNT, INSIDE, POSITIVE, Range, check
from fedtorch.privacy import STATISTICS_NOISE, Privacy
from fedtorch.run import steps
from fedtorch.run.names import written
from fedtorch.run.options import RunOptions
from fedtorch.sites.flower import Flower
from fedtorch.sites.keys import SITE_NAME, bare_fingerprint
from fedtorch.training.losses import DEFAULTS, LOSSES
from fedtorch.types import ConfigError

LIMITS = (
    "max_parameters",
    "max_rounds",
    "max_epochs",
    "max_steps",
    "max_batch",
    "max_megabytes",
)


MOST_NAMED = 1 << 15
"""Characters of columns and classes, half of what a site takes as a plan."""


def check_site_name(site: str) -> None:
    """Raises ConfigError where it can be no site's name."""
    if not SITE_NAME.fullmatch(site):
        raise ConfigError(f"{site!r} cannot be a site's name: letters, digits, . _ - only")


def addressed(option: str, address: str) -> None:
    """Raises ConfigError where it is no HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"{option} must be HOST:PORT, such as fed.example.org:8443, got {address!r}"
        )


def carried(engine: Any, credentials: str, insecure: bool) -> None:
    """Raises ConfigError unless it is said how server and sites know each other: in one way."""
    if engine is None:
        if bool(credentials) == insecure:
            raise ConfigError(
                "give --credentials FOLDER (fedtorch keys makes them), or --insecure alone"
            )
    elif not isinstance(engine, Flower):
        raise ConfigError(
            f"{written(engine).lower()} is an engine of fedtorch train, and each site trains on its own "
            "device: leave engine out, or give --engine flower"
        )
    elif credentials or insecure:
        raise ConfigError(
            "with engine flower, Flower decides who is whom: give --engine.ca FILE, and leave out "
            "credentials and insecure"
        )


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Every option of a site. ``--config site.toml`` sets them, flags override."""

    server: str = "127.0.0.1:8443"
    """The server, HOST:PORT; its certificate must be for this HOST."""
    name: str = ""
    """This site's name; with keys it must be the name in its certificate."""
    dataset: Any = Csv()
    """This site's own data: csv, npz, idx, ...; e.g. --dataset csv --dataset.path FILE."""
    credentials: str = ""
    """Folder with key.pem, cert.pem and ca.pem."""
    he_secret: str = ""
    """The sites' common secret key, for aggregator he (fedtorch keys --he); none: he.secret in
    credentials."""
    insecure: bool = False
    """No TLS and no keys: only for a server on this very machine."""
    engine: Any = field(default=None, metadata={"names": ("flower",)})
    """flower, where this site is behind the Flower SuperNode at engine.address; in place of server and
    credentials."""
    state: str = "site"
    """Folder for memory, privacy ledger and this site's TensorBoard."""
    lost_state: bool = False
    """Go on with a budget although the state folder lacks what this site has done by the server's word:
    the ledger in it may lack charges too."""
    models: list[str] = field(default_factory=list)
    """Models it will train; none given: every model it has, but none of Hugging Face. Those are hf:FOLDER,
    or hf:NAME=FOLDER where the server has another name for it."""
    steps: list[str] = field(default_factory=list)
    """Steps, package.module:function each, that it will train and judge a model by, from its own code; none
    given: it runs none."""
    require_secure: bool = False
    """Take part only under secure aggregation, which shows the server sums alone."""
    peers: dict[str, str] = field(default_factory=dict)
    """Who may be in a secure sum with this site: name -> SHA-256 of the certificate (fedtorch keys prints
    them); none given: whoever the authority has signed."""
    least_peers: int = 2
    """Fewest other sites that a secure sum must have."""
    max_epsilon: float | None = None
    """Most that this site's data may cost, over all runs; given, it takes part only where the noise is
    added here (privacy sample or local), and tells nobody its loss or its number of examples."""
    max_delta: float = 1e-5
    """The delta of that epsilon, and the largest a run may have."""
    max_parameters: int = 100_000_000
    """Largest model it will train."""
    max_rounds: int = 10_000
    """Most rounds it will train in one run, those done again counted too."""
    max_epochs: int = 100
    """Most passes over its data in a round."""
    max_steps: int = 10_000
    """Most local steps in a round, where the run gives steps."""
    max_batch: int = 10_000
    """Largest batch of a step, and most examples whose gradients are held at once."""
    max_megabytes: int = 2000
    """Largest message it will take."""
    patience: float = 3600.0
    """Seconds to go on trying when the server cannot be reached."""
    device: str = "cpu"
    """Where to train: cpu, cuda, ..."""

    def __post_init__(self) -> None:
        """Refuse what cannot be safe, by name."""
        kinds = dict.fromkeys(LIMITS, COUNT) | {"max_epsilon": POSITIVE, "patience": POSITIVE}
        check(
            self,
            "",
            **kinds,
            max_delta=INSIDE,
            least_peers=Range("at least 2", 2, math.inf, "high"),
        )
        for name, value in self.peers.items():
            if not bare_fingerprint(value):
                raise ConfigError(
                    f"peers.{name} is no SHA-256 fingerprint of 64 hex digits: {value!r}; fedtorch keys "
                    "prints them"
                )
        if self.peers and len({*self.peers} - {self.name}) < self.least_peers:
            raise ConfigError(
                f"peers name {len({*self.peers} - {self.name})} other sites, and least_peers is "
                f"{self.least_peers}: name more, or lower it"
            )
        carried(self.engine, self.credentials, self.insecure)
        if not self.name:
            raise ConfigError("--name: which of the server's sites is this?")
        check_site_name(self.name)
        addressed("server", self.server)
        for name in self.steps:
            steps.check("steps", name)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(RunOptions):
    """Every option of a server of sites. ``--config serve.toml`` sets them, flags override."""

    sites: list[str] = field(default_factory=list)
    """Names of the sites, as in their certificates."""
    address: str = "127.0.0.1:8443"
    """Where to listen, HOST:PORT; 0.0.0.0:8443 for every network of this machine."""
    credentials: str = ""
    """Folder with key.pem, cert.pem and ca.pem."""
    he_public: str = ""
    """The public half of the sites' common key, for aggregator he (fedtorch keys --he); none: he.public
    in credentials."""
    insecure: bool = False
    """No TLS and no keys: only for sites on this very machine."""
    engine: Any = field(default=None, metadata={"names": ("flower",)})
    """flower, where sites are behind the SuperNodes of the Flower SuperLink at engine.address; in place
    of address and credentials."""
    input_shape: list[int] = field(default_factory=list)
    """Shape of one example, agreed with the sites; with a step it may be left out."""
    language: bool = False
    """Of a model of Hugging Face: it predicts each next token, and not a class of the whole text."""
    outputs: int = 2
    """Classes, or numbers to predict."""
    kind: str = "classification"
    """classification, binary or regression: the default loss and metric."""
    columns: list[str] = field(default_factory=list)
    """Features of a table in their order, agreed with the sites: one whose table has others, or another
    order, is refused; none: nobody looks."""
    classes: list[str] = field(default_factory=list)
    """The same of the names of the classes, in the order of the outputs."""
    standardize: list[str] = field(default_factory=list)
    """Columns that all sites scale by private statistics of all of them, with rough public ranges:
    age=0:120,chol=0:600; every site gives the same as dataset.bounds, with dataset.standardize private."""
    statistics: Literal["quartiles", "sums"] = "quartiles"
    """Which statistics: quartiles, or sums (mean and deviation: for tens of thousands of rows)."""
    dataset: Any = None
    """Data of the server's own to test the model on; none: sites test for themselves."""
    model: str = "mlp"
    """A model that every site has too."""
    deadline: float = 600.0
    """Seconds a round waits for its sites."""
    minimum: int = 1
    """Sites that must be there for a round to start, and report for it to count."""
    enough: int | None = None
    """Over-selection: a round ends when so many sites have reported, the others are late; none: it waits
    for all that participation has chosen."""
    most_examples: int = 10_000_000
    """Largest number of examples a site may say it has; without privacy that is its weight."""
    patience: float = 3600.0
    """Seconds to wait for enough sites before giving up."""
    run_dir: str = ""
    """Folder of the run."""

    def __post_init__(self) -> None:
        """Refuse what no run can do."""
        super().__post_init__()
        times = dict.fromkeys(("deadline", "patience"), POSITIVE)
        counts = dict.fromkeys(("outputs", "minimum", "enough", "most_examples"), COUNT)
        check(self, "", **times, **counts)
        columns.ranges(self.standardize, "standardize")
        if self.standardize and self.privacy is None:
            raise ConfigError(
                "standardize scales by private statistics, and needs a privacy plan, which pays for them: "
                "without one let every site scale by the same public numbers, with dataset.bounds"
            )
        if self.privacy and self.privacy.statistics_noise and not self.standardize:
            raise ConfigError(
                "privacy.statistics_noise pays for statistics of columns, and none are asked for: leave it "
                "out, or name the columns with --standardize age=0:120,chol=0:600"
            )
        carried(self.engine, self.credentials, self.insecure)
        self._check_parties()
        if self.callbacks() and self.dataset is None and self.monitor.startswith("test_"):
            raise ConfigError(
                f"stop_after and keep look at {self.monitor}, and a server has no data unless it is given "
                "some: --dataset csv --dataset.path FILE; sites test for themselves"
            )
        self._check_texts()
        self._check_names()
        if self.kind not in DEFAULTS:
            raise ConfigError(f"kind must be one of {', '.join(DEFAULTS)}, got {self.kind!r}")
        if self.loss not in ("auto", *LOSSES):
            raise ConfigError(f"loss must be one of {', '.join(LOSSES)}: sites have no other")

    def _check_parties(self) -> None:
        if not self.sites or not (self.input_shape or self.step):
            raise ConfigError(
                "who takes part, and what does one example look like? Give --sites north,south and "
                "--input-shape 13 (docs/sites.md)"
            )
        if twice := [s for s, n in Counter(self.sites).items() if n > 1]:
            raise ConfigError(f"--sites names {twice[0]!r} twice")
        if not all(n >= 1 for n in self.input_shape):
            raise ConfigError(
                f"--input-shape must be whole numbers of at least 1, got {self.input_shape}"
            )
        addressed("address", self.address)
        for name in self.sites:
            check_site_name(name)

    def _check_names(self) -> None:
        given = {"columns": self.columns, "classes": self.classes}
        for option, names in given.items():
            if twice := [s for s, n in Counter(names).items() if n > 1]:
                raise ConfigError(f"--{option} names {twice[0]!r} twice")
        if sum(len(name) + 8 for names in given.values() for name in names) > MOST_NAMED:
            raise ConfigError(
                f"--columns and --classes have more than {MOST_NAMED:,} characters, too many for a plan: "
                "leave them out, and let sites agree by themselves"
            )
        if self.classes and len(self.classes) != max(self.outputs, 2):
            raise ConfigError(
                f"--classes names {len(self.classes)}, and the model has outputs for {self.outputs}"
            )

    def _check_texts(self) -> None:
        texts = self.model.startswith(PREFIX)
        if texts and (len(self.input_shape) != 1 or self.kind != "classification"):
            raise ConfigError(
                f"model {self.model} takes texts of one length and gives classes: --input-shape 128 for "
                "128 tokens, and leave out kind"
            )
        if self.language and not texts:
            raise ConfigError(f"language is of models hf:FOLDER, and not of {self.model!r}")

    @property
    def plan(self) -> Privacy:
        """The privacy plan, which pays for statistics of columns where sites scale by them."""
        plan = super().plan
        noise = plan.statistics_noise or (STATISTICS_NOISE if self.standardize else None)
        return replace(plan, statistics_noise=noise) if noise != plan.statistics_noise else plan
