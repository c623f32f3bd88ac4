"""How models are asked and what their answers are worth: for `evaluate` and the experiments.

Shapes: n response tokens of a chunk, V vocabulary entries.
"""

import math
import random
from pathlib import Path

import torch

from nanorlhf import functional as f
from nanorlhf.config import die
from nanorlhf.data import batches, dialogue, world
from nanorlhf.fused import head_loss
from nanorlhf.report import right_pairs
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import make_scorer

HEADINGS = {
    "win_rate_vs_sft": "win vs SFT",
    "reward_model": "RM",
    "eos_rate": "ends",
    "grammatical": "gramm.",
    "n_prompts": "n",
}


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
    newline = tokenizer.encode("\n")[0]
    room = gpt.config.block_size - max_new_tokens
    prompts = [dialogue.encode_document(tokenizer, text)[-room:] for text in texts]
    more |= {"eos_id": newline}
    sampled = sample_responses(gpt, tokenizer, prompts, max_new_tokens, seed, **more)
    responses = []
    for ids in sampled:
        ends = [i for i, token in enumerate(ids) if token in (newline, tokenizer.eos_id)]
        responses.append(ids[: ends[0]] + [tokenizer.eos_id] if ends else ids)
    return responses


def reply_ids(tokenizer, messages, completion):
    """Ids of a completion, which may go on over several turns, up to its last eos."""
    ids = dialogue.encode_pair(tokenizer, messages, completion)
    return ids[len(dialogue.encode_prompt(tokenizer, messages)) :]


def by_preference(judged):
    """Which (example, reply) of `load_feedback`'s examples people judged best, and the others."""
    pairs = {"preferred": [], "not_preferred": []}
    for example in judged:
        for reply, target in zip(example.completions, example.target):
            pairs["preferred" if target == 1 else "not_preferred"].append((example, reply))
    return pairs


# ---- what answers are worth --------------------------------------------------------------------


def interval(values):
    """(mean, [low, high]), a 95 % interval of the mean in the normal approximation."""
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, [mean - half, mean + half]


def grouped_interval(values, groups, draws=2000):
    """As `interval`, by a bootstrap that draws all values of a group together."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group, n = torch.tensor([numbers[name] for name in groups]), len(numbers)
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws, n).scatter_add(1, drawn, torch.ones(draws, n))[:, group]
    means = times @ torch.tensor(values) / times.sum(1)  # (draws,)
    return sum(values) / len(values), means.quantile(torch.tensor([0.025, 0.975])).tolist()


def win_rate(scores, others):
    """The share of scores that are above those of the others, with its interval; a tie is half."""
    if others is None:
        return None, None
    return interval([0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(scores, others)])


def preferred(prompts, texts, others, panel, seed):
    """The share of prompts to which a labeler, drawn from the panel for each, prefers the first
    text; equal texts count as half."""
    rng = random.Random(f"preferred/{seed}")
    pairs = zip(prompts, zip(texts, others, strict=True), strict=True)
    ranks = [world.rank(rng, rng.choice(panel), prompt, pair) for prompt, pair in pairs]
    return sum(0.5 + 0.5 * (theirs - mine) for mine, theirs in ranks) / len(prompts)


def judge(spec, init, device, dtype, prompts):
    """judge(prompts, ids) -> a number for each response: a reward model's folder or a function's
    path.py:name, as `make_scorer` takes them."""
    score, decode = make_scorer(spec, init, device, dtype, prompts), init.tokenizer.decode
    return lambda prompts, ids: score(prompts, ids, [decode(row) for row in ids]).tolist()


def gold(tokenizer, labeler=""):
    """As `judge`: what the embedded world's population truly thinks, or one labeler of it."""
    weights = world.PANEL[labeler] if labeler else world.GOLD_WEIGHTS
    utility = lambda prompt, ids: world.utility(weights, prompt.text, tokenizer.decode(ids))
    return lambda prompts, ids: list(map(utility, prompts, ids))


def accuracy(scores, others):
    """Of all pairs of one prompt's responses whose `others` differ, the share that the scores order
    alike. scores (prompts, K); others: as many numbers in one list."""
    others = torch.tensor(others, dtype=torch.float64).view(scores.shape).tolist()
    right = [r for pair in zip(scores.tolist(), others) for r in right_pairs(*pair)]
    return sum(right) / len(right) if right else math.nan


@torch.no_grad()
def mean_kl(policy, reference, tokenizer, prompts, responses, temperature=1.0):
    """Exact KL(policy || reference) per response, in nats, averaged over responses."""
    if policy is reference:
        return 0.0
    total, device = 0.0, policy.device
    chunk = 128 if tokenizer.vocab_size < 10000 else 16  # its logits are held at once
    for i in range(0, len(prompts), chunk):
        pairs = list(zip(prompts[i : i + chunk], responses[i : i + chunk]))
        tokens, _ = batches.pad([p + r for p, r in pairs], tokenizer.pad_id)
        mask, _ = batches.pad([[0] * (len(p) - 1) + [1] * len(r) for p, r in pairs], 0)
        tokens, mask = tokens.to(device)[:, :-1], mask.to(device) > 0  # (b, S)
        # logits of the n response tokens alone: with a large vocabulary they are most of the work
        mine, theirs = (gpt.head(gpt.hidden(tokens)[mask]) for gpt in (policy, reference))  # (n, V)
        total += f.kl_exact(mine, theirs, temperature).sum().item()
    return total / len(prompts)


@torch.no_grad()
def mean_loss(gpt, tokenizer, prompts, responses):
    """Nats per token of the responses, their ends included, under a language model."""
    rows = [(p + r, [False] * len(p) + [True] * len(r), "") for p, r in zip(prompts, responses)]
    total = 0.0
    for batch in batches.batches(rows, 32, batches.dialogue_batch, tokenizer.pad_id):
        tokens, mask = batch["tokens"].to(gpt.device), batch["mask"][:, 1:].to(gpt.device)
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


def best_constant(reward, prompts, scored, eos_id, n_candidates):
    """The reply with the best mean score over all prompts, of those that end by themselves and
    score best where they were given: `scored` holds (ids, score). A quarter of the candidates goes
    on to four times as many prompts. None where no reply ends."""
    score_of = {tuple(ids): score for ids, score in scored if eos_id in ids}
    candidates = sorted(score_of, key=score_of.get)[-n_candidates:]
    n = 1
    while n < len(prompts) and candidates:
        n = min(4 * n, len(prompts))
        flat = [list(c) for c in candidates for _ in range(n)]
        scores = torch.tensor(reward(prompts[:n] * len(candidates), flat))
        means = scores.view(-1, n).mean(1)  # (candidates,)
        best = means.argsort(descending=True)[: max(len(candidates) // 4, 1)]
        candidates = [candidates[i] for i in best]
    return list(candidates[0]) if candidates else None


# ---- the table ---------------------------------------------------------------------------------


def print_table(rows):
    """All numbers, with 95 % intervals but of the reward, and the answers to the first prompt."""
    keys = [k for k in rows[0] if k not in ("model", "sample") and not k.endswith("_ci")]
    table = [["model", *(HEADINGS.get(key, key.replace("_", " ")) for key in keys)]]
    for row in rows:
        cells = {key: "-" if row[key] is None else f"{row[key]:.3f}" for key in keys}
        cells["n_prompts"] = str(row["n_prompts"])
        for key in cells.keys() - {"reward_model"}:
            if low_high := row.get(f"{key}_ci"):
                cells[key] += " [{:.3f}, {:.3f}]".format(*low_high)
        table.append([row["model"], *cells.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for name, *cells in table:
        line = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *line]))
    prompt = rows[0]["sample"]["prompt"]
    print(f"\nprompt: {prompt}")
    for row in rows:
        if row["sample"]["prompt"] == prompt:
            print(f"{row['model']:>{widths[0]}} | {row['sample']['response']}")
