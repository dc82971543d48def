"""LoRA against the whole model: a small GPT that has read some of Shakespeare goes on with six roles.

Each role is a client. What travels, what it takes and how well the next character is foretold, without
privacy and at epsilon 8 for each line of a role. Needs the extra ``hf`` and the text:

    python examples/lora_shakespeare.py ../shared/data/tinyshakespeare.txt ["LoRA ffa, epsilon 8" ...]
"""

import resource
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import StackDataset

from fedtorch import Client, FedAvg, Recipe, Server, evaluate
from fedtorch.data import Text
from fedtorch.privacy import SampleLevel
from fedtorch.run.huggingface import LoRA, eval_step, step
from fedtorch.training.outline import copied

LENGTH, ROLES = 32, 6


def texts(path: str) -> tuple[Tensor, list[Client], StackDataset, int]:
    """Windows of the other roles, clients of the longest ones, their held-out windows, and characters."""
    data = Text(path, length=LENGTH).load(0)
    x, owners = data.train.tensors[0], list(data.keys)
    longest = [name for name, _ in Counter(owners).most_common(ROLES)]
    mine = torch.tensor([longest.index(o) if o in longest else -1 for o in owners])
    clients, held = [], []
    for k, name in enumerate(longest):
        own = x[mine == k]
        clients.append(Client(name, windows(own[: -len(own) // 5])))
        held.append(own[-len(own) // 5 :])
    return x[mine < 0], clients, windows(torch.cat(held)), data.outputs


def windows(ids: Tensor) -> StackDataset:
    """As transformers takes them."""
    return StackDataset(input_ids=ids, labels=ids)


def pretrained(others: Tensor, characters: int, steps: int) -> nn.Module:
    """A small GPT that has seen the other roles."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    marks = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=characters, **size, **drop, **marks))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = others[torch.randint(len(others), (32,))]
        optimizer.zero_grad()
        step(model, {"input_ids": ids, "labels": ids}).mean().backward()
        optimizer.step()
    return model


def run(base: nn.Module, clients: list[Client], test: StackDataset, how: str, rounds: int) -> None:
    """Fine-tune a copy and print one line of the table."""
    kind, private = how.removesuffix(", epsilon 8"), how.endswith("epsilon 8")
    model, strategy = copied(base), FedAvg()
    if kind != "whole model":
        lora = LoRA(rank=4, targets=("c_attn", "c_fc"), aggregation=kind.removeprefix("LoRA "))
        model, strategy = lora.adapted(model), lora.strategy(strategy)
    plan, lr, optimizer = None, 3e-3 if kind != "whole model" else 1e-3, "adam"
    if private:  # plain steps of clipped gradients; no rate here is tuned
        plan = SampleLevel(epsilon=8.0, rounds=rounds, sample_rate=0.1, steps=5, batch_size=16)
        lr, optimizer = 0.5, "sgd"
    recipe = Recipe(strategy, step=step, privacy=plan, optimizer=optimizer, lr=lr, batch_size=16)
    if not private:
        recipe = replace(recipe, steps=5)
    server, start = Server(model, clients, recipe), time.process_time()
    figures = [*server.rounds(rounds)]
    seconds = time.process_time() - start
    up, down = (sum(f[k] for f in figures) for k in ("bytes_up", "bytes_down"))
    sizes = [f"{total / rounds / len(clients) / 1e3:,.1f}" for total in (up, down)]
    scores = evaluate(server.model, test, ["accuracy", "perplexity"], step=eval_step, batch_size=64)
    print(line(how, scores, *sizes, f"{rounds / seconds:.2f}"), flush=True)


def line(how: str, scores: dict[str, float], up: str, down: str, speed: str) -> str:
    """A row."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"| {how:24} | {up:>9} | {down:>9} | {scores['accuracy']:.4f} | {scores['perplexity']:7.3f} "
        f"| {speed:>6} | {peak:6.0f} |"
    )


WAYS = [
    "LoRA ffa", "LoRA rolora", "LoRA fedex", "LoRA plain", "LoRA ffa, epsilon 8", "LoRA rolora, epsilon 8",
    "whole model", "whole model, epsilon 8",
]  # fmt: skip


def main(path: str, rounds: int = 6, steps: int = 200, ways: list[str] = WAYS) -> None:
    """The table: rounds in a second of the processor's time, and the most memory taken up to that line."""
    if find_spec("peft") is None:
        print("skipped: it needs the extra hf: pip install 'fedtorch[hf]'")
        return
    if not Path(path).is_file():
        print(
            f"skipped: there is no text {path!r}; name one with speakers, such as tinyshakespeare.txt"
        )
        return
    torch.set_num_threads(1)
    others, clients, test, characters = texts(path)
    base = pretrained(others, characters, steps)
    print(
        "| way | kB up | kB down | accuracy | perplexity | rounds/s | MB |\n|---|---|---|---|---|---|---|"
    )
    scores = evaluate(base, test, ["accuracy", "perplexity"], step=eval_step, batch_size=64)
    print(line("before", scores, "-", "-", "-"), flush=True)
    for how in ways:
        run(base, clients, test, how, rounds)


if __name__ == "__main__":
    text = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    main(*sys.argv[1:2] or [str(text)], ways=sys.argv[2:] or WAYS)
