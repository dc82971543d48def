"""Flower: its FedAvg and its simulation engine, two Ray actors of one thread (both cores)."""

import json
import os
import threading
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from queue import Queue
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else its actors wait for whatever else runs here
}

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation

from benchmarks.bare import evaluate, sgd
from benchmarks.workloads import Problem, Workload, problem

client = ClientApp()


@lru_cache(maxsize=1)
def prepared(spec: str) -> tuple[Problem, Any, list]:
    """Once for each actor: the problem, a working model and the orders."""
    torch.set_num_threads(1)
    asked = json.loads(spec)
    made = problem(Workload(**asked["work"]), Path(asked["mnist"]), asked["seed"])
    return made, made.model(), made.orders()


@client.train()
def train(message: Message, context: Context) -> Message:
    """A client's visit."""
    config = message.content["config"]
    made, model, orders = prepared(str(config["spec"]))
    k = int(context.node_config["partition-id"])
    order = orders[int(config["server-round"]) - 1][k]
    x, y = made.shards[k]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    sgd(made.work)(model, x[order], y[order])
    metrics = MetricRecord({"num-examples": len(y)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class Flower:
    """The simulation runs in a thread; a round of ours lets one of its rounds go by."""

    def __init__(self, problem: Problem, mnist: Path) -> None:
        self.problem, self.model = problem, problem.model()
        spec = {"work": asdict(problem.work), "mnist": str(mnist.resolve()), "seed": problem.seed}
        self.spec = json.dumps(spec)
        self.go: Queue[bool] = Queue()
        self.done: Queue[ArrayRecord | BaseException] = Queue()
        self.thread = threading.Thread(target=self.simulate, daemon=True)
        self.thread.start()
        self.wait()  # round 0 is the evaluation of the initial weights

    def simulate(self) -> None:
        """Flower's own loop from start to end."""
        server = ServerApp()
        server.main()(self.main)
        resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        start = {"init_args": {"num_cpus": 2, "include_dashboard": False}}
        try:
            run_simulation(
                server, client, self.problem.work.clients, backend_config=resources | start
            )
        except BaseException as e:
            self.done.put(e)

    def main(self, grid: Grid, context: Context) -> None:
        """FedAvg over everybody, evaluated centrally."""
        work = self.problem.work
        strategy: Any = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=work.clients
        )
        if work.privacy == "client":
            strategy = DifferentialPrivacyServerSideFixedClipping(
                strategy, self.problem.noise, clipping_norm=1.0, num_sampled_clients=work.clients
            )
        strategy.start(
            grid,
            ArrayRecord(self.model.state_dict()),
            num_rounds=work.rounds + 1,
            train_config=ConfigRecord({"spec": self.spec}),
            evaluate_fn=self.between,
        )

    def between(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Hand the weights out and hold Flower until the next round is asked for."""
        self.done.put(arrays)
        if server_round <= self.problem.work.rounds:
            self.go.get()
        return MetricRecord({"round": server_round})

    def wait(self) -> None:
        """Until Flower's round is over."""
        found = self.done.get(timeout=600)
        if isinstance(found, BaseException):
            raise found
        self.model.load_state_dict(found.to_torch_state_dict())

    def round(self) -> None:
        """One round of Flower's."""
        self.go.put(True)
        self.wait()

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        return evaluate(self.model, self.problem.test)

    def close(self) -> None:
        """Let Flower take its actors down before Python goes."""
        self.thread.join(timeout=60)
