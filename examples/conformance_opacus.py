"""Opacus, as its tutorials use it, held to what it claims: which claims of DP-SGD does it break?

    python examples/conformance_opacus.py

``make_private`` takes sampling rate and divisor from the data loader, that is from how many examples there
are. That is a secret under adding and removing an example, which its accountants claim; and where the
rounding of floats makes the expected batch empty, the update is divided by zero.
"""

import warnings

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedtorch.privacy.conformance import Broken, Claim, Examples, broken

INPUTS, CLASSES = 20, 10
CLAIM = Claim(clip=1.0, noise=1.0, divisor=8.0)


def data(count: int = 8) -> Examples:
    """Eight examples."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, INPUTS, generator=draw)
    return x, torch.randint(0, CLASSES, (count,), generator=draw)


def release(examples: Examples, seed: int, batch_size: int = 8) -> Tensor:
    """The update of one pass of Opacus; ``batch_size`` examples are expected in a step."""
    torch.manual_seed(0)
    model = nn.Linear(INPUTS, CLASSES)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer, loader = PrivacyEngine(accountant="rdp").make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(*examples), batch_size=batch_size),
            noise_multiplier=CLAIM.noise,
            max_grad_norm=CLAIM.clip,
            noise_generator=torch.Generator().manual_seed(seed),
        )
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def main() -> list[Broken]:
    """Say what is broken, a line each."""
    found = broken(release, CLAIM, data())
    one = [
        Broken(
            "any_number_of_examples_will_do", f"batches of 1: {n} examples make it NaN or infinite"
        )
        for n in (48, 49, 50)
        if not release(data(n), 1, batch_size=1).isfinite().all()
    ]
    for claim, why in found + one:
        print(f"{claim.replace('_', ' ')}: {why}")
    return found + one


if __name__ == "__main__":
    main()
