"""MLflow, as the extra ``mlflow``: parameters, curves, pictures and the summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtorch.tracking.base import Tracker, Tracking
from fedtorch.types import ConfigError

RUN = "mlflow_run_id"
"""File in the run folder that names the MLflow run, so that a resumed run goes on in it."""


@dataclass(frozen=True, kw_only=True)
class MLflow(Tracking):
    """A run in an MLflow experiment."""

    uri: str = ""
    """Tracking server or store; empty: MLflow's own setting (MLFLOW_TRACKING_URI)."""
    experiment: str = "fedtorch"
    """Experiment the run belongs to."""

    def ready(self) -> None:
        """Raises ConfigError when the package is not installed."""
        try:
            import mlflow  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                "tracking mlflow needs the package mlflow: pip install 'fedtorch[mlflow]'"
            ) from e

    def open(self, folder: Path, start: int) -> Tracker:
        """Raises ConfigError when MLflow is not installed or its store cannot be reached."""
        self.ready()
        from mlflow.tracking import MlflowClient

        known = folder / RUN
        try:
            client = MlflowClient(self.uri or None)
            if start and known.is_file():
                return MLflowTracker(client, known.read_text(encoding="utf-8"))
            found = client.get_experiment_by_name(self.experiment)
            number = found.experiment_id if found else client.create_experiment(self.experiment)
            run = client.create_run(number, run_name=folder.name).info.run_id
        except Exception as e:  # MLflow raises its own, the store's and the network's errors
            first = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise ConfigError(f"MLflow {self.uri or 'store'!r} cannot be used: {first}") from e
        known.write_text(run, encoding="utf-8")
        return MLflowTracker(client, run)


class MLflowTracker(Tracker):
    """Goes on after the last round that this MLflow run knows, so that no step is there twice."""

    def __init__(self, client: Any, run: str) -> None:
        """``client`` is an MlflowClient."""
        self.client, self.run = client, run
        known = client.get_run(run).data.metrics
        self.last = int(known.get("round", -1))
        self.begun = bool(known)

    def config(self, table: Mapping[str, Any], metrics: Sequence[str], private: bool) -> None:
        """Parameters, which MLflow never lets change."""
        if not self.begun:
            for name, value in table.items():
                self.client.log_param(self.run, name, str(value)[:500])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Curves; a resumed run trains the same rounds to the same numbers, so they are not sent twice."""
        if step > self.last:
            for tag, value in {**values, "round": float(step)}.items():
                self.client.log_metric(self.run, tag, value, step=step)
            self.last = step

    def text(self, tag: str, text: str, step: int) -> None:
        """A text file among the artifacts."""
        self.client.log_text(self.run, text, f"{tag}.md")

    def picture(self, tag: str, png: bytes, step: int) -> None:
        """An image among the artifacts."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{tag.rpartition('/')[2]}-{step:06d}.png"
            path.write_bytes(png)
            self.client.log_artifact(self.run, str(path), tag.partition("/")[0])

    def finish(self) -> None:
        """The run is over."""
        self.client.set_terminated(self.run)
