"""Algorithm 1 of McMahan et al. (2017), FederatedAveraging, in plain PyTorch, and ``Server`` beside it.

The last line demands that both end with the same weights, bit for bit.
"""

import copy

import torch
from torch import nn

from fedtorch import Client, Local, Recipe, Server, Uniform, seeds

K, C, E, B, ETA, ROUNDS = (
    6,
    0.5,
    2,
    10,
    0.1,
    4,
)  # clients, share of them, epochs, batch, rate, rounds
torch.manual_seed(0)
x = torch.randn(310, 20)
y = (x @ torch.randn(20, 3)).argmax(1)
data = [(x[k * 40 :][: 30 + 10 * k], y[k * 40 :][: 30 + 10 * k]) for k in range(K)]
model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def client_update(k: int, t: int, w: dict) -> dict:
    """E epochs of mini-batch SGD from w; round and client decide the order of the examples."""
    (x, y), local = data[k], copy.deepcopy(model)
    local.load_state_dict(w)
    sgd = torch.optim.SGD(local.parameters(), lr=ETA)
    shuffle = seeds.generator(0, "order", t, f"client {k}")
    for _ in range(E):
        for batch in torch.randperm(len(x), generator=shuffle).split(B):
            sgd.zero_grad()
            nn.functional.cross_entropy(local(x[batch]), y[batch]).backward()
            sgd.step()
    return local.state_dict()


# the server: w <- sum over the chosen clients of n_k / n times their weights
names = [f"client {k}" for k in range(K)]
m = int(C * K)
w = copy.deepcopy(model.state_dict())
for t in range(ROUNDS):
    chosen = torch.randperm(K, generator=seeds.generator(0, "cohort", t))[:m].sort().values.tolist()
    n = sum(len(data[k][0]) for k in chosen)
    change = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in w.items()}
    for k in chosen:
        trained = client_update(k, t, w)
        for name in w:  # in float64, where the change of a float32 weight is exact
            change[name] += len(data[k][0]) / n * (trained[name].double() - w[name].double())
    w = {name: (v.double() + change[name]).float() for name, v in w.items()}

# the same by fedtorch
clients = [Client(name, pair) for name, pair in zip(names, data, strict=True)]
recipe = Recipe(lr=ETA, epochs=E, batch_size=B)
part, engine = Uniform(cohort_size=m), Local(solver="general")
server = Server(model, clients, recipe, participation=part, engine=engine, seed=0)
for figures in server.rounds(ROUNDS):
    print(
        f"round {figures['round']}  clients {figures['clients']}  loss {figures['train_loss']:.4f}"
    )
assert all(torch.equal(v, w[name]) for name, v in server.model.state_dict().items())
