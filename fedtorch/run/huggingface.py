"""Models of Hugging Face: loaded, given LoRA adapters, asked for losses of each example, and saved.

Nothing of transformers and peft is imported before a model of theirs is there.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch.data.tokens import PREFIX, loading, tokenizer
from fedtorch.data.tokens import vocabulary_digest as of_tokens
from fedtorch.engines import messages
from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, check
from fedtorch.strategies import Strategy
from fedtorch.strategies import lora as adapters
from fedtorch.training.losses import cross_entropy, reduce
from fedtorch.training.outline import copied
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters, W + alpha/rank B A, in place of the whole model (extra ``hf``)."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float | None = None
    """BA is scaled by alpha / rank; none: twice the rank."""
    targets: tuple[str, ...] = ()
    """Layers, by the ends of their names; none: those that peft takes for the kind of model."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped in training."""
    aggregation: Literal["ffa", "rolora", "fedex", "plain"] = "ffa"
    """How adapters are averaged: ffa (B alone is trained), rolora (B and A in turn), fedex (what the means
    leave out goes into W) or plain (A and B each by itself)."""

    def __post_init__(self) -> None:
        """Refuse what is no adapter."""
        check(self, "lora", rank=COUNT, alpha=POSITIVE, dropout=NOT_NEGATIVE)

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model with adapters in it, all else frozen but a head; raises ConfigError where none fit."""
        try:
            import peft
        except ImportError as e:
            raise ConfigError("lora needs the package peft: pip install 'fedtorch[hf]'") from e
        config: Any = peft.LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha or 2 * self.rank),
            target_modules=list(self.targets) or None,
            lora_dropout=self.dropout,
            task_type=_task(model),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # GPT-2's layers lie the other way: it finds out
                made: nn.Module = peft.get_peft_model(cast(Any, model), config)
        except ValueError as e:
            kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "weight")}
            raise ConfigError(
                f"lora.targets {','.join(self.targets) or '(none given)'}: {str(e).split(chr(10))[0]}; the "
                f"model has layers {', '.join(sorted(kinds))}"
            ) from e
        if self.aggregation == "ffa":
            adapters.freeze(made)
        return made

    def strategy(self, given: Strategy) -> Strategy:
        """The strategy of this aggregation; raises ConfigError where another one is given beside it."""
        return adapters.strategy_for(self.aggregation, given)


class Logits(nn.Module):
    """A model of transformers, from tokens [B, L] to logits: [B, C], or [B, V, L] of a language model."""

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], digest: str = "") -> None:
        """``facts``: of ``fedtorch.data.tokens``; ``digest``: of the weights that came from files."""
        super().__init__()
        self.model = model
        self.language, self.padding = bool(facts["language"]), facts["padding"]
        self.tokenizer, self.digest = str(facts["tokenizer"]), digest

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens that fill up are seen by none."""
        if self.language:
            found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
            return found.transpose(1, 2)
        seen = (tokens != self.padding).long()
        longest = _longest(seen)
        tokens, seen = tokens[:, :longest], seen[:, :longest]
        logits: Tensor = self.model(input_ids=tokens, attention_mask=seen).logits
        return logits


def _longest(seen: Tensor) -> int:
    """Length of the longest text of a batch [B, L]: what fills up all of them is not computed with."""
    try:
        return int(seen.any(0).nonzero().max()) + 1 if bool(seen.any()) else 1
    except (
        RuntimeError
    ):  # of vmap, where examples are seen one by one and must all be of one length
        return seen.shape[1]


def build(spec: str, facts: Mapping[str, Any], lora: LoRA | None, drawn: bool = False) -> nn.Module:
    """The model ``hf:FOLDER`` or ``hf:NAME`` for data of tokens; raises ConfigError where it cannot be.

    ``drawn``: by its configuration alone, with weights that are drawn.
    """
    where = spec.removeprefix(PREFIX)
    if "language" not in facts:
        raise ConfigError(
            f"model {spec} takes tokens: use --dataset text, or labelled-text for texts with a class"
        )
    digest = ""
    with loading("model", where) as more:
        import transformers

        kind: Any = transformers.AutoModelForSequenceClassification
        if facts["language"]:
            kind = transformers.AutoModelForCausalLM
        else:
            more = more | {"num_labels": facts["num_classes"]}
        if drawn:
            model = kind.from_config(transformers.AutoConfig.from_pretrained(where, **more))
        else:
            given = {"use_safetensors": True, "output_loading_info": True} | more
            model, about = kind.from_pretrained(where, **given)
            model = model.float()
            new = {*about["missing_keys"]}  # such as a head for these classes
            digest = messages.digest({k: v for k, v in model.state_dict().items() if k not in new})
        if not facts["language"]:
            model.config.pad_token_id = facts["padding"]
    most = model.get_input_embeddings().num_embeddings
    if facts["vocab_size"] > most:
        raise ConfigError(
            f"model {spec} knows {most:,} tokens and the tokenizer has {facts['vocab_size']:,}: give the "
            "tokenizer that belongs to it, --dataset.vocabulary hf:FOLDER"
        )
    longest, length = (
        getattr(model.config, "max_position_embeddings", None),
        facts["input_shape"][0],
    )
    if longest is not None and length > longest:
        raise ConfigError(f"model {spec} takes {longest} tokens: --dataset.length {longest}")
    whole: nn.Module = model.float().train()  # it comes in evaluation mode, which would be left so
    return Logits(whole if lora is None else lora.adapted(whole), facts, digest)


def public_name(spec: str) -> str:
    """By what name others know a model: a folder here by its own name, wherever it lies."""
    where = Path(spec.removeprefix(PREFIX))
    return PREFIX + (where.resolve().name if where.is_dir() else str(where))


def same_tokens(told: Mapping[str, Any], own: Mapping[str, Any], model: str) -> None:
    """Raises ConfigError where data are not in the tokens that ``told`` are, of a model of Hugging Face."""
    if "tokens" not in told:
        return
    if "tokenizer" not in own or bool(own["language"]) != told["language"]:
        kind = "text" if told["language"] else "labelled-text"
        raise ConfigError(
            f"model {model} takes tokens of texts{'' if told['language'] else ' with a class each'}: give "
            f"--dataset {kind} --dataset.vocabulary {PREFIX}FOLDER, with the tokenizer of that model"
        )
    where = PREFIX + own["tokenizer"]
    if of_tokens(where) != told["tokens"] or own["padding"] != told["padding"]:
        raise ConfigError(
            f"the tokenizer in {own['tokenizer']!r} is not that of the run's {model}: its tokens, or the "
            "one that fills up, are others; give the same by --dataset.vocabulary hf:FOLDER"
        )


def same_weights(model: nn.Module, told: str, spec: str) -> None:
    """Raises ConfigError where a frozen base came from other files than the server's, by their digest."""
    own = getattr(model, "digest", "")
    if own and told and own != told and any(not p.requires_grad for p in model.parameters()):
        where = spec.removeprefix(PREFIX)
        raise ConfigError(
            f"the weights in {where!r} are not those of the run (digest {own[:12]} here, {told[:12]} "
            "there): put the same files there, or only the configuration and tokenizer, and the server "
            "sends the weights once"
        )


def weightless(spec: str) -> bool:
    """Whether a model's folder holds its configuration and no weights."""
    where = Path(spec.removeprefix(PREFIX))
    return (where / "config.json").is_file() and not any(where.glob("*.safetensors"))


def keep(folder: Path, model: nn.Module, strategy: Strategy) -> None:
    """Save a model that was built here as transformers or peft load it: ``pretrained/`` or ``adapter/``.

    Where the strategy has moved weights under the adapters too, or no file had them, the model without
    adapters is in ``base/``.
    """
    if not isinstance(model, Logits):
        return
    inner: Any = model.model
    with loading("tokenizer", model.tokenizer):
        if not hasattr(inner, "peft_config"):
            inner.save_pretrained(folder / "pretrained")
            tokenizer(model.tokenizer).save_pretrained(folder / "pretrained")
            return
        if getattr(strategy, "adapters", ()) or not model.digest:
            inner.active_peft_config.base_model_name_or_path = str(folder / "base")
            cast(Any, copied(inner)).unload().save_pretrained(folder / "base")
        inner.save_pretrained(folder / "adapter")


def beside_weights(folder: Path) -> str:
    """What lies in a run's folder beside the weights as they were trained, in words; empty: nothing."""
    if (folder / "adapter").is_dir():
        base = f" on {folder / 'base'}" if (folder / "base").is_dir() else ""
        return f"adapter{base}, for peft: {folder / 'adapter'} (model.safetensors has all weights)"
    if (folder / "pretrained").is_dir():
        return f"the same for transformers, with its tokenizer: {folder / 'pretrained'}"
    return ""


def step(model: nn.Module, batch: Any) -> Tensor:
    """Losses of each example of a batch as transformers takes it: inputs by name, and ``labels``, [B].

    As ``model(**batch).loss``, but of each example by itself: of a language model or a token classifier the
    mean over its own tokens, of which those of label -100 do not count.
    """
    output, target = eval_step(model, batch)
    if not target.is_floating_point():
        return reduce(cross_entropy(output, target))
    if output.shape[-1] == 1:
        return reduce(F.mse_loss(output.reshape(target.shape), target, reduction="none"))
    return reduce(F.binary_cross_entropy_with_logits(output, target, reduction="none"))


def eval_step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits with classes on axis 1 and their targets, as metrics take them; of texts the next tokens."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ConfigError(
            "a batch must be a dict of the model's inputs and 'labels', as transformers collates them"
        )
    target: Tensor = batch["labels"]
    logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if logits.dim() < 3:
        return logits, target
    if causal(model):
        logits, target = logits[:, :-1], target[:, 1:]
    return logits.movedim(-1, 1), target


def causal(model: nn.Module) -> bool:
    """Whether a model of transformers, with or without adapters, predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if causal(model) else None
