"""Models of transformers with and without adapters, in dicts as they are collated, and from the command."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import StackDataset

import tiny
from fedtorch import Client, ConfigError, FedProx, Recipe, Server, evaluate
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream
from fedtorch.privacy.one_client import private_gradients
from fedtorch.run import checkpoint, huggingface
from fedtorch.run.huggingface import LoRA, eval_step, step
from fedtorch.strategies import FedAvg, RoLoRA


def batch(n=5, language=False, seed=0):
    """Some texts of unequal length, filled up at the end."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (n, 8), generator=draw)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    labels = torch.where(mask == 1, ids, -100) if language else ids[:, 0] % 2
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def one(whole, k):
    return {name: v[k : k + 1] for name, v in whole.items()}


def tags():
    found = batch()
    return found | {"labels": torch.where(found["attention_mask"] == 1, 1, -100)}


KINDS = {
    "classifier": (lambda: tiny.bert(**tiny.NONE), batch()),
    "tags": (lambda: tiny.bert("BertForTokenClassification", **tiny.NONE), tags()),
    "masked": (lambda: tiny.bert("BertForMaskedLM", **tiny.NONE), batch(language=True)),
    "number": (
        lambda: tiny.bert(num_labels=1, **tiny.NONE),
        batch() | {"labels": torch.linspace(-1, 1, 5)},
    ),
    "several": (
        lambda: tiny.bert(num_labels=3, problem_type="multi_label_classification", **tiny.NONE),
        batch() | {"labels": torch.eye(5, 3)},
    ),
    "gpt": (lambda: tiny.gpt(**tiny.SILENT), batch(language=True)),
    "llama": (tiny.llama, batch(language=True)),
    "adapted": (
        lambda: LoRA(rank=2, aggregation="plain").adapted(tiny.gpt(**tiny.SILENT)),
        batch(language=True),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_each_example_is_what_the_model_says_of_it_alone(kind):
    make, whole = KINDS[kind]
    model = make()
    found = step(model, whole)
    want = [model(**one(whole, k)).loss for k in range(5)]
    assert torch.allclose(found, torch.stack(want), atol=1e-6)


@pytest.mark.parametrize("kind", ["classifier", "gpt", "llama", "adapted"])
def test_clipped_sums_are_those_of_gradients_one_by_one(kind):
    """Positions looked up once for all, weights that two layers share, and GPT-2's own kind of layer."""
    make, whole = KINDS[kind]
    model = make().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = [model(**one(whole, k)).loss for k in range(5)]
    grads = [torch.autograd.grad(v, trained, materialize_grads=True) for v in alone]
    norms = [float(torch.cat([v.flatten() for v in g]).norm()) for g in grads]
    clip = sorted(norms)[2]  # two are clipped
    factors = [min(1.0, clip / n) for n in norms]
    want = [sum(f * g[j] for f, g in zip(factors, grads, strict=True)) for j in range(len(trained))]
    steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "test")], "hooks", max_batch=3)
    with private_gradients(model, step, steps) as gradients:
        gradients.backward(whole)
    for p, g in zip(trained, want, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)


def data(n, language, seed):
    return StackDataset(**batch(n, language, seed))


def clients(language):
    return [Client(f"c{k}", data(12, language, k)) for k in range(3)]


PLANS = {
    "plain": None,
    "client": ClientLevel(noise_multiplier=0.1, rounds=1),
    "sample": SampleLevel(noise_multiplier=0.5, sample_rate=0.5, steps=1, batch_size=6, rounds=1),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_models_as_they_come_train_on_dicts_under_every_plan(kind, plan):
    """With their dropout, that of attention too, which is no draw that mixes examples."""
    model = {"bert": tiny.bert, "gpt": tiny.gpt}[kind]()
    recipe = Recipe(step=step, privacy=PLANS[plan], lr=0.1, batch_size=6, epochs=1)
    server = Server(model, clients(kind == "gpt"), recipe)
    server.round()
    assert server.moved()
    if plan == "sample":
        assert server.session.recipe.privacy.mode == "layers"  # also where they are GPT-2's own


def test_only_adapters_travel_and_are_in_checkpoints():
    lora = LoRA(rank=2)
    model = lora.adapted(tiny.gpt())
    server = Server(model, clients(True), Recipe(lora.strategy(FedAvg()), step=step, epochs=1))
    figures = server.round()
    b = sum(p.numel() for n, p in model.named_parameters() if "lora_B" in n)
    assert figures["bytes_up"] == figures["bytes_down"] == 3 * 4 * b
    assert sum(v.numel() for v in server.state_dict()["model"].values()) == b
    scores = evaluate(server.model, data(6, True, 9), ["perplexity", "accuracy"], step=eval_step)
    assert 0 < scores["perplexity"] < 100


def test_a_batch_of_another_kind_is_told_what_it_must_be():
    with pytest.raises(ConfigError, match="a dict of the model's inputs and 'labels'"):
        step(tiny.bert(), (torch.zeros(1), torch.zeros(1)))


def test_an_aggregation_is_a_strategy_or_goes_with_any():
    assert type(LoRA(aggregation="rolora").strategy(FedAvg())) is RoLoRA
    assert LoRA(aggregation="fedex").strategy(FedAvg(weighting="uniform")).weighting == "uniform"
    for kind in ("ffa", "plain"):
        assert LoRA(aggregation=kind).strategy(FedProx(mu=0.5)) == FedProx(mu=0.5)
    with pytest.raises(ConfigError, match=r"lora\.aggregation ffa, which goes with any"):
        LoRA(aggregation="fedex").strategy(FedProx())


def test_targets_that_are_not_there_and_models_unknown_to_peft_are_told_what_there_is():
    with pytest.raises(ConfigError, match=r"lora\.targets nothing: .*query"):
        LoRA(targets=("nothing",)).adapted(tiny.bert())
    with pytest.raises(ConfigError, match=r"lora\.targets \(none given\): .*layers 0"):
        LoRA().adapted(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_what_the_means_leave_out_goes_into_the_models_own_layers(kind):
    """GPT-2's lie the other way round, and BERT has a new head besides."""
    lora = LoRA(rank=2, aggregation="fedex")

    def server(who):
        model = lora.adapted({"gpt": tiny.gpt(**tiny.SILENT), "bert": tiny.bert(**tiny.NONE)}[kind])
        made = Server(model, who, Recipe(lora.strategy(FedAvg()), step=step, lr=5.0, epochs=3))
        made.round()
        return made.model

    def effective(model):
        merged = model.merge_and_unload().state_dict()
        return next(v for n, v in merged.items() if n.endswith(("c_attn.weight", "value.weight")))

    who = clients(kind == "gpt")
    want = torch.stack([effective(server([c])) for c in who]).mean(0)
    whole = server(who)
    apart = whole.get_base_model()
    start = {"gpt": tiny.gpt, "bert": tiny.bert}[kind]()
    name = next(n for n in start.state_dict() if n.endswith(("c_attn.weight", "value.weight")))
    base = apart.get_parameter(name.replace(".weight", ".base_layer.weight"))
    assert not torch.equal(base, start.state_dict()[name])
    assert torch.allclose(effective(whole), want, atol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    (root / "play.txt").write_text(tiny.PLAY * 20)
    rows = [f"{a} {b} film,{'yes' if b in ('good', 'great') else 'no'}" for a in ("this", "the", "a")
            for b in ("good", "bad", "great", "poor")]  # fmt: skip
    (root / "films.csv").write_text("text,label\n" + "".join(f"{r}\n" for r in rows * 5))
    tiny.save(root / "gpt", tiny.gpt(), tiny.letters())
    tiny.save(root / "bert", tiny.bert(**tiny.NONE), tiny.words())
    return root


LANGUAGE = ["--dataset", "text", "--dataset.path", "play.txt", "--dataset.length", "12"]
TEXTS = ["--dataset", "labelled-text", "--dataset.path", "films.csv", "--dataset.length", "6"]
FEW = ["--clients", "2", "--rounds", "2", "--tracking", "none"]


def test_a_private_run_with_adapters_is_judged_writes_on_and_is_loaded_by_peft(
    fedtorch, folders, monkeypatch
):
    monkeypatch.chdir(folders)
    run = ["--run-dir", "run", "--model", "hf:gpt", "--lora.rank", "2", "--metrics", "perplexity"]
    code, out, err = fedtorch("train", *run, *LANGUAGE, *FEW)
    assert code == 0, err
    assert "spent at delta 1e-05" in out and "evaluation mode" not in out
    assert "adapter, for peft: run/adapter (model.safetensors has all weights)" in out
    code, out, err = fedtorch("eval", "run", "--json")
    assert json.loads(out)["test_perplexity"] > 1, err
    (folders / "start.txt").write_text("wherefore art")
    code, out, err = fedtorch("predict", "run", "start.txt", "--length", "4")
    assert code == 0 and len(out.removesuffix("\n")) >= 1, err
    # a checkpoint has the adapters alone
    saved = checkpoint.load(folders / "run" / "checkpoints")["model"]
    assert saved and all("lora_B" in n for n in saved)
    same_logits(folders / "gpt", folders / "run")


def test_what_fills_up_a_whole_batch_is_not_computed_with():
    facts = {"language": False, "padding": 0, "tokenizer": ""}
    model = huggingface.Logits(tiny.bert(**tiny.NONE), facts)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda m, args, named: lengths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    tokens[0, :2], tokens[1, :5] = 3, 4
    short, long = model(tokens), model(tokens[:1])
    assert lengths == [5, 2] and model(tokens[2:]).shape == (1, 2)
    assert torch.allclose(short[:1], long, atol=1e-6)
    # one by one, under vmap, all stay of one length
    widths = torch.func.vmap(lambda t: t[: huggingface._longest(t[None])])(tokens)
    assert torch.equal(widths, tokens)


def same_logits(base, run):
    """The adapter as peft puts it on the base, and the model file of the run."""
    import peft

    ids = torch.arange(2, 12)[None]
    plain = tiny.transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in its old words
        theirs = peft.PeftModel.from_pretrained(plain, run / "adapter").eval()
    facts = {"language": True, "padding": 0, "tokenizer": "", "vocab_size": 2, "input_shape": (12,)}
    ours = huggingface.build(f"hf:{base}", facts, LoRA(rank=2))
    ours.load_state_dict(load_file(run / "model.safetensors"))
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits.transpose(1, 2), ours.eval()(ids), atol=1e-6)
    assert any(bool(p.any()) for n, p in theirs.named_parameters() if "lora_B" in n)


def test_a_base_that_was_moved_is_saved_beside_its_adapter(fedtorch, folders, monkeypatch):
    monkeypatch.chdir(folders)
    run = ["--run-dir", "folded", "--model", "hf:gpt", "--lora.rank", "2", "--privacy", "none"]
    code, out, err = fedtorch("train", *run, "--lora.aggregation", "fedex", *LANGUAGE, *FEW)
    assert code == 0 and "travel down" in out, err
    moved = load_file(folders / "folded" / "base" / "model.safetensors")
    before = load_file(folders / "gpt" / "model.safetensors")
    name = next(n for n in before if n.endswith("attn.c_attn.weight"))
    assert not torch.equal(moved[name], before[name])
    same_logits(folders / "folded" / "base", folders / "folded")


def test_a_whole_classifier_is_trained_saved_and_names_classes(fedtorch, folders, monkeypatch):
    monkeypatch.chdir(folders)
    run = ["--run-dir", "whole", "--model", "hf:bert", "--privacy", "none"]
    code, _, err = fedtorch("train", *run, *TEXTS, *FEW)
    assert code == 0, err
    kind = tiny.transformers.AutoModelForSequenceClassification
    loaded = kind.from_pretrained(folders / "whole" / "pretrained").state_dict()
    ours = load_file(folders / "whole" / "model.safetensors")
    assert all(torch.equal(v, ours[f"model.{n}"]) for n, v in loaded.items())
    tiny.transformers.AutoTokenizer.from_pretrained(folders / "whole" / "pretrained")
    (folders / "new.txt").write_text("this good film\n")
    code, out, _ = fedtorch("predict", "whole", "new.txt")
    assert code == 0 and out.strip() in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--model", "hf:gpt"], "use --dataset text, or labelled-text"),
        (["--model", "hf:gpt", *LANGUAGE[:4]], "takes 16 tokens: --dataset.length 16"),
        (["--model", "hf:bert", "--dataset.vocabulary", "hf:gpt", *TEXTS[:4]], None),
        (["--model", "hf:./none", *LANGUAGE], "there is no folder './none'"),
        (["--lora.rank", "2"], "lora is for models of Hugging Face"),
        (["--model", "hf:bert", "--lora.rank", "0", *TEXTS], "lora.rank must be at least 1"),
        (["--model", "hf:bert", "--lora.aggregation", "best", *TEXTS], "lora.aggregation"),
    ],
)
def test_what_cannot_be_is_one_sentence(fedtorch, folders, monkeypatch, options, why):
    monkeypatch.chdir(folders)
    code, _, err = fedtorch("train", *options, *FEW)
    assert code == 2 and err.count("\n") == 1 and (why or "16 tokens") in err
