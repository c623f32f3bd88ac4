"""Hand a checkpoint to the field's tools: a folder that transformers loads, with a model card."""

import json
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die, reason
from nanorlhf.hf.export import write_model
from nanorlhf.loading import ancestors
from nanorlhf.machine import durable
from nanorlhf.run import checkpoint
from nanorlhf.run.metrics import read_rows

BASE = "a base model: it goes on with text, after its `bos_token`, and follows no instruction"
CHAT = "a language model that answers in a chat: write it with `apply_chat_template`"
JUDGE = """a reward model: one score per dialogue, read at its end token, in standard deviations of
the responses it was trained on; write the dialogue with `apply_chat_template`"""
CARD = """---
library_name: transformers
tags: [rlhf, {stage}]
---
Stage `{stage}` of nanorlhf: {sentence}. `transformers.{auto_model}.from_pretrained` loads it.

| stage | data | judged by | steps | seed | commit |
|---|---|---|---|---|---|
{runs}

| metric | value |
|---|---|
{metrics}
"""


@dataclass
class Config:
    """Write a checkpoint in Hugging Face layout (needs safetensors)."""

    model: str = arg("out/ppo", "checkpoint folder of any stage or fork", positional=True)
    to: str = arg("", "folder to write; default: MODEL/hf", positional=True)
    dtype: str = arg("float32", "of the weights", choices=("float32", "bfloat16"))


def main(cfg):
    to = cfg.to or f"{cfg.model}/hf"
    model, exported = checkpoint.load_model(cfg.model)
    weights = checkpoint.gpt_weights(model.state_dict())
    weights |= {n: w for n, w in model.state_dict().items() if n.startswith("score_")}
    write_model(to, exported, weights, cfg.dtype)
    is_rm = exported.kind == "reward"
    auto_model = "AutoModelForSequenceClassification" if is_rm else "AutoModelForCausalLM"
    try:
        runs = "\n".join(runs_of(exported))
        metrics = "\n".join(f"| {name} | {x} |" for name, x in metrics_of(exported).items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        damage = f"{type(error).__name__}: {reason(error)}"
        die(f"{exported.path}: its config.json or report.json is damaged ({damage})")
    sentence = JUDGE if is_rm else CHAT if exported.tokenizer.chat else BASE
    texts = {"sentence": sentence, "auto_model": auto_model, "runs": runs, "metrics": metrics}
    durable.write_text(Path(to, "README.md"), CARD.format(stage=exported.stage, **texts))
    print(f"wrote {to}: transformers.{auto_model}.from_pretrained({to!r})")


def runs_of(exported):
    """Rows of the table of runs: the checkpoint's own is the last, behind those it started from."""
    for run in reversed(list(ancestors(exported))):
        data = ", ".join(run["flags"].get("data", [])) or "the embedded world"
        flags, commit = run["flags"], run["commit"] or "unknown"
        cells = run["stage"], data, flags.get("reward") or "–", run["step"], flags["seed"], commit
        yield f"| {' | '.join(map(str, cells))} |"


def metrics_of(exported):
    """The numbers of the checkpoint's own step, and a reward model's report."""
    folder, metrics = exported.path.parent, {"step": exported.step}
    if (folder / "metrics.csv").exists():
        rows = {int(row["step"]): row for row in read_rows(folder / "metrics.csv")[1]}
        metrics |= rows.get(exported.step, {})
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text())
        metrics |= {name: f"{x:.4g}" for name, x in report.items() if isinstance(x, float)}
    return metrics
