"""fedtorch in the benchmark, called as a user calls it."""

from torch.utils.data import TensorDataset

from benchmarks.workloads import Problem
from fedtorch import Client, Local, Server, evaluate
from fedtorch.losses import accuracy, cross_entropy


class Ours:
    """A Server with the local engine; ``path`` says which of its ways of training is forced."""

    def __init__(self, problem: Problem, path: str) -> None:
        clients = [Client(str(k), shard) for k, shard in enumerate(problem.shards)]
        engine = Local(solver="general" if path == "general" else "auto")
        self.server = Server(problem.model(), clients, problem.recipe(), engine=engine)
        self.test = TensorDataset(*problem.test)

    def round(self) -> None:
        """One round of the server."""
        self.server.round()

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        metrics = {"accuracy": accuracy, "loss": cross_entropy}
        scores = evaluate(self.server.model, self.test, metrics, batch_size=500)
        return scores["accuracy"], scores["loss"]
