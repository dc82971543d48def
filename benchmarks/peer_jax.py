"""JAX by hand: one jitted program a round, a scan over clients around a scan over batches."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# the flag above leaves it a pool of threads: one core, as the others
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from benchmarks.workloads import Problem

Params = list[tuple[jax.Array, jax.Array]]
"""Weight and bias [out] of each layer; the weight [in, out], of a convolution [height, width, in, out]."""


class Jax:
    """The 2NN or the CNN: layers with relu between them."""

    def __init__(self, problem: Problem) -> None:
        self.work, self.noise = problem.work, problem.noise
        values = [jnp.asarray(v.numpy()) for v in problem.model().state_dict().values()]
        self.params = layers(list(zip(values[::2], values[1::2], strict=True)))
        stack = [np.stack([s[i].numpy() for s in problem.shards]) for i in (0, 1)]
        images = self.work.model == "cnn"
        shape = (28, 28, 1) if images else (-1,)
        self.x = jnp.asarray(stack[0].reshape(*stack[0].shape[:2], *shape))
        self.y = jnp.asarray(stack[1])
        x, y = problem.test
        self.test = [jnp.asarray(x.numpy().reshape(len(x), *shape)), jnp.asarray(y.numpy())]
        self.orders = [jnp.asarray(np.stack(r)) for r in problem.orders()]
        self.key = jax.random.key(torch.initial_seed())
        self.step, self.score = jax.jit(self.one_round), jax.jit(score)

    def round(self) -> None:
        """Run the program once and wait for it."""
        self.key, key = jax.random.split(self.key)
        self.params = self.step(self.params, self.x, self.y, self.orders.pop(0), key)
        jax.block_until_ready(self.params)

    def one_round(
        self, params: Params, x: jax.Array, y: jax.Array, order: jax.Array, key: jax.Array
    ) -> Params:
        """Mean over clients, one after another."""

        def client(total: Params, data: tuple) -> tuple[Params, None]:
            x, y, order, key = data
            delta = jax.tree.map(jnp.subtract, self.visit(params, x[order], y[order], key), params)
            if self.work.privacy == "client":
                scale = shrink(delta)
                delta = jax.tree.map(lambda d: d * scale, delta)
            return jax.tree.map(jnp.add, total, delta), None

        keys = jax.random.split(key, len(x) + 1)
        zero = jax.tree.map(jnp.zeros_like, params)
        clients = x, y, order, keys[1:]
        total, _ = lax.scan(client, zero, clients, unroll=self.work.model == "cnn")
        if self.work.privacy == "client":
            total = noised(total, self.noise, keys[0])
        return jax.tree.map(lambda p, t: p + t / len(x), params, total)

    def visit(self, params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> Params:
        """One pass of SGD, private in each step where the workload is."""
        size = self.work.batch_size
        keys = jax.random.split(key, len(x) // size)

        def step(params: Params, batch: tuple) -> tuple[Params, None]:
            x, y, key = batch
            if self.work.privacy == "sample":
                each = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
                scale = jax.vmap(shrink)(each)
                total = jax.tree.map(lambda g: jnp.tensordot(scale, g, 1), each)
                grads = jax.tree.map(lambda g: g / size, noised(total, self.noise, key))
            else:
                grads = jax.grad(mean)(params, x, y)
            return jax.tree.map(lambda p, g: p - self.work.lr * g, params, grads), None

        batches = x.reshape(-1, size, *x.shape[1:]), y.reshape(-1, size), keys
        # in a loop XLA's convolutions take ten times as long on a CPU
        return lax.scan(step, params, batches, unroll=self.work.model == "cnn")[0]

    def evaluate(self) -> tuple[float, float]:
        """Accuracy and loss on the test set, 500 examples at a time."""
        x, y = self.test
        parts = [
            self.score(self.params, x[i : i + 500], y[i : i + 500]) for i in range(0, len(y), 500)
        ]
        right, loss = (float(sum(p)) / len(y) for p in zip(*parts, strict=True))
        return right, loss


def layers(torchs: Params) -> Params:
    """PyTorch's weights [out, in, ...] -> as they are used here; images are channels last."""
    params: Params = []
    for w, b in torchs:
        if w.ndim == 4:
            params.append((w.transpose(2, 3, 1, 0), b))
        elif params and params[-1][0].ndim == 4:  # rows of features come from images channels last
            channels = params[-1][0].shape[-1]
            side = round((w.shape[1] / channels) ** 0.5)
            w = w.reshape(len(w), channels, side, side).transpose(2, 3, 1, 0)
            params.append((w.reshape(-1, len(b)), b))
        else:
            params.append((w.T, b))
    return params


def logits(params: Params, x: jax.Array) -> jax.Array:
    """Of one example or many."""
    last = params[-1][0].shape[-1]
    for w, b in params:
        if w.ndim == 4:
            x = convolved(x if x.ndim == 4 else x[None], w) + b
            x = jax.nn.relu(pooled(x))
        else:
            x = x.reshape(-1, len(w)) @ w + b
            x = x if w.shape[-1] == last else jax.nn.relu(x)
    return x


def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
    """Images [N, H, W, C], padded so that they keep their size."""
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pooled(x: jax.Array) -> jax.Array:
    """Maximum over two by two."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def one(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross entropy of one example."""
    return -jax.nn.log_softmax(logits(params, x)[0])[y]


def mean(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross entropy of a batch."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(params, x)), y[:, None], 1).mean()


def score(params: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many are right, and their summed loss."""
    return (logits(params, x).argmax(1) == y).sum(), mean(params, x, y) * len(y)


def shrink(tree: Params) -> jax.Array:
    """What scales this to an L2 norm of at most 1."""
    return jnp.minimum(1.0, lax.rsqrt(sum((v * v).sum() for v in jax.tree.leaves(tree))))


def noised(tree: Params, std: float, key: jax.Array) -> Params:
    """With normal noise."""
    leaves, shape = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    added = [v + std * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(shape, added)
