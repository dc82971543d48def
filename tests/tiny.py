"""Models and tokenizers of Hugging Face as small as they come, made on the spot: nothing is downloaded."""

from importlib.util import find_spec

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="needs the extra hf: transformers and peft"
)
if not find_spec("peft"):  # which takes seconds to import, in every process that collects tests
    pytest.skip("needs the extra hf: transformers and peft", allow_module_level=True)

WORDS = ["[PAD]", "[UNK]", "film", "is", "this", "the", "a", "very", "good", "great", "bad", "poor"]
PLAY = "ROMEO:\nwherefore art thou, and what of the moon\n\nJULIET:\nit is the lark, and no nightingale\n\n"
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SILENT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def bert(kind="BertForSequenceClassification", **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        **options,
    )
    return getattr(transformers, kind)(config)


def gpt(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | marks | options))


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def words():
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(made)


def letters():
    """A tokenizer of characters."""
    from tokenizers import Tokenizer, decoders, models

    every = ["[PAD]", "[UNK]", *sorted(set(PLAY))]
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(every)}, [], unk_token="[UNK]"))
    made.decoder = decoders.Fuse()
    return _fast(made)


def _fast(made):
    kind = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def save(folder, model, tokenizer):
    """A folder as ``save_pretrained`` leaves it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
