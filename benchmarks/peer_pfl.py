"""pfl-research: its FederatedAveraging on its SimulatedBackend, PyTorch models."""

from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from torch import Tensor, nn

from benchmarks.bare import evaluate
from benchmarks.workloads import Problem


class Pfl:
    """One central iteration a round, over all users in turn."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.module = problem, problem.model()
        self.orders = problem.orders()
        module: Any = self.module
        module.loss = self.loss
        module.metrics = lambda x, y, eval=False: {"loss": Weighted(self.loss(x, y).item(), 1)}
        self.model = PyTorchModel(
            module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)
        )
        work = problem.work
        users = FederatedDataset(self.user, get_user_sampler("minimize_reuse", range(work.clients)))
        noise = GaussianMechanism(clipping_bound=1.0, relative_noise_stddev=problem.noise)
        private = [CentrallyAppliedPrivacyMechanism(noise)] if work.privacy == "client" else []
        self.backend = SimulatedBackend(users, users, private)
        self.algorithm = FederatedAveraging()
        self.training = NNTrainHyperParams(
            local_batch_size=work.batch_size, local_num_epochs=1, local_learning_rate=work.lr
        )
        self.done = 0

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Cross entropy of the module in training mode."""
        return F.cross_entropy(self.module(x), y)

    def user(self, k: int) -> Dataset:
        """The examples of a user in this round's order."""
        (x, y), order = self.problem.shards[k], self.orders[self.done][k]
        return Dataset([x[order], y[order]], user_id=str(k))

    def round(self) -> None:
        """One more central iteration."""
        once = NNAlgorithmParams(
            central_num_iterations=self.done + 1,
            evaluation_frequency=1 << 30,
            train_cohort_size=self.problem.work.clients,
            val_cohort_size=None,
        )
        self.algorithm.run(
            once, self.backend, self.model, self.training, send_metrics_to_platform=False
        )
        self.done += 1

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set."""
        model: nn.Module = self.module
        return evaluate(model, self.problem.test)
