"""The FedAvg paper's CNN (McMahan et al. 2017, arXiv:1602.05629, sec. 3).

Two 5x5 convolutions (32, 64 channels), each with 2x2 max pooling, a hidden layer of 512, 1,663,370
parameters on 28x28 images. Smaller images and channels work too.
"""

from torch import nn


def build(
    input_shape: tuple[int, int, int],
    num_outputs: int,
    width: int = 32,
    hidden: int = 512,
    kernel: int = 5,
) -> nn.Module:
    """Input [B, channels, rows, columns] -> logits [B, num_outputs]."""
    if len(input_shape) != 3:
        raise ValueError(f"images [channels, rows, columns] are needed, not {list(input_shape)}")
    channels, rows, columns = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (rows // 4) * (columns // 4), hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_outputs),
    )
