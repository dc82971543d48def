"""What moves a client's weights in a local step: its optimizer, and the learning rate within a visit."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fedtorch.options import TrainingOptions, shown
from fedtorch.recipe import Recipe
from fedtorch.training.batches import steps_of
from fedtorch.training.optimizer import ClientOptimizer, fits_not
from fedtorch.tree import per_client
from fedtorch.types import ConfigError

OWN = "a visit is a local update of your own (local)"
VARIES = "the learning rate changes within a visit"


def stepper(
    recipe: Recipe, model: nn.Module, params: Mapping[str, Tensor], lr: float, steps: int
) -> Callable[[], Any]:
    """What takes each of a visit's ``steps``: moves ``params`` of ``model`` along their gradients.

    SGD on a CPU is done here: the same arithmetic without the profiler and compiler entries around
    torch's own, which take longer than the step of a small model.
    """
    client = recipe.client_optimizer
    asked = {k: v for k, v in client.args.items() if v}
    here = asked.keys() <= {"momentum", "dampening", "weight_decay", "nesterov"}
    here = here and next(iter(params.values())).device.type == "cpu" and not varies(recipe)
    if here and client.maker() is torch.optim.SGD:
        return Descent([*params.values()], lr, **asked)
    made = optimizers(client, model, params, lr)
    schedules = [schedule(recipe, o, steps) for o in made] if varies(recipe) else []
    moves: list[Callable[[], Any]] = [o.step for o in made]
    moves += [s.step for s in schedules]
    return moves[0] if len(moves) == 1 else lambda: [move() for move in moves]


def optimizers(
    client: ClientOptimizer, model: nn.Module, params: Mapping[str, Tensor], lr: float
) -> Sequence[Optimizer]:
    """Fresh optimizers of ``params``, which are the trainable ones of ``model``.

    Raises ConfigError where a function's leave some out, step some twice or have others.
    """
    make, name = client.maker(), f"client optimizer {client.words}"
    if isinstance(make, type):
        return [client.build(params.values(), lr)]
    made = make(model, lr, **client.args)
    made = [*made] if isinstance(made, (list, tuple)) else [made]
    if odd := [o for o in made if not isinstance(o, Optimizer)]:
        raise ConfigError(
            f"{name} must return a torch.optim.Optimizer, or a list of them, got {shown(odd[0])}"
        )
    for o in made:
        fits_not(type(o))
    held = [p for o in made for group in o.param_groups for p in group["params"]]
    own, times = {id(p) for p in model.parameters()}, Counter(map(id, held))
    if foreign := [p for p in held if id(p) not in own]:
        raise ConfigError(
            f"{name} has a parameter {list(foreign[0].shape)} that is none of the model's: take parameters "
            "from the model that the function is given, and have all that it trains in it"
        )
    if missing := [k for k, p in params.items() if id(p) not in times]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{name} leaves out parameter {', '.join(missing[:3])}{more}: give it every trainable "
            "parameter, and call requires_grad_(False) on what is not to be trained"
        )
    if twice := [k for k, p in params.items() if times[id(p)] > 1]:
        raise ConfigError(f"{name} steps parameter {twice[0]} twice: give it to one optimizer")
    return made


def notes(model: nn.Module, sizes: Sequence[int], recipe: Recipe) -> list[str]:
    """What to say of the learning rates; raises ConfigError where a warm-up never ends.

    ``sizes``: examples of each client.
    """
    plan, client = recipe.privacy.per_example, recipe.client_optimizer
    most = plan.steps if plan else max(steps_of(n, recipe) for n in sizes)
    if recipe.lr_warmup > most:
        raise ConfigError(
            f"lr_warmup {recipe.lr_warmup} is longer than any client's visit, so that no step would have "
            "the full learning rate: take fewer, or more epochs"
        )
    if recipe.scheduler is not None:
        least = plan.steps if plan else min(steps_of(n, recipe) for n in sizes)
        for steps in {least: 0, most: 0}:
            _to_its_end(recipe, model, steps)
    beside = plan is None and recipe.steps is not None and recipe.epochs != TrainingOptions().epochs
    said = (
        [f"steps {recipe.steps} a visit: epochs {recipe.epochs} does not apply"] if beside else []
    )
    if isinstance(client.maker(), type):
        return said
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    found = []
    for lr in (recipe.learning_rate, recipe.learning_rate / 2):
        try:
            made = optimizers(client, model, params, lr)
        except Exception:  # the rate is none for it, so it looks at it
            return said
        found.append([g["lr"] for o in made for g in o.param_groups])
    if found[0] != found[1]:
        return said
    return [
        *said,
        f"client optimizer {client.words} has learning rates of its own: lr and schedule do not change "
        "them",
    ]


def _to_its_end(recipe: Recipe, model: nn.Module, steps: int) -> None:
    """Raises ConfigError where a scheduler fails within a visit of so many steps."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    taken = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizers take no step here
            made = optimizers(recipe.client_optimizer, model, params, recipe.learning_rate)
            schedules = [schedule(recipe, o, steps) for o in made]
            while taken < steps:
                taken += 1
                for s in schedules:
                    s.step()
    except ConfigError:
        raise
    except Exception as e:
        raise ConfigError(
            f"scheduler fails after step {taken} of a visit of {steps} steps ({type(e).__name__}: {e}): it "
            "is called as fn(optimizer, steps) with how many steps there are"
        ) from e


def varies(recipe: Recipe) -> bool:
    """Whether the learning rate changes within a visit."""
    return bool(recipe.scheduler or recipe.lr_warmup or recipe.lr_decay != "constant")


def one_by_one(recipe: Recipe) -> str | None:
    """Why clients must train one after another, whatever their model; None: they need not."""
    if recipe.local is not None:
        return OWN
    if recipe.strategy.contrasts:
        return f"{type(recipe.strategy).__name__} has an objective of its own for each"
    if not recipe.client_optimizer.elementwise:
        words = recipe.client_optimizer.words
        if not isinstance(recipe.client_optimizer.maker(), type):
            return f"optimizer {words} is made for one model"
        return f"optimizer {words} does not work element by element"
    if recipe.accumulate > 1:
        return "a step is made of several batches (accumulate)"
    return VARIES if varies(recipe) else None


def schedule(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler:
    """What changes the learning rate after each of a visit's steps, in all groups of the optimizer."""
    if recipe.scheduler is None:
        return LambdaLR(optimizer, lambda t: factor(recipe, t, steps))
    try:
        made = recipe.scheduler(optimizer, steps)
    except Exception as e:
        raise ConfigError(
            f"scheduler fails, called as fn(optimizer, {steps}): {type(e).__name__}: {e}"
        ) from e
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler must return an LRScheduler of torch that needs no metric, got " + shown(made)
        )
    return made


def factor(options: TrainingOptions, t: int, steps: int) -> float:
    """What share of the learning rate local step ``t``, from 0, of a visit takes.

    It rises in equal parts to 1, and falls as torch's LinearLR and CosineAnnealingLR over what is left.
    """
    if t < options.lr_warmup:
        return (t + 1) / options.lr_warmup
    done = (t - options.lr_warmup) / max(1, steps - options.lr_warmup)
    fallen = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}
    return 1 - (1 - options.lr_floor) * fallen[options.lr_decay]


def rates(recipe: Recipe, lr: float, steps: Tensor) -> Tensor:
    """Each client's learning rates of a visit of so many ``steps``, summed, [K], float64.

    NaN under a scheduler of the user's own, which nobody else can foretell.
    """
    if not varies(recipe) or recipe.scheduler:
        return torch.from_numpy(steps.numpy() * (math.nan if recipe.scheduler else float(lr)))
    sums = {n: lr * sum(factor(recipe, t, n) for t in range(n)) for n in {*steps.tolist()}}
    return torch.tensor([sums[n] for n in steps.tolist()], dtype=torch.float64)


def reach(recipe: Recipe, lr: float, steps: Tensor, pull: float) -> Tensor:
    """How far each client's SGD goes in its ``steps`` where every gradient is 1 + pull w, over lr, [K].

    FedNova's norm of a, for any momentum, decay and rates (Wang et al. 2020, arXiv:2007.07481, section 4).
    """
    args = recipe.client_optimizer.args
    found = {
        n: _walk(args, [factor(recipe, t, n) for t in range(n)], lr, pull)
        for n in {*steps.tolist()}
    }
    return torch.tensor([found[n] for n in steps.tolist()], dtype=torch.float64)


def _walk(args: Mapping[str, Any], rates: Sequence[float], lr: float, pull: float) -> float:
    """``Descent`` on one number, away from 0, in units of lr."""
    momentum, fresh = args.get("momentum", 0), 1 - args.get("dampening", 0)
    held = lr * (pull + args.get("weight_decay", 0))
    x = velocity = 0.0
    for t, rate in enumerate(rates):
        g = 1 - held * x
        if momentum:
            velocity = momentum * velocity + fresh * g if t else g
            g = g + momentum * velocity if args.get("nesterov") else velocity
        x += rate * g
    return x


def clip(params: Mapping[str, Tensor], most: float) -> None:
    """Scale gradients [K, ...] so that no client's are together longer than ``most``, as torch does."""
    grads = [p.grad for p in params.values() if p.grad is not None]
    squares = [g.reshape(len(g), -1).square().sum(1) for g in grads]
    share = (most / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1)
    for g in grads:
        g.mul_(per_client(share, g))


class Descent:
    """``torch.optim.SGD``, bit for bit; parameters without a gradient stay as they are."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.momentum, self.fresh, self.nesterov = momentum, 1 - dampening, nesterov
        self.velocity: dict[int, Tensor] = {}
        self._unrecorded = torch.no_grad()

    def __call__(self) -> None:
        """One step."""
        with self._unrecorded:
            for k, p in enumerate(self.params):
                g = p.grad
                if g is None:
                    continue
                if self.weight_decay:
                    g = g.add(p, alpha=self.weight_decay)
                if self.momentum:
                    g = self._heavy(k, g)
                p.add_(g, alpha=-self.lr)

    def _heavy(self, k: int, g: Tensor) -> Tensor:
        if k not in self.velocity:
            self.velocity[k] = g.clone()
        else:
            self.velocity[k].mul_(self.momentum).add_(g, alpha=self.fresh)
        v = self.velocity[k]
        return g.add(v, alpha=self.momentum) if self.nesterov else v
