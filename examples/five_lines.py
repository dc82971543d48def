"""Federated training in five lines: a module, clients from tensors, a server, rounds, the model."""

import torch
from torch import nn

from fedtorch import Client, Recipe, Server

x = torch.randn(300, 4)
y = (x.sum(1) > 0).long()

model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
clients = [Client(f"c{k}", (x[k::3], y[k::3])) for k in range(3)]
server = Server(model, clients, Recipe(lr=0.5, batch_size=10))
for figures in server.rounds(10):
    print(f"round {figures['round']:>2}  train loss {figures['train_loss']:.3f}")
accuracy = (server.model(x).argmax(1) == y).float().mean()
print(f"accuracy {accuracy:.3f}")
