"""Rounds at sample level, LoRA and the whole model: fedtorch, a bare loop, Opacus's hooks by hand.

    python -m benchmarks.lora

Eight clients of 64 windows of 32 tokens, 5 steps of about 16 a round, a GPT of two layers 64 wide;
processor time of one thread, the best of three.
"""

import time
from collections.abc import Callable

import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import StackDataset
from transformers import GPT2Config, GPT2LMHeadModel

from fedtorch import Client, FedAvg, Recipe, Server
from fedtorch.privacy import SampleLevel
from fedtorch.run.huggingface import LoRA, step

CLIENTS, STEPS, BATCH, LENGTH = 8, 5, 16, 32
CLIP, NOISE = 1.0, 1.0


def made(adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "vocab_size": 66}
    model = GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=0, eos_token_id=0))
    lora = LoRA(rank=4, targets=("c_attn", "c_fc"))
    return lora.adapted(model) if adapted else model


def ids(k: int) -> torch.Tensor:
    return torch.randint(66, (64, LENGTH), generator=torch.Generator().manual_seed(k))


def fedtorch(adapted: bool, private: bool) -> Callable[[], object]:
    clients = [Client(k, StackDataset(input_ids=ids(k), labels=ids(k))) for k in range(CLIENTS)]
    plan = SampleLevel(
        noise_multiplier=NOISE, clip=CLIP, rounds=99, sample_rate=BATCH / 64, steps=STEPS, batch_size=BATCH
    )  # fmt: skip
    steps = {"privacy": plan} if private else {"steps": STEPS, "batch_size": BATCH}
    return Server(made(adapted), clients, Recipe(FedAvg(), step=step, lr=0.1, **steps)).round


def bare(adapted: bool, private: bool) -> Callable[[], object]:
    """By hand: each client from the same weights, plain steps or those of Opacus's hooks, the mean."""
    model = made(adapted)
    model = GradSampleModule(model, loss_reduction="sum", strict=False) if private else model
    trained = [p for p in model.parameters() if p.requires_grad]
    places = torch.arange(LENGTH).expand(BATCH, LENGTH)

    def visit(data: torch.Tensor) -> None:
        for _ in range(STEPS):
            x = data[torch.randperm(64)[:BATCH]]
            model.zero_grad()
            each = step(model, {"input_ids": x, "labels": x, "position_ids": places})
            (each.sum() if private else each.mean()).backward()
            if private:
                clipped(trained)
            with torch.no_grad():
                torch._foreach_add_(trained, [p.grad for p in trained], alpha=-0.1)

    def round() -> None:
        start, total = [p.detach().clone() for p in trained], [torch.zeros_like(p) for p in trained]
        with torch.no_grad():
            for k in range(CLIENTS):
                torch._foreach_copy_(trained, start)
                with torch.enable_grad():
                    visit(ids(k))
                torch._foreach_add_(total, trained, alpha=1 / CLIENTS)
            torch._foreach_copy_(trained, total)

    return round


def clipped(trained: list[torch.Tensor]) -> None:
    norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in trained]).norm(dim=0)
    factor = (CLIP / norms).clamp(max=1)
    for p in trained:
        g = torch.einsum("b,b...->...", factor, p.grad_sample)
        p.grad, p.grad_sample = (g + NOISE * CLIP * torch.randn_like(g)) / BATCH, None


def rate(round: Callable[[], object]) -> float:
    round()
    times = []
    for _ in range(3):
        start = time.process_time()
        round()
        times.append(time.process_time() - start)
    return 1 / min(times)


def main() -> None:
    torch.set_num_threads(1)
    heads = (
        "bare loop, no privacy",
        "fedtorch, no privacy",
        "fedtorch, sample level",
        "Opacus's hooks",
    )
    print(f"| trained | {' | '.join(heads)} |")
    print("|---|---|---|---|---|")
    for name, adapted in (("LoRA, B alone", True), ("whole model", False)):
        ways = ((bare, False), (fedtorch, False), (fedtorch, True), (bare, True))
        rates = [rate(make(adapted, private)) for make, private in ways]
        print(
            f"| {name} | "
            + " | ".join(f"{r:.2f} rounds/s ({r / rates[0]:.2f} x)" for r in rates)
            + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
