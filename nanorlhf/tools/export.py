"""Hand a checkpoint to the field's tools: a folder that transformers loads, with a model card."""

import json
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die, reason
from nanorlhf.hf.export import write_model
from nanorlhf.llama import LlamaConfig
from nanorlhf.loading import ancestors
from nanorlhf.machine import durable
from nanorlhf.run.metrics import read_rows

AUTO_MODEL = {"lm": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
BASE = "a base model: it goes on with text, after its `bos_token`, and follows no instruction"
CHAT = "a language model that answers in a chat: write it with `apply_chat_template`"
JUDGE = (
    "a reward model: one score per dialogue, read at its end token, in standard deviations of the "
    "responses it was trained on; write the dialogue with `apply_chat_template`"
)
CARD = """---
library_name: transformers
tags: [{tag}, rlhf, {stage}]
---
# {name}

Stage `{stage}` of nanorlhf: {sentence}. {family} architecture, {sizes}.

| stage | data | steps | seed | commit |
|---|---|---|---|---|
{runs}

| metric | value |
|---|---|
{metrics}

```python
from transformers import AutoTokenizer, {auto_model}

tokenizer = AutoTokenizer.from_pretrained("{to}")
model = {auto_model}.from_pretrained("{to}")
```
"""


@dataclass
class Config:
    """Write a checkpoint in Hugging Face layout (needs safetensors)."""

    model: str = arg("out/ppo", "checkpoint folder of any stage or fork", positional=True)
    to: str = arg("", "folder to write; default: MODEL/hf", positional=True)


def main(cfg):
    to = cfg.to or f"{cfg.model}/hf"
    exported = write_model(cfg.model, to)
    try:
        card = model_card(exported, to)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        damage = f"{type(error).__name__}: {reason(error)}"
        die(f"{exported.path}: its config.json or report.json is damaged ({damage})")
    durable.write_text(Path(to, "README.md"), card)
    print(f"wrote {to}: transformers.{AUTO_MODEL[exported.kind]}.from_pretrained({to!r})")


def model_card(exported, to):
    """Markdown: what the model is, from which runs, data and commits, how good, how to load it."""
    config, runs = exported.model_config, []
    for run in reversed(list(ancestors(exported))):
        data = ", ".join(run["flags"].get("data", [])) or "the embedded world"
        cells = run["stage"], data, run["step"], run["flags"]["seed"], run["commit"] or "unknown"
        runs.append(f"| {' | '.join(map(str, cells))} |")
    answers = CHAT if exported.chat else BASE
    family = "Llama" if isinstance(config, LlamaConfig) else "GPT2"
    return CARD.format(
        name=Path(to).resolve().name,
        to=to,
        stage=exported.stage,
        sentence=JUDGE if exported.kind == "reward" else answers,
        family=family,
        sizes=f"{config.n_layer} layers, width {config.d_model}, context {config.block_size}, "
        f"{config.vocab_size} tokens",
        runs="\n".join(runs),
        metrics="\n".join(f"| {name} | {x} |" for name, x in metrics_of(exported).items()),
        tag=family.lower(),
        auto_model=AUTO_MODEL[exported.kind],
    )


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
