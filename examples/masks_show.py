"""What a sum under masks still shows: images of ten clients, divided out of the step of the server.

    python examples/masks_show.py [PNG]

Ten clients hold one handwritten digit each and take one step. The server sees the mean of their updates and
nothing else (``Secure``). A neuron of the first layer that only one client's image has moved gives that
image away: the change of its weights over the change of its bias. With noise of each client's own under the
same masks (``SampleLevel``) the division gives noise.
"""

import sys

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedtorch import Client, Recipe, Secure, Server
from fedtorch.data import Digits
from fedtorch.privacy import SampleLevel

CLIENTS, NEURONS, GOOD = 10, 256, 20.0  # decibels from which an image counts as found

NOISE = SampleLevel(epsilon=8.0, delta=1e-5, rounds=1, sample_rate=1.0, steps=1, batch_size=1)


def held() -> tuple[Tensor, Tensor]:
    """An image [1, 8, 8] and its label of each client."""
    data = Digits().load(0).train
    images, labels = zip(*(data[k] for k in range(CLIENTS)), strict=True)
    return torch.stack(images), torch.stack(labels)


def step(images: Tensor, labels: Tensor, plan: SampleLevel | None) -> tuple[Tensor, Tensor]:
    """How the first layer has moved after one round under masks: weights [N, 64] and biases [N]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, NEURONS), nn.ReLU(), nn.Linear(NEURONS, 10))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    clients = [
        Client(f"client {k}", (images[k : k + 1], labels[k : k + 1])) for k in range(CLIENTS)
    ]
    Server(model, clients, Recipe(aggregator=Secure(), privacy=plan, lr=0.1, epochs=1)).round()
    after = model.state_dict()
    return after["1.weight"] - before["1.weight"], after["1.bias"] - before["1.bias"]


def divided(weights: Tensor, biases: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The row of the division that is nearest to each image, and how near in decibels: [K, 64], [K]."""
    moved = biases.abs() > 1e-9
    rows = (weights[moved] / biases[moved, None]).clamp(0, 1)
    error = (images.flatten(1)[:, None] - rows).square().mean(2)
    return rows[error.argmin(1)], -10 * error.min(1).values.clamp(min=1e-12).log10()


def main(path: str) -> None:
    """Three rows of pictures: what clients hold, what the sum shows, and what is left of it under noise."""
    images, labels = held()
    figure = Figure(figsize=(CLIENTS, 3.6), layout="constrained")
    axes = figure.subplots(3, CLIENTS)
    rows = {"held": (images.flatten(1), None)}
    for name, plan in (("masks", None), ("masks and noise", NOISE)):
        rows[name] = divided(*step(images, labels, plan), images)
        print(f"{name}: {int((rows[name][1] > GOOD).sum())} of {CLIENTS} images above {GOOD:g} dB")
    for line, (name, (pictures, near)) in zip(axes, rows.items(), strict=True):
        for k, (place, picture) in enumerate(zip(line, pictures, strict=True)):
            place.imshow(picture.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
            if near is not None:
                place.set_title(f"{near[k]:.0f} dB", fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else "masks_show.png")
