"""Tokens of the models of Hugging Face, as a vocabulary ``hf:FOLDER`` of texts (extra ``hf``)."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from torch import Tensor

from fedtorch.types import ConfigError

PREFIX = "hf:"
"""Before a folder or a name on the hub: a model's, and as a vocabulary that of its tokenizer."""


def facts(vocabulary: str, language: bool) -> dict[str, Any]:
    """What a model of ``hf:`` is built from, of data in the tokens of this vocabulary."""
    known = tokenizer(vocabulary)
    return {
        "vocab_size": len(known),
        "tokenizer": vocabulary.removeprefix(PREFIX),
        "padding": known.pad_token_id,
        "language": language,
    }


def vocabulary_digest(vocabulary: str) -> str:
    """Of a tokenizer's tokens and their numbers: two that agree cut texts into the same."""
    tokens = sorted(tokenizer(vocabulary).get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def tokenized(known: Any, texts: Sequence[str], length: int) -> Tensor:
    """Texts -> tokens [N, length], with the model's own marks, cut or filled up at the end."""
    if known.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {known.name_or_path} has no token to fill up with: give it a pad_token, and "
            "save it again"
        )
    known.padding_side = "right"
    made = known(list(texts), padding="max_length", truncation=True, max_length=length)
    return torch.tensor(made["input_ids"])


def tokenizer(where: str) -> Any:
    """The tokenizer in a folder, or of a name on the hub; raises ConfigError where there is none.

    One without a token to fill up with takes that for the end of a text.
    """
    where = where.removeprefix(PREFIX)
    with loading("tokenizer", where) as more:
        from transformers import AutoTokenizer

        known = AutoTokenizer.from_pretrained(where, **more)
    if len(known) <= len(
        {*known.all_special_ids}
    ):  # what transformers makes up where there is none
        raise ConfigError(
            f"{where!r} has a model but no tokenizer: save the model's own there, "
            "tokenizer.save_pretrained(folder), or name another by dataset.vocabulary hf:FOLDER"
        )
    if known.pad_token_id is None:
        known.pad_token = known.eos_token
    return known


@contextmanager
def loading(what: str, where: str) -> Iterator[dict[str, Any]]:
    """Load something of transformers; raises ConfigError with the reason where it cannot be."""
    try:
        from transformers.utils import logging
    except ImportError as e:
        raise ConfigError(
            f"{what} {where!r} needs the package transformers: pip install 'fedtorch[hf]'"
        ) from e
    here = Path(where).is_dir()
    if not here and (where.startswith((".", "/", "~")) or where.count("/") > 1):
        raise ConfigError(f"{what}: there is no folder {where!r}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # of a folder, or without a net, nothing is asked of the hub: what was downloaded is there
        yield {"local_files_only": here or not reachable()}
    except ConfigError:
        raise
    except Exception as e:
        why = " ".join(str(e).split("\n")[0].split()) or type(e).__name__
        why = "save_pretrained has written none there" if why.endswith(":") else why
        place = f"in folder {where!r}" if here else f"{where!r}, which is no folder here,"
        raise ConfigError(
            f"{what} {place} cannot be loaded: {why}"
            + ("" if here else " (is this machine online?)")
        ) from e
    finally:
        if bars:
            logging.enable_progress_bar()


def reachable() -> bool:
    """Whether the hub answers at all, by way of a proxy where there is one.

    Its own client would try again for half a minute, and print each time. Where it is a certificate that is
    not trusted, that client may know better.
    """
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(hub, method="HEAD"), timeout=5).close()
    except HTTPError:
        return True
    except OSError as e:
        return isinstance(getattr(e, "reason", None), SSLError)
    return True
