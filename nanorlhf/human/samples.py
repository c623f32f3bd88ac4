"""Files of samples: the responses of one or several models to the same prompts, to be judged.

A line is {"prompt": a text or messages, "responses": [texts], "models": [who wrote each], "seed"}.
"""

from dataclasses import dataclass

from nanorlhf.config import arg, die
from nanorlhf.data import dialogue, world
from nanorlhf.data.batches import drawn
from nanorlhf.data.examples import Example, load_prompts
from nanorlhf.data.files import MESSAGES, read_records
from nanorlhf.data.values import Misfit, as_messages, prompt
from nanorlhf.sampling import sample_responses
from nanorlhf.speaker import SpeakerConfig, load_speaker


@dataclass
class SampleConfig(SpeakerConfig):
    """The flags of every command that samples responses to judge."""

    IDLE = "columns: data=0"
    models: list[str] = arg(["out/sft"], "checkpoints, or what --init takes", positional=True)
    data: list[str] = arg([], "prompts: files or hf:owner/name; default: the embedded world's")
    columns: list[str] = arg([], "rename columns of --data, as in prompt=question")
    prompts: int = arg(100, "prompts, at most")
    responses: int = arg(4, "responses of each model to each prompt")


def sampled(cfg):
    """Records of a file of samples, one for each prompt."""
    if len(set(cfg.models)) < len(cfg.models):
        die(f"{' '.join(cfg.models)}: each model once; --responses asks one for several responses")
    examples = prompts_of(cfg)
    records = [{"prompt": as_prompt(e.messages), "responses": [], "models": []} for e in examples]
    for model in cfg.models:
        for record, texts in zip(records, responses_of(cfg, model, examples)):
            record["responses"] += texts
            record["models"] += [model] * len(texts)
    return [record | {"seed": cfg.seed} for record in records]


def prompts_of(cfg):
    """Examples that end with the user. Of the embedded world's a tenth are held-out prompts, as a
    reward model that learns from the judgements is evaluated on these."""
    if cfg.data:
        return drawn(load_prompts(cfg.data, cfg.columns), cfg.prompts, cfg.seed)
    n = max(1, cfg.prompts // 10) if cfg.prompts > 1 else 0
    texts = world.prompts("train", cfg.prompts - n, f"sample/{cfg.seed}")
    texts += world.prompts("held_out", n, f"sample/{cfg.seed}")
    return [Example([("user", text)], "") for text in texts]


def as_prompt(turns):
    """What stands under "prompt" in a file: a text, where every reader of it finds these turns
    again; otherwise messages."""
    messages = as_messages(turns)
    text = messages[-1]["content"]
    is_plain = len(messages) == 1 and not MESSAGES.match(text) and prompt({"prompt": text}) == turns
    return text if is_plain else messages


def responses_of(cfg, model, examples):
    """A model's responses to each example, as texts."""
    gpt, checkpoint = load_speaker(cfg, model, must_answer=True)
    tokenizer, n = checkpoint.tokenizer, cfg.responses
    room = dialogue.room_for_prompts(cfg.max_new_tokens, gpt.config.block_size)
    prompts = dialogue.encode_prompts(tokenizer, examples, room)
    ids = [prompt.ids for prompt in prompts for _ in range(n)]
    limits = {"temperature": cfg.temperature, "chunk": 64, "progress": model}
    ids = sample_responses(gpt, tokenizer, ids, cfg.max_new_tokens, cfg.seed, **limits)
    texts = [tokenizer.decode(response) for response in ids]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def read_samples(path):
    """Yields the record of each line; exits 2 where a line is none of samples."""
    for source, record in read_records([path]):
        responses = record.get("responses")
        texts = responses if isinstance(responses, list) else [None]
        models = record.get("models", [""] * len(texts))
        is_paired = isinstance(models, list) and len(models) == len(texts)
        if not is_paired or not all(isinstance(x, str) for x in texts + models):
            die(f"{source}: needs texts as 'responses' and who wrote each as 'models'")
        try:
            turns = prompt(record, "messages" if "messages" in record else "prompt")
        except Misfit as misfit:
            die(f"{source}: {misfit}")
        rest = {"responses": texts, "models": models, "seed": record.get("seed", 0)}
        yield {"prompt": as_prompt(turns)} | rest
