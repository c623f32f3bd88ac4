"""A fork of stage 2: rejection sampling. The SFT model answers each prompt n times, the reward
model picks the best answer, and the model is fine-tuned on these.

    python -m experiments.train_rft
    python -m nanorlhf evaluate --models rft=out/rft

Known as best-of-n fine-tuning, expert iteration or RAFT (arXiv:2304.06767). There is no KL penalty.
The samples themselves are within log n - (n - 1) / n nats of the model that they come from; a model
that is trained on them for long is not bound by that.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train_sft
from nanorlhf.config import arg, die, from_cli, gone
from nanorlhf.data import dialogue, files, values, world
from nanorlhf.data.examples import Example, load_prompts
from nanorlhf.engine import claim
from nanorlhf.machine import ranks
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import make_scorer
from nanorlhf.speaker import load_speaker


@dataclass
class Config(train_sft.Config):
    """Fine-tune on the best of n responses, as the reward model judges them."""

    IDLE = "prompts: data; columns: data=0; disliked: val_data=0"
    out_dir: str = arg("out/rft", "folder for this stage's checkpoints, metrics and samples")
    init: str = arg("out/sft", "the model that answers, and that is then fine-tuned")
    reward: str = arg("out/rm", "the judge: a reward-model folder, or path.py:function")
    reward_timeout: float = arg(600.0, "seconds until a function is given up; 0: never")
    data: list[str] = arg([], "prompts: files or hf:owner/name; default: the embedded world's")
    prompts: int = arg(1000, "prompts that the embedded world asks")
    demonstrations: int = gone(0)
    best_of: int = arg(8, "responses to each")
    learning_rate: float = arg(1e-3, "peak learning rate")
    epochs: int = arg(2, "passes over the data")


def best_responses(cfg):
    """Records of each prompt with the best of its responses that end by themselves."""
    gpt, start = load_speaker(cfg, cfg.init)
    tokenizer, n = start.tokenizer, cfg.best_of
    room = dialogue.context(cfg, gpt.config) - cfg.max_new_tokens
    parts = ("train", cfg.prompts), ("held_out", cfg.prompts // 10)
    asked = [p for split, k in parts for p in world.prompts(split, k, cfg.seed)]
    examples = [Example([("user", p)], f"world: {p}") for p in asked]
    if cfg.data:
        examples = load_prompts(cfg.data, cfg.columns)
    prompts = [p for p in dialogue.encode_prompts(tokenizer, examples, room) for _ in range(n)]
    made = gpt.device, gpt.dtype, prompts, "--reward", cfg.reward_timeout
    score, ids = make_scorer(cfg.reward, start, *made), [p.ids for p in prompts]
    sampled = sample_responses(gpt, tokenizer, ids, cfg.max_new_tokens, cfg.seed, progress="asking")
    texts = [tokenizer.decode(response) for response in sampled]
    ended = torch.tensor([response[-1] in tokenizer.ends for response in sampled])
    scores = score(prompts, sampled, texts).cpu().nan_to_num(nan=-torch.inf)  # nan: left out
    scores = scores.masked_fill(~ended, -torch.inf).view(-1, n)
    best = zip(examples, *(x.tolist() for x in scores.max(1)))
    answers = [(e, texts[n * i + k]) for i, (e, x, k) in enumerate(best) if x > -torch.inf]
    return [{"prompt": values.as_messages(e.messages), "completion": text} for e, text in answers]


def main(cfg):
    claim(cfg)
    path = Path(cfg.out_dir, "best.jsonl")
    if path.resolve() in (Path(name).resolve() for name in cfg.data):
        die(f"--data {path} is the file that this run writes")
    if not (cfg.resume and path.exists()):
        ranks.on_main(lambda: files.write_records(path, best_responses(cfg)))
    return train_sft.main(replace(cfg, data=[str(path)], columns=[]))  # these are our own


if __name__ == "__main__":
    main(from_cli(Config))
