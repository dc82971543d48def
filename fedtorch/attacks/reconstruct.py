"""Examples out of gradients: divided out of a linear layer, or found as what has the same gradient.

Whoever sees one step of SGD knows the gradient but for its length, which neither way needs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedtorch import seeds
from fedtorch.training.module import forward
from fedtorch.training.outline import copied
from fedtorch.training.step import Step, asked
from fedtorch.types import ConfigError, Params

STEPS = 300
"""Of Adam by the sign of its gradient (Geiping et al. 2020)."""
POLISH = 200
"""Of L-BFGS behind them (Zhu et al. 2019)."""
RATE = 0.1
"""Adam's step at first, over the range of the data; it falls by a cosine."""
SMOOTH = 0.01
"""How much total variation weighs beside the distance of gradients, for Adam alone."""


def first_layer(model: nn.Module, x: Tensor) -> str | None:
    """The linear layer with a bias that takes the flat input before any other has changed it, by name."""
    seen: list[tuple[str, Tensor]] = []
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        m.register_forward_pre_hook(lambda _, given, n=n: seen.append((n, given[0])))
        for n, m in linear.items()
    ]
    try:
        with torch.no_grad(), seeds.seeded(0):
            forward(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, given in seen:
        if linear[name].bias is not None and given.shape == x.flatten(1).shape:
            return name if torch.equal(given, x.flatten(1)) else None
    return None


def divide(weight: Tensor, bias: Tensor) -> Tensor:
    """A layer's inputs, by the change of its weights [N, d] and of its biases [N]: a row a neuron, [M, d].

    A neuron's gradient by its weights is the input times that by its bias. So where one example alone has
    moved a neuron its row is that example; else it is a mean of those that have. The neuron that has moved
    most comes first, and those at rest give none.
    """
    order = bias.abs().argsort(descending=True, stable=True)
    moved = order[bias[order] != 0]
    return (weight[moved] / bias[moved, None]).double()


def label(gradient: Tensor) -> int:
    """The class of a single example, by the gradient of cross entropy by the last biases [C].

    It is the softmax less one for the right class, and so negative there alone (Zhao et al. 2020,
    arXiv:2001.02610). Of a layer without biases the sums of rows of its weights do nearly as well.
    """
    return int(gradient.flatten(1).sum(1).argmin() if gradient.dim() > 1 else gradient.argmin())


def match(
    model: nn.Module,
    step: Step,
    gradient: Params,
    shape: torch.Size,
    target: Tensor,
    low: float,
    high: float,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """One example whose gradient points where the ``gradient`` seen points, and one less their cosine.

    ``shape``: of the example. ``target``: its class, [1]. ``low``, ``high``: the range of the data. Sign
    steps of Adam on the cosine and total variation (arXiv:2003.14053) come near, L-BFGS without the latter
    closes in (arXiv:1906.08935), in float64.
    """
    model = copied(model).double().train()
    for m in model.modules():  # nobody knows which units were dropped
        m.training = m.training and not isinstance(m, nn.modules.dropout._DropoutNd)
    params = {k: p for k, p in model.named_parameters() if k in gradient and p.requires_grad}
    seen = [gradient[k].double() for k in params]
    length = torch.stack([v.square().sum() for v in seen]).sum().sqrt()
    draw = torch.Generator().manual_seed(seed)
    start = torch.rand((1, *shape), generator=draw, dtype=torch.float64)
    x = (low + (high - low) * start).requires_grad_()

    def apart() -> Tensor:
        loss = asked(step, model, (x, target)).mean()
        own = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
        pairs = [(a, b) for a, b in zip(own, seen, strict=True) if a is not None]
        norm = torch.stack([a.square().sum() for a, _ in pairs]).sum().clamp(min=1e-300).sqrt()
        return 1 - torch.stack([(a * b).sum() for a, b in pairs]).sum() / norm / length

    adam = torch.optim.Adam([x], lr=RATE * (high - low))
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        (slope,) = torch.autograd.grad(apart() + SMOOTH * roughness(x) / (high - low), x)
        x.grad = slope.sign()
        adam.step()
        falls.step()
        with torch.no_grad():
            x.clamp_(low, high)
    newton = torch.optim.LBFGS(
        [x], max_iter=POLISH, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-14,
        tolerance_change=1e-16,
    )  # fmt: skip

    def closure() -> Tensor:
        distance = apart()
        (x.grad,) = torch.autograd.grad(distance, x)
        return distance

    newton.step(closure)
    return x.detach(), float(apart().detach())


def roughness(x: Tensor) -> Tensor:
    """Mean difference of neighbours, along rows and columns of images (total variation)."""
    if x.dim() < 4:
        return x.new_zeros(())
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    return sum((d.abs().mean() for d in (across, down) if d.numel()), x.new_zeros(()))


def psnr(found: Tensor, true: Tensor, low: float, high: float) -> Tensor:
    """How near in decibels, of each example, [N]: the peak is the range of the data; 120 is exact.

    What was found is cut to the range, which an attacker knows.
    """
    error = (found.clamp(low, high) - true).double().flatten(1).square().mean(1)
    return -10 * (error / (high - low) ** 2).clamp(min=1e-12).log10()


def nearest(rows: Tensor, true: Tensor, low: float, high: float) -> Tensor:
    """Of rows [M, d] the one nearest to each of [N, d]: the best that an attacker could pick, [N, d]."""
    if not len(rows):
        return torch.full_like(true, (low + high) / 2)
    apart = torch.stack([(rows.clamp(low, high) - t).square().mean(1) for t in true])
    return rows[apart.argmin(1)]


def last_of(gradient: Mapping[str, Tensor], classes: int) -> Tensor:
    """The gradient by the last biases, or weights where it has none; raises ConfigError without either."""
    for v in reversed([*gradient.values()]):
        if v.dim() in (1, 2) and len(v) == classes:
            return v
    raise ConfigError(
        f"attack gradient reads the class out of a last layer with {classes} outputs, and the model's "
        "last weights have no such shape: attack a model that ends in a linear layer"
    )
