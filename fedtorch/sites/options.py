"""Every option of a site, and the limits its owner sets to what a server may ask for."""

from dataclasses import dataclass, field
from typing import Any

from fedtorch.data import Csv
from fedtorch.options import COUNT, INSIDE, POSITIVE, check
from fedtorch.types import ConfigError

LIMITS = (
    "max_parameters",
    "max_rounds",
    "max_epochs",
    "max_steps",
    "max_batch",
    "max_megabytes",
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
    insecure: bool = False
    """No TLS and no keys: only for a server on this very machine."""
    state: str = "site"
    """Folder for memory, privacy ledger and this site's TensorBoard."""
    lost_state: bool = False
    """Go on with a budget although the state folder lacks what this site has done by the server's word:
    the ledger in it may lack charges too."""
    models: list[str] = field(default_factory=list)
    """Models it will train; none given: every model it has."""
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
        check(self, "", **kinds, max_delta=INSIDE)
        if bool(self.credentials) == self.insecure:
            raise ConfigError(
                "give --credentials FOLDER (fedtorch keys makes them), or --insecure alone"
            )
        if not self.name:
            raise ConfigError("--name: which of the server's sites is this?")
