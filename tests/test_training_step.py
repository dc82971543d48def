"""A step of one's own trains as a loop by hand does: every kind of batch, solver, plan and engine."""

import copy
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, StackDataset, Subset, TensorDataset

from conftest import mlp
from fedtorch import Client, ConfigError, Local, Recipe, Server, evaluate
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.training.batches import fetch
from fedtorch.training.losses import cross_entropy, reduce
from fedtorch.training.step import Supervised, backward


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda output, target: cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target),  # one number for the whole batch
    ],
)
@pytest.mark.parametrize("size", [1, 3, 7, 10, 33])
def test_backward_leaves_the_gradient_of_the_mean_to_the_last_bit(loss, size):
    g = torch.Generator().manual_seed(size)
    plain = torch.randn(size, 5, generator=g).requires_grad_()
    target = torch.randint(0, 5, (size,), generator=g)
    ours = plain.detach().clone().requires_grad_()
    expected = reduce(loss(plain, target)).mean()
    expected.backward()
    value = backward(Supervised(loss), nn.Identity(), (ours, target))
    assert torch.equal(ours.grad, plain.grad)
    assert not value.requires_grad
    assert torch.allclose(value, expected)


def test_an_ignored_target_still_counts_in_the_batch():
    x = torch.randn(4, 5).requires_grad_()
    target = torch.tensor([1, -100, 2, -100])
    value = backward(Supervised(cross_entropy), nn.Identity(), (x, target))
    assert torch.allclose(value, cross_entropy(x, target).mean())
    assert not x.grad[1].any()


def test_backward_of_sequences_is_the_mean_over_all_of_them():
    x, y = torch.randn(3, 5, 7).requires_grad_(), torch.randint(0, 5, (3, 7))
    backward(Supervised(cross_entropy), nn.Identity(), (x, y))
    twin = x.detach().clone().requires_grad_()
    F.cross_entropy(twin, y).backward()
    assert torch.allclose(x.grad, twin.grad)


def test_a_recipe_has_a_loss_or_a_step():
    with pytest.raises(ConfigError, match="leave out one"):
        Recipe(loss=F.mse_loss, step=lambda model, batch: model(batch).mean())
    with pytest.raises(ConfigError, match="step must be a function"):
        Recipe(step=3)


N, CLIENTS, LR, CLIP = 24, 3, 0.3, 0.5
DRAW = torch.Generator().manual_seed(3)
X = torch.randn(N, 6, generator=DRAW)
Y = (X[:, 0] > 0).long()
MAPS = torch.randn(N, 2, 5, 4, generator=DRAW)
Two = namedtuple("Two", "left right")


class Parts(nn.Module):
    """Layers that steps use one by one, and a forward with several outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 6)

    def encode(self, x):
        return self.body(x).tanh()

    def forward(self, x):
        h = self.encode(x)
        return {"class": self.head(h), "back": self.other(h)}


def parts_but(*frozen):
    def make() -> Parts:
        model = Parts()
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        return model

    return make


def vae(model, batch):
    h = model.encode(batch["x"])
    mean, spread = model.other(h)[:, :3], model.other(h)[:, 3:]
    z = torch.cat([mean + batch["eps"] * spread.exp(), torch.zeros_like(mean)[:, :2]], 1)
    kl = 0.5 * (mean.square() + spread.exp().square() - 1 - 2 * spread).sum(1)
    return model.head(z).sub(batch["x"][:, :2]).square().sum(1) + kl


def tasks(model, batch):
    output = model(batch["x"])
    back = F.mse_loss(output["back"], batch["y"]["back"], reduction="none")
    return cross_entropy(output["class"], batch["y"]["class"]) + back.mean(1)


def penalised(model, batch):
    x, y = batch
    return cross_entropy(model(x)["class"], y) + 1e-3 * model.head.weight.norm()


def smooth(model, batch):
    x, y = batch
    output = model(x.requires_grad_())["class"]
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return cross_entropy(output, y) + 0.1 * slope.square().sum(1)


def siamese(model, batch):
    left, right, same = batch
    apart = (model.encode(left) - model.encode(right)).norm(dim=1)
    return torch.where(same == 1, apart, F.relu(1 - apart)).square()


def contrastive(model, batch):
    a, b = (F.normalize(model.encode(v), dim=1) for v in batch)
    return F.cross_entropy(5 * a @ b.T, torch.arange(len(a)))


def distilled(teacher, model, batch):
    x, y = batch
    student, taught = model(x)["class"], teacher(x)[:, :2]
    soft = F.kl_div(student.log_softmax(1), taught.softmax(1), reduction="none").sum(1)
    return cross_entropy(student, y) + soft


class Spelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(x).log_softmax(2)


def spelling(model, batch):
    logs = model(batch["sound"]).transpose(0, 1)
    lengths = batch["frames"], batch["letters"]
    return F.ctc_loss(logs, batch["text"], *lengths, reduction="none", zero_infinity=True)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.out = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.out(self.body(x).relu())


def segments(model, batch):
    x, y = batch
    return cross_entropy(model(x), y).flatten(1).mean(1)


@dataclass
class Answer:
    """As libraries of language models give it."""

    loss: Tensor | None
    logits: Tensor


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(9, 5), nn.Linear(5, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None]
        logits = self.out((self.words(input_ids) * mask).sum(1) / mask.sum(1))
        return Answer(None if labels is None else F.cross_entropy(logits, labels), logits)


def answered(model, batch):
    return model(**batch).loss


def answers(model, batch):
    labels = batch.pop("labels")
    return cross_entropy(model(**batch).logits, labels)


TEXTS = dict(
    input_ids=torch.randint(0, 9, (N, 7), generator=DRAW),
    attention_mask=(torch.arange(7) < torch.randint(2, 8, (N, 1), generator=DRAW)).long(),
    labels=Y,
)
SOUNDS = dict(
    sound=torch.randn(N, 8, 6, generator=DRAW),
    text=torch.randint(1, 4, (N, 3), generator=DRAW),
    frames=torch.full((N,), 8),
    letters=torch.randint(1, 4, (N,), generator=DRAW),
)
KINDS = {
    "vae": (Parts, vae, StackDataset(x=X, eps=MAPS[:, 0, 0, :3])),
    "tasks": (Parts, tasks, StackDataset(x=X, y=StackDataset(**{"class": Y, "back": X.flip(1)}))),
    "penalised": (parts_but("other"), penalised, TensorDataset(X, Y)),
    "smooth": (parts_but("other"), smooth, TensorDataset(X, Y)),
    "siamese": (parts_but("head", "other"), siamese, TensorDataset(X, X.roll(1, 0), Y)),
    "contrastive": (parts_but("head", "other"), contrastive, TensorDataset(X, X + 0.1)),
    "distilled": (
        parts_but("other"),
        partial(distilled, mlp().eval().requires_grad_(False)),
        TensorDataset(X, Y),
    ),
    "spelling": (Spelled, spelling, StackDataset(**SOUNDS)),
    "segments": (Maps, segments, TensorDataset(MAPS, (MAPS[:, 0] > 0).long())),
    "answered": (Reader, answered, StackDataset(**TEXTS)),
    "answers": (Reader, answers, StackDataset(**TEXTS)),
}
WHOLE = ("contrastive", "answered")
"""Those with one number for a batch."""


def clients(data: Dataset) -> list[Client]:
    if isinstance(data, TensorDataset):
        parts = [TensorDataset(*(t[k::CLIENTS] for t in data.tensors)) for k in range(CLIENTS)]
    else:
        parts = [Subset(data, range(k, N, CLIENTS)) for k in range(CLIENTS)]
    return [Client(str(k), part) for k, part in enumerate(parts)]


def by_hand(start: nn.Module, step, data: list[Dataset], clip: float | None) -> list[Tensor]:
    """A step of each client on all of its data, and their mean; ``clip``: of each example's gradient."""
    total = [torch.zeros_like(p) for p in start.parameters()]
    for part in data:
        model, n = copy.deepcopy(start), len(part)
        each = [torch.arange(n)] if clip is None else torch.arange(n).split(1)
        for index in each:
            loss = reduce(step(model, fetch(part, index))).mean()
            loss.backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            model.zero_grad()
            norm = torch.cat([g.flatten() for g in grads]).norm()
            factor = 1.0 if clip is None else min(1.0, clip / max(float(norm), 1e-9)) / n
            for t, g in zip(total, grads, strict=True):
                t -= LR * factor * g / len(data)
    return total


def apart(server: Server, start: nn.Module, way: list[Tensor]) -> float:
    """How far the model is from where ``way`` leads, over the length of the way."""
    ends = zip(server.model.parameters(), start.parameters(), way, strict=True)
    far = torch.cat([(p.detach() - q.detach() - w).flatten() for p, q, w in ends])
    return float(far.norm() / torch.cat([w.flatten() for w in way]).norm())


def trained(kind: str, plan=None, **engine) -> float:
    make, step, data = KINDS[kind]
    start = make()
    options = {} if isinstance(plan, SampleLevel) else dict(steps=1, batch_size=None)
    runs_on = engine.pop("engine", None) or Local(**engine)
    recipe = Recipe(step=step, lr=LR, privacy=plan, **options)
    server = Server(make(), clients(data), recipe, engine=runs_on)
    server.round()
    server.close()
    if "solver" in engine and plan is None:
        assert server.session.choice.solver.__name__ == engine["solver"]
    clip = CLIP if isinstance(plan, SampleLevel) else None
    return apart(server, start, by_hand(start, step, [c.data for c in clients(data)], clip))


@pytest.mark.parametrize("solver", ["general", "stacked"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "smooth"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of ctc_loss under vmap
def test_a_step_trains_as_by_hand(kind, solver):
    assert trained(kind, solver=solver, chunk=CLIENTS) < 1e-5


def test_a_step_that_torch_func_cannot_follow_trains_clients_one_by_one():
    assert trained("smooth", chunk=CLIENTS) < 1e-5


def sample(**options) -> SampleLevel:
    n = N // CLIENTS
    return SampleLevel(
        noise_multiplier=1e-7,
        sample_rate=1.0,
        steps=1,
        batch_size=n,
        clip=CLIP,
        rounds=1,
        **options,
    )


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in WHOLE])
def test_a_step_is_clipped_example_by_example(kind):
    assert trained(kind, sample()) < 1e-4


@pytest.mark.parametrize("kind", WHOLE)
def test_a_step_of_whole_batches_protects_clients_and_not_examples(kind):
    assert trained(kind, ClientLevel(noise_multiplier=1e-7, clip=10.0, rounds=1)) < 1e-4
    with pytest.raises(
        ConfigError, match=r"this step gives one .* return one loss for each example"
    ):
        trained(kind, sample())


def test_no_mode_leaves_out_a_penalty_that_it_cannot_see():
    for mode in ("hooks", "ghost"):
        with pytest.raises(ConfigError, match="as by a penalty"):
            trained("penalised", sample(mode=mode))
    for mode in ("stacked", "alone"):
        assert trained("penalised", sample(mode=mode)) < 1e-4


def test_a_step_travels_to_worker_processes():
    assert trained("distilled", engine=Processes(workers=1)) < 1e-5
    with pytest.raises(ConfigError, match="top level of a module"):
        recipe = Recipe(step=lambda model, batch: segments(model, batch))
        Server(Maps(), clients(KINDS["segments"][2]), recipe, engine=Processes(workers=1))


def test_data_that_are_no_pairs_ask_for_a_step():
    who = clients(KINDS["answers"][2])
    with pytest.raises(
        ConfigError, match=r"client 0: a dataset must give .*Recipe\(step=fn\).* a dict"
    ):
        Server(Reader(), who)
    with pytest.raises(ConfigError, match=r"evaluate\(..., step=fn\)"):
        evaluate(Reader(), who[0].data, {"loss": cross_entropy})


def test_a_step_says_itself_what_its_losses_are_added_to():
    table = TensorDataset(torch.randn(12, 3), torch.randn(12, 2))

    def each(model, batch):
        return (model(batch[0]) - batch[1]) ** 2

    with pytest.raises(ConfigError, match=r"must return one .* got \[12, 2\]: .*mean\(1\)"):
        Server(nn.Linear(3, 2), [Client("a", table)], Recipe(step=each))
    mean = Recipe(step=lambda model, batch: each(model, batch).flatten(1).mean(1))
    assert "train_loss" in Server(nn.Linear(3, 2), [Client("a", table)], mean).round()


def test_a_step_uses_the_model_that_it_is_given():
    model = Maps()
    recipe = Recipe(step=lambda _, batch: segments(model, batch))
    with pytest.raises(ConfigError, match=r"step.* the model that it is given"):
        Server(model, clients(KINDS["segments"][2]), recipe)
