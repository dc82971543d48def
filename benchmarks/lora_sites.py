"""What LoRA saves over sites: ``python -m benchmarks.lora_sites``.

A GPT-2 of 43 MB with weights that were drawn, two sites on loopback (``fedtorch serve`` and ``site``
as a user starts them), one local step a round. Trained as a whole; with adapters of rank 8 where both sites
have the weights; and where they have the configuration alone and are sent the weights once. Bytes are those
of the messages, of both sites together; seconds are of a round.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

NAMES = ("north", "south")
WORDS = ["[PAD]", "[UNK]", *(f"w{k}" for k in range(98))]
ROUNDS, LENGTH = 5, 16
SERVE = [
    *(
        "--insecure",
        "--sites",
        ",".join(NAMES),
        "--minimum",
        "2",
        "--language",
        "--privacy",
        "none",
    ),
    *("--input-shape", str(LENGTH), "--steps", "1", "--batch-size", "4", "--rounds", str(ROUNDS)),
]


def main() -> None:
    """Each way in turn."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        prepare()
        for way, lora, held in (
            ("whole model", [], "weights"),
            ("LoRA, sites have the weights", ["--lora.rank", "8"], "weights"),
            ("LoRA, sent the weights once", ["--lora.rank", "8"], "configuration"),
        ):
            run(way, lora, held)
            print(f"{way:<29} {told(Path(way) / 'metrics.jsonl')}", flush=True)
        os.chdir("/")


def prepare() -> None:
    """The model, with weights and without, and each site's text."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(WORDS),
        "n_positions": LENGTH,
        "n_embd": 384,
        "n_layer": 6,
        "n_head": 6,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    print(f"{sum(p.numel() * 4 for p in model.parameters()):,} B of weights", flush=True)
    known = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]")
    model.save_pretrained("weights/gpt")
    tokens.save_pretrained("weights/gpt")
    shutil.copytree("weights/gpt", "configuration/gpt")
    Path("configuration/gpt/model.safetensors").unlink()
    for name in NAMES:
        Path(f"{name}.txt").write_text(" ".join(f"w{(7 * k) % 98}" for k in range(12 * LENGTH)))


def run(way: str, lora: list[str], held: str) -> None:
    """One federation, to its end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{s.getsockname()[1]}"
    words = [
        "serve",
        *SERVE,
        "--address",
        server,
        "--model",
        "hf:weights/gpt",
        "--run-dir",
        way,
        *lora,
    ]
    started = [start(words, f"{way}.log")]
    for name in NAMES:
        own = ["--name", name, "--server", server, "--insecure", "--state", f"{way} {name}"]
        own += ["--models", f"hf:{held}/gpt", "--dataset", "text", "--dataset.path", f"{name}.txt"]
        own += ["--dataset.vocabulary", f"hf:{held}/gpt", "--dataset.length", str(LENGTH)]
        started.append(start(["site", *own], f"{way} {name}.log"))
    try:
        codes = [p.wait(600) for p in started]
        if any(codes):
            raise SystemExit(f"{way}: {codes} {Path(f'{way}.log').read_text()[-500:]}")
    finally:
        for process in started:
            process.kill()


def start(words: list[str], log: str) -> subprocess.Popen:
    with Path(log).open("w") as file:
        command = [sys.executable, "-m", "fedtorch", *words]
        return subprocess.Popen(command, stdout=file, stderr=file)


def told(path: Path) -> str:
    """Bytes of the first round and of the later ones, and the median of their seconds."""
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    down, up = (
        [sum(r[f"site_{n}_bytes_{way}"] for n in NAMES) for r in rounds]
        for way in ("sent", "received")
    )
    seconds = statistics.median(r["seconds_train"] for r in rounds[2:])
    return f"round 1 {down[0]:,} B down; then {down[-1]:,} down, {up[-1]:,} up, {seconds:.2f} s a round"


if __name__ == "__main__":
    main()
