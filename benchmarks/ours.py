"""fedtorch in the benchmark, called as a user calls it."""

from dataclasses import replace

from torch.utils.data import TensorDataset

from benchmarks.workloads import Problem
from fedtorch import Client, Server, evaluate
from fedtorch.engines import Engine
from fedtorch.privacy import ClientLevel, Privacy, SampleLevel
from fedtorch.training.losses import accuracy, cross_entropy


class Ours:
    """A Server as it is, but for the workload and perhaps the engine."""

    def __init__(
        self, problem: Problem, projected: bool = False, engine: Engine | None = None
    ) -> None:
        clients = [Client(str(k), shard) for k, shard in enumerate(problem.shards)]
        recipe = replace(problem.recipe(), privacy=plan(problem, projected))
        self.server = Server(problem.model(), clients, recipe, engine=engine, seed=problem.seed)
        self.test = TensorDataset(*problem.test)

    @property
    def path(self) -> str:
        """Which way of training was chosen."""
        solver = self.server.session.choice.solver
        return getattr(solver, "__name__", type(solver).__name__).lower()

    def round(self) -> None:
        """One round of the server."""
        self.server.round()

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        metrics = {"accuracy": accuracy, "loss": cross_entropy}
        scores = evaluate(self.server.model, self.test, metrics, batch_size=500)
        return scores["accuracy"], scores["loss"]


def plan(problem: Problem, projected: bool = False) -> Privacy | None:
    """Clip 1 and the workload's noise; six Poisson steps of ten examples where steps are private."""
    rounds = problem.work.rounds + 1
    if problem.work.privacy == "client":
        return ClientLevel(noise_multiplier=problem.noise, rounds=rounds)
    if problem.work.privacy == "sample":
        rate = problem.work.batch_size / problem.work.examples
        return SampleLevel(
            noise_multiplier=problem.noise,
            rounds=rounds,
            sample_rate=rate,
            steps=round(1 / rate),
            batch_size=problem.work.batch_size,
            projected=projected,
        )
    return None
