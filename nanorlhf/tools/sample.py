"""Responses of one or several models to the same prompts, as a file: what people are to judge."""

from dataclasses import dataclass

from nanorlhf.config import arg, die, note, template_flag
from nanorlhf.data import dialogue, world
from nanorlhf.data.batches import drawn
from nanorlhf.data.examples import load_prompts
from nanorlhf.data.files import MESSAGES, write_records
from nanorlhf.data.values import as_messages, prompt
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.sampling import sample_responses


@dataclass
class Config:
    """Have models answer prompts, and write prompts and responses to a file for `label`."""

    models: list[str] = arg(
        ["out/sft"], "checkpoints, or other models as --init takes them", positional=True
    )
    to: str = arg("out/samples.jsonl", "file to write")
    data: list[str] = arg([], "prompts: files or hf:owner/name; default: the embedded world's")
    columns: list[str] = arg([], "rename columns of --data, as in prompt=question")
    prompts: int = arg(100, "prompts, at most")
    responses: int = arg(4, "responses of each model to each prompt")
    template: str = template_flag()
    seed: int = arg(1, "fixes prompts and sampling", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))
    max_new_tokens: int = arg(128, "length limit of a response")
    temperature: float = arg(1.0, "0 is greedy")


def main(cfg):
    records = sampled(cfg)
    write_records(cfg.to, records)
    n = sum(len(record["responses"]) for record in records)
    note(f"{n:,} responses to {len(records):,} prompts; python -m nanorlhf label {cfg.to}")


def sampled(cfg):
    """Records {"prompt" or "messages", "responses", "models", "seed"}, one for each prompt."""
    if len(set(cfg.models)) < len(cfg.models):
        die(f"{' '.join(cfg.models)}: each model once; --responses asks one for several responses")
    dialogues = prompts_of(cfg)
    records = [asked(messages) | {"responses": [], "models": []} for messages in dialogues]
    for model in cfg.models:
        for record, texts in zip(records, answers(cfg, model, dialogues)):
            record["responses"] += texts
            record["models"] += [model] * len(texts)
    return [record | {"seed": cfg.seed} for record in records]


def prompts_of(cfg):
    """Dialogues that end with the user. Of the embedded world's a tenth are held-out prompts, as a
    reward model that learns from the judgements is evaluated on these."""
    if cfg.data:
        examples = load_prompts(cfg.data, cfg.columns)
        return [e.messages for e in drawn(examples, cfg.prompts, cfg.seed)]
    n = max(1, cfg.prompts // 10) if cfg.prompts > 1 else 0
    texts = world.prompts("train", cfg.prompts - n, f"sample/{cfg.seed}")
    texts += world.prompts("held_out", n, f"sample/{cfg.seed}")
    return [[("user", text)] for text in texts]


def asked(messages):
    """{"prompt": text} where a reader of it finds these messages again, else {"messages": ...}."""
    first, *others = written = as_messages(messages)
    is_plain = not others and first["role"] == "user" and not MESSAGES.match(first["content"])
    if is_plain and prompt({"prompt": first["content"]}) == messages:
        return {"prompt": first["content"]}
    return {"messages": written}


def load_speaker(cfg, name):
    """(GPT, ready to sample, and its Checkpoint) of a model that answers."""
    gpt, found = load_gpt(name, template=cfg.template)
    if not found.chat:
        die(f"{name}: a base model, which answers nothing; train_sft.py makes one that does")
    device = pick_device(cfg)
    return cast(gpt, pick_dtype(cfg, device), device).eval(), found


def answers(cfg, name, dialogues):
    """A model's responses to each dialogue, as texts."""
    gpt, found = load_speaker(cfg, name)
    ids = [dialogue.encode_prompt(found.tokenizer, messages) for messages in dialogues]
    room = dialogue.room_for_prompts(cfg.max_new_tokens, gpt.config.block_size)
    ids, _ = dialogue.fit(ids, [0] * len(ids), room, "prompts")
    rows, n = [row for row in ids for _ in range(cfg.responses)], cfg.responses
    about = {"temperature": cfg.temperature, "chunk": 64, "progress": name}
    rows = sample_responses(gpt, found.tokenizer, rows, cfg.max_new_tokens, cfg.seed, **about)
    texts = [found.tokenizer.decode(row) for row in rows]
    return [texts[i : i + n] for i in range(0, len(texts), n)]
