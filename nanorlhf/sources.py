"""What PPO is given: prompts to answer and, for PPO-ptx, windows of text."""

import numpy as np

from nanorlhf.data import dialogue, world
from nanorlhf.data.batches import epoch_batch
from nanorlhf.data.examples import Example, load_prompts, read_texts, split_held_out
from nanorlhf.data.tokens import text_batch


def ppo_prompts(cfg, tokenizer, block_size):
    """(training, held-out) prompts of --data or of the embedded world, encoded; they lose their
    left where they leave no room for --max_new_tokens."""
    room = dialogue.room_for_prompts(cfg.max_new_tokens, block_size)
    if cfg.data:
        given = load_prompts(cfg.val_data, cfg.columns)
        splits = split_held_out(load_prompts(cfg.data, cfg.columns), given)
    else:
        n = cfg.batch_size * cfg.max_steps
        made = world.prompts("train", n, cfg.seed), world.prompts("held_out", 1024, cfg.seed)
        splits = [[Example([("user", p)], f"world: {p}") for p in split] for split in made]
    train_prompts, val_prompts = [dialogue.encode_prompts(tokenizer, s, room) for s in splits]
    return train_prompts, val_prompts[: cfg.eval_prompts]


def prompts_of_step(prompts, cfg, step):
    """The prompts that an iteration answers, each --rollouts_per_prompt times in a row."""
    indices = epoch_batch(len(prompts), cfg.batch_size, cfg.seed, step)
    return [prompts[i] for i in indices for _ in range(cfg.rollouts_per_prompt)]


def ptx_batches(cfg, tokenizer, block_size):
    """ptx_batch(key) -> windows of pretraining text; None where --ptx_coef is 0."""
    if not cfg.ptx_coef:
        return None
    texts = [t for _, t in read_texts(cfg.ptx_data)] or world.corpus(2000, cfg.seed)
    ids = np.array([i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]])
    length = min(block_size, len(ids) - 1)

    def ptx_batch(key):
        rng = np.random.default_rng([cfg.seed, *key])
        starts = rng.integers(0, len(ids) - length, cfg.ptx_batch_size)
        return text_batch(ids, starts, length, "--ptx_data")

    return ptx_batch
