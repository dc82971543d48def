"""A well-known toy, done right: five clients, a mean vector as the model, ten rounds.

Each client holds 100 rows of 10 numbers and its "model" is the mean of its rows. In the toy a client
mixes what it learnt with what it was sent, "0.9 local + 0.1 global", and the server averages. That mix is
not a trick: it is the exact solution of FedProx's local problem (Li et al. 2020, arXiv:1812.06127, eq. 2)

    minimise over w    1/2 ||w - m_k||^2  +  mu/2 ||w - w_t||^2
    solved by          w = (m_k + mu w_t) / (1 + mu)

for the client's mean m_k and the global model w_t, with 1 / (1 + mu) = 0.9, so mu = 1/9. Gradient descent
with step size 1 / (1 + mu) lands on it in one step and stays there, however many steps follow.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedtorch import Client, FedProx, Recipe, Server

LOCAL = 0.9
MU = 1 / LOCAL - 1


class MeanVector(nn.Module):
    """A model that answers every row with one vector."""

    def __init__(self, columns: int) -> None:
        """Start from zero."""
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(columns, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Rows [B, columns] -> the vector for each, [B, columns]."""
        return self.vector.expand_as(x)


def half_squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """1/2 ||w - row||^2 for each row; over a client's rows its minimum is their mean."""
    return (output - target).square().sum(1) / 2


def make_clients(clients: int = 5, rows: int = 100, columns: int = 10) -> list[Client]:
    """Rows around a centre of each client's own."""
    made = []
    for k in range(clients):
        generator = torch.Generator().manual_seed(k)
        centre = 4 * torch.rand(columns, generator=generator, dtype=torch.float64)
        x = centre + torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        made.append(Client(f"client {k}", (x, x)))
    return made


def rounds(clients: list[Client], n: int = 10) -> Iterator[Tensor]:
    """The global model after each round."""
    recipe = Recipe(FedProx(mu=MU), loss=half_squared_distance, lr=LOCAL, steps=5, batch_size=None)
    server = Server(MeanVector(10), clients, recipe)
    for _ in server.rounds(n):
        yield server.model.vector.detach().clone()


def recurrence(clients: list[Client], n: int = 10) -> Iterator[Tensor]:
    """The toy as it is usually written, in plain tensors."""
    means = [client.data.tensors[0].mean(0) for client in clients]
    model = torch.zeros(10, dtype=torch.float64)
    for _ in range(n):
        model = torch.stack([LOCAL * m + (1 - LOCAL) * model for m in means]).mean(0)
        yield model


def main() -> None:
    """Print the global model of each round beside what the toy's own formula gives."""
    clients = make_clients()
    print(f"FedProx with mu = {MU:.4f} is {LOCAL} local + {1 - LOCAL:.1f} global")
    worst = 0.0
    for t, (ours, toy) in enumerate(zip(rounds(clients), recurrence(clients), strict=True), 1):
        print(f"round {t:>2}  [{'  '.join(f'{v:.4f}' for v in ours.tolist())}]")
        worst = max(worst, float((ours - toy).abs().max()))
    print(f"largest difference from 0.9 local + 0.1 global over all rounds: {worst:.1e}")


if __name__ == "__main__":
    main()
