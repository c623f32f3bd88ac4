"""Hand a checkpoint to the field's tools: a folder that transformers loads, with a model card."""

import json
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die, reason
from nanorlhf.hf.folder import FIXED, GELU, TRANSPOSED, llama_names
from nanorlhf.hf.tokenizer import tokenizer_files
from nanorlhf.llama import LlamaConfig
from nanorlhf.machine import durable
from nanorlhf.run import checkpoint
from nanorlhf.run.metrics import read_rows

BASE = "a base model: it goes on with text and follows no instruction"
SCORES = (
    "a reward model: one score per dialogue, read at its end token, in standard deviations of the "
    "responses it was trained on"
)
CHATS = {  # stage -> what a model card says of a chat model
    "sft": "fine-tuned on demonstrations",
    "ppo": "trained by PPO against a reward model, with a KL penalty to the model it started from",
}
AUTO_MODEL = {"lm": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
USE = """```python
from transformers import AutoTokenizer, {auto_model}

tokenizer = AutoTokenizer.from_pretrained("{to}")
model = {auto_model}.from_pretrained("{to}")
{code}
```"""
CHAT = """ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt"
)
print(tokenizer.batch_decode(model.generate(**ids, do_sample=True, max_new_tokens=64)))"""
TEXT = """ids = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**ids, do_sample=True, max_new_tokens=64)))"""
SCORE = """dialogue = [
    {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}
]
text = tokenizer.apply_chat_template(dialogue, tokenize=False)
ids = tokenizer([text, text], padding=True, truncation=True, return_tensors="pt")
print(model(**ids).logits)  # and so does pipeline("text-classification")"""


@dataclass
class Config:
    """Write a checkpoint in Hugging Face layout (needs safetensors)."""

    model: str = arg("out/ppo", "checkpoint folder of any stage or fork", positional=True)
    to: str = arg("", "folder to write; default: MODEL/hf", positional=True)


def main(cfg):
    to = cfg.to or f"{cfg.model}/hf"
    found = write_model(cfg.model, to)
    try:
        card = model_card(found, to)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        die(
            f"{found.path}: its config.json or report.json is damaged "
            f"({type(error).__name__}: {reason(error)})"
        )
    durable.write_text(Path(to, "README.md"), card)
    print(f"wrote {to}: transformers.{AUTO_MODEL[found.kind]}.from_pretrained({to!r})")


def write_model(folder, to):
    """Write a checkpoint of ours so that transformers' AutoTokenizer and AUTO_MODEL of its kind
    load it; returns the Checkpoint."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        die("export needs safetensors: pip install -e '.[hub]'")
    found = checkpoint.load(folder)
    is_rm = found.kind == "reward"
    config, tokenizer = found.model_config, found.tokenizer
    weights = checkpoint.gpt_weights(found.weights)
    theirs = llama_in_their_layout if isinstance(config, LlamaConfig) else gpt2_in_their_layout
    about, out = theirs(config, weights, found.weights if is_rm else None)
    about |= {
        "nanorlhf_stage": found.stage,
        "nanorlhf_kind": found.kind,
        "nanorlhf_chat": found.chat,
        "vocab_size": config.vocab_size,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": "float32",
    }
    # a pipeline would put a sigmoid on anything but a regression's score
    about |= {"num_labels": 1, "problem_type": "regression"} if is_rm else {}
    files = {"config.json": about}
    side = "right" if is_rm else "left"
    files |= tokenizer_files(tokenizer, config.block_size, found.chat, side)
    refuse_others(to, {*files, "model.safetensors", "README.md"})
    try:
        Path(to).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            Path(to, name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        save_file(out, Path(to, "model.safetensors"), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        die(f"{to}: {reason(error)}")
    return found


def gpt2_in_their_layout(config, weights, reward):
    """(config.json, tensors) of a GPT-2. `reward`: a reward model's weights with its head, if it is
    one."""
    out = {}
    for name, w in weights.items():
        out["transformer." + name] = w.T.contiguous() if name.endswith(TRANSPOSED) else w.clone()
    if reward:
        fold_scale(reward, out)
    about = FIXED | {
        "model_type": "gpt2",
        "tie_word_embeddings": True,
        "architectures": ["GPT2ForSequenceClassification" if reward else "GPT2LMHeadModel"],
        "n_positions": config.block_size,
        "activation_function": {ours: theirs for theirs, ours in GELU.items()}[config.gelu],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.d_model,
    }
    return about, out


def llama_in_their_layout(config, weights, reward):
    """(config.json, tensors) of a Llama, as of the family member that has its biases and norms. Its
    last norm has no bias to take up the constant of a reward model's score, (bias - mean) / sd:
    config.json names it, to be added."""
    c, out, about = config, {}, {}
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    if c.qk_norm and c.qkv_bias:
        die("a Llama with biases and norms of queries and keys is no model of transformers'")
    for name, w in weights.items():
        names = llama_names(name)
        part = [n * c.d_head for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        sizes = part if len(names) == 3 else [len(w) // len(names)] * len(names)
        out |= {key: rows.clone() for key, rows in zip(names, w.split(sizes))}
    if reward:
        out.pop("lm_head.weight", None)
        out["score.weight"] = reward["score_head.weight"] / reward["score_sd"]
        shift = (reward["score_head.bias"] - reward["score_mean"]) / reward["score_sd"]
        about["nanorlhf_score_shift"] = shift.item()
    rope = {"rope_type": "llama3" if c.rope_scaling else "default", "rope_theta": c.rope_theta}
    family = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    about |= {
        "model_type": kind,
        "tie_word_embeddings": c.is_tied,
        "architectures": [family + ("ForSequenceClassification" if reward else "ForCausalLM")],
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.d_head,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_mlp,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "attention_bias": False,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope | (c.rope_scaling or {}),
    }
    about |= {"rope_scaling": rope | c.rope_scaling} if c.rope_scaling else {}
    return about, out


def refuse_others(to, names):
    """Exits 2 where the folder holds anything but an earlier export. Of another model's files some
    would be preferred to ours, such as its chat template, and the rest would be lost."""
    there = {path.name for path in Path(to).glob("[!.]*")}
    others = there - names
    try:
        is_ours = "nanorlhf_stage" in json.loads(Path(to, "config.json").read_text())
    except (OSError, ValueError):
        is_ours = False
    if others or there and not is_ours:
        shown = ", ".join(sorted(others or there)[:4])
        die(f"{to} holds files that are no export of nanorlhf's: {shown}; name another folder")


def fold_scale(weights, out):
    """Fold bias and scale of the score into weights that their head has, as it has no bias.

    Ours is (w h + b - mean) / sd of the final norm's output h. Theirs is w' h' with w' = w / sd and
    h' = h + c w' / |w'|^2, where c = (b - mean) / sd: the summand goes into the norm's own bias.
    """
    sd = weights["score_sd"]
    w = weights["score_head.weight"] / sd  # (1, D)
    c = (weights["score_head.bias"] - weights["score_mean"]) / sd  # (1,)
    out["score.weight"] = w
    out["transformer.ln_f.bias"] += c * w[0] / w.square().sum()


def model_card(found, to):
    """Markdown: what the model is, how it was made, from what data and at which commit, how good
    it was, and how to load it from the folder `to`."""
    sizes = found.model_config
    family = "Llama" if isinstance(sizes, LlamaConfig) else "GPT2"
    if found.kind == "reward":
        about, code = SCORES, SCORE
    elif not found.chat:
        about, code = BASE, TEXT
    else:
        about, code = CHATS.get(found.stage, "a language model that answers in a chat"), CHAT
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        f"- {family.lower()}",
        "- rlhf",
        f"- {found.stage}",
        "---",
        f"# {Path(to).resolve().name}",
        "",
        f"Stage `{found.stage}` of nanorlhf: {about}. {family} architecture, "
        f"{sizes.n_layer} layers, width {sizes.d_model}, {sizes.n_head} heads, context "
        f"{sizes.block_size}, {sizes.vocab_size} tokens.",
        "",
        "## How it was made",
        "",
        "| stage | data | steps | seed | commit |",
        "|---|---|---|---|---|",
    ]
    for config in reversed(list(checkpoint.ancestors(found))):
        data = ", ".join(config["flags"].get("data", [])) or "the embedded world"
        lines.append(
            f"| {config['stage']} | {data} | {config['step']} | {config['flags']['seed']} "
            f"| {config['commit'] or 'unknown'} |"
        )
    metrics = [f"| {name} | {value} |" for name, value in metrics_of(found).items()]
    lines += ["", "## Metrics", "", "| metric | value |", "|---|---|", *metrics]
    lines += ["", "## Use", "", USE.format(auto_model=AUTO_MODEL[found.kind], to=to, code=code), ""]
    return "\n".join(lines)


def metrics_of(found):
    """The numbers of the checkpoint's own step, and a reward model's report."""
    folder, metrics = found.path.parent, {"step": found.step}
    if (folder / "metrics.csv").exists():
        for row in read_rows(folder / "metrics.csv")[1]:
            metrics |= row if int(row["step"]) == found.step else {}
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text())
        metrics |= {k: f"{v:.4g}" for k, v in report.items() if isinstance(v, float)}
    return metrics
