"""Collect feedback on a model's own responses, judged by the embedded world's labelers."""

import random
from pathlib import Path

from nanorlhf.config import die, doing
from nanorlhf.data import dialogue, world
from nanorlhf.data.batches import drawn
from nanorlhf.data.files import write_records
from nanorlhf.data.split import is_held_out
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.speaker import load_speaker

UNIT_RESPONSES = 512  # by which the score's mean and sd are measured


def feedback_file(cfg, init):
    """Kept as an ordinary file for a person to read; a resumed run goes on with its own."""
    path = Path(cfg.out_dir) / "feedback.jsonl"
    if not (cfg.resume and path.exists() and checkpoint.newest(cfg.out_dir)):
        write_records(path, collect_feedback(cfg, init))
    return path


def collect_feedback(cfg, init):
    """Sample 4 to 9 responses per prompt from the SFT model and have a labeler judge them; those
    to held-out prompts are judged twice, by a training labeler and by one never trained on."""
    rng = random.Random(f"feedback/{cfg.seed}")
    prompts = world.prompts("train", cfg.prompts, cfg.seed)
    prompts += world.prompts("held_out", cfg.heldout_prompts, cfg.seed)
    K = [rng.randint(4, 9) if cfg.feedback == "rankings" else 4 for _ in prompts]
    dialogues = [[("user", p)] for p, k in zip(prompts, K) for _ in range(k)]
    sft, pairs = answers(cfg, init, dialogues, is_cut=False)
    if not pairs:
        die(f"{sft.path}: a base model; --sft names one that was trained on the chat template")
    texts = iter([sft.tokenizer.decode(response) for _, response in pairs])
    records = []
    for prompt, k in zip(prompts, K):
        completions = [next(texts) for _ in range(k)]
        labelers = [rng.choice(world.TRAIN_LABELERS)]
        if is_held_out(prompt):
            labelers.append(rng.choice(world.HELD_OUT_LABELERS))
        for labeler in labelers:
            records += judge(rng, cfg.feedback, labeler, prompt, completions)
    return records


def answers(cfg, init, dialogues, is_cut=True):
    """(Checkpoint of the model that PPO will start from, which is --sft or else --init; pairs of
    prompt ids and response ids, one for each dialogue, or none where it is a base model). `is_cut`:
    whether a long prompt loses its left, or exits 2."""
    gpt, sft = load_speaker(cfg, cfg.sft or cfg.init)
    if not sft.tokenizer.chat:
        return sft, []
    checkpoint.same_vocabulary(init, sft)
    ids = [dialogue.encode_prompt(sft.tokenizer, messages) for messages in dialogues]
    longest, n_new = dialogue.context(cfg, gpt.config), cfg.max_new_tokens
    if is_cut:
        n_new = min(n_new, longest // 2)
    room = dialogue.room_for_prompts(n_new, longest, 2 if is_cut else max(map(len, ids)))
    ids = [row[-room:] for row in ids]
    # 64 rows of a large model's cache fit beside what training needs anyway
    size = {"chunk": 64 if cfg.data else 512, "progress": "sampling responses"}
    doing(f"[rm] sampling {len(ids)} responses of {sft.path}")
    sampled = sample_responses(gpt, sft.tokenizer, ids, n_new, cfg.seed, **size)
    return sft, list(zip(ids, sampled))


def texts_of_unit(cfg, init, train_set):
    """(rows as `encode_feedback` makes them, a description of them). The reward model's mean and sd
    on these texts become 0 and 1 in PPO. As in lm-human-preferences (arXiv:1909.08593, section 2.1)
    they are responses of the model that PPO will start from, to training prompts. A response that
    did not end by itself is left out, since PPO gives it a fixed score. A base model cannot answer:
    then they are texts of the training data."""
    prompts = {str(e.messages): e.messages for e in train_set.examples}
    dialogues = drawn(list(prompts.values()), UNIT_RESPONSES, cfg.seed)
    dialogues *= -(-UNIT_RESPONSES // len(dialogues))  # few prompts are answered several times
    sft, pairs = answers(cfg, init, dialogues[:UNIT_RESPONSES])
    ended = [(p, r) for p, r in pairs if r[-1] in sft.tokenizer.ends]
    if len(ended) > 1:
        longest = dialogue.context(cfg, init.model_config)
        ended = [(p, dialogue.closed(sft.tokenizer, r)) for p, r in ended]
        rows = [([(p + r)[-longest:]], [len(r)], [0], str(sft.path)) for p, r in ended]
        return rows, f"{len(rows)} responses of {sft.path}"
    why = "none that ends by itself" if pairs else "a base model"
    rows = drawn(train_set.rows, UNIT_RESPONSES, cfg.seed)
    return rows, f"texts of the data, as {sft.path} has no responses: {why}"


def judge(rng, feedback, labeler, prompt, completions):
    """What one labeler says of completions of one prompt, as records of a feedback file."""
    record = {"prompt": prompt, "labeler": labeler}
    if feedback == "rankings":
        ranks = world.rank(rng, labeler, prompt, completions)
        return [record | {"completions": completions, "ranks": ranks}]
    if feedback == "comparisons":
        pairs = [pair for pair in zip(completions[::2], completions[1::2]) if pair[0] != pair[1]]
        ranked = [(pair, world.rank(rng, labeler, prompt, pair)) for pair in pairs]
        return [record | {"chosen": p[r.index(1)], "rejected": p[r.index(2)]} for p, r in ranked]
    ask, key = {"ratings": (world.rate, "rating"), "thumbs": (world.likes, "label")}[feedback]
    return [record | {"completion": c, key: ask(rng, labeler, prompt, c)} for c in completions]
