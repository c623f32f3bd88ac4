"""How models are asked and what their answers are worth: for `evaluate` and the experiments.

Shapes: n response tokens of a chunk, V vocabulary entries.
"""

import math
import random
from pathlib import Path

import torch

from nanorlhf import functional as f
from nanorlhf.config import die, note
from nanorlhf.data import batches, dialogue, world
from nanorlhf.fused import head_loss
from nanorlhf.sampling import sample_responses

HEADINGS = {"win_rate_vs_sft": "win vs SFT", "reward_model": "RM", "n_prompts": "n"}


def named(word):
    """(name, folder) of NAME=FOLDER; a bare FOLDER has its own name. The name is that of a file,
    so a word with a / before its = is a bare folder."""
    name, equals, folder = word.partition("=")
    if not equals or "/" in name:
        name, folder = Path(word).resolve().name, word
    if not name or not folder:
        die(f"--models {word}: neither FOLDER nor NAME=FOLDER")
    return name, folder


# ---- how a base model is asked -----------------------------------------------------------------


def few_shot(rng, prompt, n):
    """A page of n training prompts, each with a good demonstration, that ends with the prompt."""
    requests = world.prompts("train", n, rng.random())
    stories = [world.demonstrate(rng, request, world.GOOD) for request in requests]
    return world.page([*requests, prompt], stories)


def complete(gpt, tokenizer, texts, max_new_tokens, seed, **more):
    """A base model goes on with plain texts, up to the end of the line or of the document. `more`
    is for `sample_responses`."""
    ends = (tokenizer.encode("\n")[0], *tokenizer.ends)
    room = gpt.config.block_size - max_new_tokens
    prompts = [dialogue.encode_document(tokenizer, text)[-room:] for text in texts]
    responses = sample_responses(gpt, tokenizer, prompts, max_new_tokens, seed, ends=ends, **more)
    return [[*ids[:-1], tokenizer.eos_id] if ids[-1] in ends else ids for ids in responses]


def reply_ids(tokenizer, messages, completion):
    """Ids of a completion, which may go on over several turns, up to its last eos."""
    ids, _ = dialogue.encode_pair(tokenizer, messages, completion)
    return ids[len(dialogue.encode_prompt(tokenizer, messages)) :]


# ---- what answers are worth --------------------------------------------------------------------


def interval(values):
    """(mean, [low, high]), a 95 % interval of the mean in the normal approximation; (None, None)
    of no values."""
    if not values:
        return None, None
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, [mean - half, mean + half]


def wins(scores, others):
    """For each score whether it is above the other one: 1, or 0; a tie is half."""
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(scores, others)]


def preferred(prompts, texts, others, panel, seed):
    """The share of prompts to which a labeler, drawn from the panel for each, prefers the first
    text; equal texts count as half."""
    rng = random.Random(f"preferred/{seed}")
    pairs = zip(prompts, zip(texts, others, strict=True), strict=True)
    ranks = [world.rank(rng, rng.choice(panel), prompt, pair) for prompt, pair in pairs]
    return sum(0.5 + 0.5 * (theirs - mine) for mine, theirs in ranks) / len(prompts)


def read_in_parts(tokenizer, prompts, responses, part, device):
    """Yields (tokens, mask) of so many dialogues at a time, each (b, S). The mask is True where the
    next token is of the response."""
    rows = [(p + r, [False] * len(p) + [True] * len(r), "") for p, r in zip(prompts, responses)]
    for batch in batches.batches(rows, part, batches.dialogue_batch, tokenizer.pad_id):
        yield batch["tokens"].to(device), batch["mask"][:, 1:].to(device)


@torch.no_grad()
def mean_kl(policy, reference, tokenizer, prompts, responses, temperature=1.0):
    """Exact KL(policy || reference) per response, in nats, averaged over responses."""
    if policy is reference:
        return 0.0
    total, part = 0.0, 128 if tokenizer.vocab_size < 10000 else 16  # its logits are held at once
    for tokens, mask in read_in_parts(tokenizer, prompts, responses, part, policy.device):
        # of the n response tokens alone, (n, V): with a large vocabulary they are most of the work
        logits = [gpt.head(gpt.hidden(tokens[:, :-1])[mask]) for gpt in (policy, reference)]
        total += f.kl_exact(*logits, temperature).sum().item()
    return total / len(prompts)


@torch.no_grad()
def mean_loss(gpt, tokenizer, prompts, responses):
    """Nats per token of the responses, their ends included, under a language model."""
    total = 0.0
    for tokens, mask in read_in_parts(tokenizer, prompts, responses, 32, gpt.device):
        loss = head_loss(gpt.hidden(tokens[:, :-1]), gpt.head_weight, tokens[:, 1:], mask)
        total += loss.item() * int(mask.sum())
    return total / sum(map(len, responses))


def text_loss(gpt, tokenizer, texts):
    """Nats per token of documents."""
    ids = [dialogue.encode_document(tokenizer, text)[: gpt.config.block_size] for text in texts]
    return mean_loss(gpt, tokenizer, [row[:1] for row in ids], [row[1:] for row in ids])


def variety(texts):
    """How much is said only once: bigrams within a text (mean over the texts of two words or more),
    whole texts, and their first four words."""
    words = [text.split() for text in texts]
    bigrams = [list(zip(w, w[1:])) for w in words if len(w) > 1]
    share = lambda items: len(set(items)) / len(items)
    return {
        "bigrams": sum(map(share, bigrams)) / max(len(bigrams), 1),
        "distinct": share(texts),
        "starts": share([tuple(w[:4]) for w in words]),
    }


def best_of(n, scores, replies):
    """Of the first n replies to each prompt the one with the highest score. scores: (prompts, K),
    of K replies to each; the replies are one list, those to a prompt in a row."""
    best = scores[:, :n].argmax(1).tolist()  # (prompts,)
    return [replies[i * scores.shape[1] + k] for i, k in enumerate(best)]


def best_constant(reward, prompts, scored, ends, n_candidates):
    """The reply with the best mean score over all prompts, of those that end by themselves and
    score best where they were given: `scored` holds (ids, score). A quarter of the candidates goes
    on to four times as many prompts. None where no reply ends."""
    score_of = {tuple(ids): score for ids, score in scored if ids[-1] in ends}
    candidates = sorted(score_of, key=score_of.get)[-n_candidates:]
    n = 1
    while n < len(prompts) and candidates:
        n = min(4 * n, len(prompts))
        mean = {c: sum(reward(prompts[:n], [list(c)] * n)) / n for c in candidates}
        candidates.sort(key=mean.get, reverse=True)
        candidates = candidates[: max(len(candidates) // 4, 1)]
    return list(candidates[0]) if candidates else None


# ---- the table ---------------------------------------------------------------------------------


def print_table(records):
    """All numbers, with 95 % intervals but of the reward, and the answers to the first prompt."""
    keys = [key for key in records[0] if key not in ("model", "sample") and key[-3:] != "_ci"]
    table = [["model", *(HEADINGS.get(key, key.replace("_", " ")) for key in keys)]]
    table += [[record["model"], *(cell(record, key) for key in keys)] for record in records]
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for name, *cells in table:
        aligned = [text.rjust(width) for text, width in zip(cells, widths[1:])]
        note("  ".join([name.ljust(widths[0]), *aligned]))
    prompt = records[0]["sample"]["prompt"]
    note(f"\nprompt: {prompt}")
    for record in records:
        if record["sample"]["prompt"] == prompt:
            note(f"{record['model']:>{widths[0]}} | {record['sample']['response']}")


def cell(record, key):
    number, low_high = record[key], record.get(f"{key}_ci")
    if number is None or key == "n_prompts":
        return "-" if number is None else str(number)
    is_long = low_high and key != "reward_model"
    return f"{number:.3f}" + (" [{:.3f}, {:.3f}]".format(*low_high) if is_long else "")
