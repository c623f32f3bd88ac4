"""What each stage is given: the user's files or, without --data, what the embedded world writes.

Stage 1 reads text, stage 2 demonstrations, stage 3 feedback, stage 4 prompts and, for PPO-ptx,
windows of text.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanorlhf.config import die, doing, note
from nanorlhf.data import dialogue, examples, world
from nanorlhf.data.batches import drawn, full_batch, text_batch, write_tokens
from nanorlhf.data.files import write_records
from nanorlhf.data.split import is_held_out, split_held_out
from nanorlhf.machine import ranks
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer, gpt2_tokenizer

# ---- stage 1: text -----------------------------------------------------------------------------


def texts_of(cfg):
    """texts() -> (key, text) of every document, as `read_texts` yields them. Each call reads from
    the beginning: the text is gone through more than once, and files may be larger than memory."""
    if cfg.data:
        return lambda: examples.read_texts(cfg.data, cfg.columns)
    written = world.corpus(cfg.documents, cfg.seed)
    return lambda: zip(written, written)


def make_tokenizer(cfg, texts):
    """The vocabulary of --tokenizer. A BPE is trained on all of the text; a resumed run takes its
    checkpoint's tokenizer instead."""
    if cfg.resume and (path := checkpoint.newest(cfg.out_dir)):
        return checkpoint.load(path).tokenizer
    if cfg.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if cfg.tokenizer == "bytes":
        return byte_tokenizer()
    if cfg.vocab_size < 260:
        die(f"--vocab_size {cfg.vocab_size}: 256 bytes and 4 special tokens make 260 the least")
    from nanorlhf.bpe import train_bpe  # here, as only the first stage learns one

    doing("[gpt] learning a vocabulary")
    return ranks.on_main(lambda: train_bpe((text for _, text in texts()), cfg.vocab_size))


def token_streams(cfg, tokenizer, texts):
    """(training ids, held-out ids): memmaps of files in --out_dir. Without --val_data a tenth of
    the documents is held out."""
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if cfg.val_data:
        train_texts = (text for _, text in texts())
        val_texts = (text for _, text in examples.read_texts(cfg.val_data, cfg.columns))
    else:
        train_texts = (text for key, text in texts() if not is_held_out(key))
        val_texts = (text for key, text in texts() if is_held_out(key))
    doing("[gpt] tokenizing the text")
    train_ids = write_tokens(train_texts, tokenizer, folder / "train.bin")
    val_ids = write_tokens(val_texts, tokenizer, folder / "val.bin")

    # where too few documents leave one side too short, the longer one is cut in two
    if min(len(train_ids), len(val_ids)) <= cfg.block_size and not cfg.val_data:
        longer = max(train_ids, val_ids, key=len)
        cut = len(longer) - len(longer) // 10
        train_ids, val_ids = longer[:cut], longer[cut:]
    if len(train_ids) <= cfg.block_size or len(val_ids) < 2:
        die(f"too little text: {len(train_ids)} tokens for windows of {cfg.block_size}")
    print(f"[gpt] {len(train_ids):,} tokens to train on, {len(val_ids):,} held out")
    return train_ids, val_ids


# ---- stage 2: demonstrations -------------------------------------------------------------------


def demonstrations_of(cfg):
    """(files, training examples, held-out examples) of --data or of the embedded world."""
    files = cfg.data or [ranks.on_main(lambda: demonstrations_file(cfg))]
    loaded = examples.load_demonstrations(files, cfg.columns, cfg.disliked)
    given = examples.load_demonstrations(cfg.val_data, cfg.columns, cfg.disliked)
    train, val = split_held_out(loaded, given)
    return files, train, drawn(val, cfg.val_examples, cfg.seed)


def demonstrations_file(cfg):
    """Kept as an ordinary file, so that a person can read what was imitated."""
    path = Path(cfg.out_dir) / "demonstrations.jsonl"
    return write_records(path, world.demonstrations(cfg.demonstrations, cfg.seed))


# ---- stage 3: feedback -------------------------------------------------------------------------


@dataclass
class FeedbackSet:
    """Judgements, each twice and in the same order: as an Example, and as the row of token ids
    from which `feedback_batch` makes batches."""

    examples: list
    rows: list


def feedback_of(cfg, init):
    """(kind, files, training set, held-out set, unseen set): feedback of --data, or collected now
    from the embedded world's labelers, as three FeedbackSets. The last two judge held-out prompts;
    in the unseen set those are judged by labelers whom training never hears, --heldout_labelers.
    `init` is the checkpoint whose tokenizer and context the reward model has."""
    from nanorlhf.feedback import feedback_file  # here: stage 3 alone collects feedback

    files = cfg.data or [ranks.on_main(lambda: feedback_file(cfg, init))]
    load = lambda paths: examples.load_feedback(paths, cfg.columns)
    kind, loaded = load(files)
    val_kind, given = load(cfg.val_data) if cfg.val_data else (kind, [])
    if val_kind != kind:
        die(f"--val_data has {val_kind}, --data has {kind}")
    to_train, to_judge = split_held_out(loaded, given)
    to_judge = drawn(to_judge, cfg.val_examples, cfg.seed)
    train = [e for e in to_train if not is_unseen(cfg, e)]
    val = [e for e in to_judge if not is_unseen(cfg, e)]
    unseen = [e for e in to_judge if is_unseen(cfg, e)]
    if n := len(to_train) - len(train):
        note(f"[rm] {n} judgements of training prompts, by --heldout_labelers, are left out")
    if sum(len(e.completions) for e in train) < 2 or not val:
        few = f"too few: {len(train)} judgements to train on and {len(val)} held out"
        die(f"{few}, without those of --heldout_labelers {cfg.heldout_labelers}")
    if not teaches(kind, train):
        die(f"all {len(train)} judgements to train on are alike: nothing to learn from them")
    if kind == "ratings":
        standardise_ratings(train, val + unseen)
    return kind, files, *(encoded(cfg, init, part) for part in (train, val, unseen))


def is_unseen(cfg, example):
    name, labeler = cfg.heldout_labelers, example.labeler
    return name != "" and (labeler == name or labeler.startswith(name + "_"))


def teaches(kind, judged):
    """Whether anything is better than anything else, by these judgements."""
    if kind in ("ratings", "thumbs"):
        return len({e.target[0] for e in judged}) > 1
    return any(len(set(e.target)) > 1 for e in judged)


def standardise_ratings(train, others):
    """Ratings -> (rating - mean) / sd of the training set, in place."""
    ratings = torch.tensor([e.target[0] for e in train])
    mean, sd = ratings.mean().item(), ratings.std().item()
    for example in train + others:
        example.target = [(example.target[0] - mean) / sd]


def encoded(cfg, init, judged):
    """A FeedbackSet of the judged examples whose completions all fit into --max_seq_len."""
    if not judged:
        return FeedbackSet([], [])
    longest = dialogue.context(cfg, init.model_config)
    rows = dialogue.encode_feedback(init.tokenizer, judged, longest)
    kept = {source for *_, source in rows}
    return FeedbackSet([e for e in judged if e.source in kept], rows)


# ---- stage 4: prompts, and text for PPO-ptx ----------------------------------------------------


def ppo_prompts(cfg, init):
    """(training, held-out) prompts of --data or of the embedded world, encoded for the model of the
    checkpoint `init`, no two alike. A prompt that leaves no room for --max_new_tokens loses its
    left."""
    room = dialogue.room_for_prompts(cfg.max_new_tokens, dialogue.context(cfg, init.model_config))
    if cfg.data:
        given = examples.load_prompts(cfg.val_data, cfg.columns)
        train, val = split_held_out(examples.load_prompts(cfg.data, cfg.columns), given)
    else:
        if cfg.val_data:
            die(f"--val_data {cfg.val_data[0]}: without --data, prompts are the embedded world's")
        train = world_prompts(cfg, "train", cfg.batch_size * cfg.max_steps)
        val = world_prompts(cfg, "held_out", 1024)
    val = drawn(val, cfg.eval_prompts, cfg.seed)
    print(f"[ppo] {len(train):,} prompts to train on, {len(val):,} held out to evaluate on")
    return [dialogue.encode_prompts(init.tokenizer, part, room) for part in (train, val)]


def world_prompts(cfg, split, n):
    texts = dict.fromkeys(world.prompts(split, n, cfg.seed))
    return [examples.Example([("user", p)], f"world: {p}") for p in texts]


def prompts_of_step(prompts, cfg, step):
    """The prompts that an iteration answers, each --rollouts_per_prompt times in a row."""
    indices = full_batch(len(prompts), cfg.batch_size, cfg.seed, step)
    return [prompts[i] for i in indices for _ in range(cfg.rollouts_per_prompt)]


def ptx_batches(cfg, init, n_windows):
    """ptx_batch(key) -> n_windows windows of pretraining text, as long as the context of the
    checkpoint `init`; None where --ptx_coef is 0."""
    if not cfg.ptx_coef:
        return None
    texts = [t for _, t in examples.read_texts(cfg.ptx_data)] or world.corpus(2000, cfg.seed)
    tokenizer, longest = init.tokenizer, dialogue.context(cfg, init.model_config)
    ids = np.array([i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]])
    length = min(longest, len(ids) - 1)

    def ptx_batch(key):
        rng = np.random.default_rng([cfg.seed, *key])
        starts = rng.integers(0, len(ids) - length, n_windows)
        return text_batch(ids, starts, length, "--ptx_data")

    return ptx_batch
