"""Collect feedback on a model's own responses, judged by the embedded world's labelers."""

import random
from pathlib import Path

from nanorlhf.config import die
from nanorlhf.data import dialogue, world
from nanorlhf.data.examples import is_held_out, write_records
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run import checkpoint, session
from nanorlhf.sampling import sample_responses


def feedback_file(cfg, init):
    """Kept as an ordinary file for a person to read; a resumed run goes on with its own."""
    path = Path(cfg.out_dir).parent / "feedback.jsonl"
    if not (cfg.resume and path.exists() and session.newest(cfg)):
        write_records(path, collect_feedback(cfg, init))
    return path


def collect_feedback(cfg, init):
    """Sample 4 to 9 responses per prompt from the SFT model and have a labeler judge them; those
    to held-out prompts are judged twice, by a training labeler and by one never trained on."""
    gpt, sft = checkpoint.load_gpt(cfg.sft)
    if not sft.chat:
        die(f"{sft.path}: a base model; --sft needs one that was trained on the chat template")
    checkpoint.same_vocabulary(init, sft)
    device = pick_device(cfg)
    cast(gpt, pick_dtype(cfg, device), device).eval()
    rng = random.Random(f"feedback/{cfg.seed}")
    prompts = world.prompts("train", cfg.prompts, cfg.seed)
    prompts += world.prompts("held_out", cfg.heldout_prompts, cfg.seed)
    K = [rng.randint(4, 9) if cfg.feedback == "rankings" else 4 for _ in prompts]
    ids = [dialogue.encode_prompt(sft.tokenizer, [("user", p)]) for p in prompts]
    dialogue.room_for_prompts(cfg.max_new_tokens, gpt.config.block_size, max(map(len, ids)))
    ids = [row for row, k in zip(ids, K) for _ in range(k)]
    sampled = sample_responses(
        gpt, sft.tokenizer, ids, cfg.max_new_tokens, cfg.seed, progress="sampling responses"
    )
    texts = iter([sft.tokenizer.decode(row) for row in sampled])
    records = []
    for prompt, k in zip(prompts, K):
        completions = [next(texts) for _ in range(k)]
        labelers = [rng.choice(world.TRAIN_LABELERS)]
        if is_held_out(prompt):
            labelers.append(rng.choice(world.HELD_OUT_LABELERS))
        for labeler in labelers:
            records += judge(rng, cfg.feedback, labeler, prompt, completions)
    return records


def judge(rng, feedback, labeler, prompt, completions):
    """What one labeler says of completions of one prompt, as records of a feedback file."""
    about = {"prompt": prompt, "labeler": labeler}
    if feedback == "rankings":
        ranks = world.rank(rng, labeler, prompt, completions)
        return [about | {"completions": completions, "ranks": ranks}]
    if feedback == "comparisons":
        pairs = [pair for pair in zip(completions[::2], completions[1::2]) if pair[0] != pair[1]]
        ranked = [(pair, world.rank(rng, labeler, prompt, pair)) for pair in pairs]
        return [about | {"chosen": p[r.index(1)], "rejected": p[r.index(2)]} for p, r in ranked]
    ask, key = {"ratings": (world.rate, "rating"), "thumbs": (world.likes, "label")}[feedback]
    return [about | {"completion": c, key: ask(rng, labeler, prompt, c)} for c in completions]
