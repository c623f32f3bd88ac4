"""Five folds of comparisons, as files, and a bag of words to hold reward models against.

    python examples/folds.py FEEDBACK out_folds --turns 1
    for k in 0 1 2 3 4; do
        python train_rm.py --data out_folds/fold[^$k].jsonl --val_data out_folds/fold$k.jsonl \\
            --init out/sft --out_dir out_folds/fold$k/rm
    done
    python examples/folds.py FEEDBACK out_folds --turns 1       # now beside the reward models

The accuracy alone is what `train_rm.py --folds 5` prints. Here every fold keeps its reward model,
and its own SFT model if one is trained before it, and it is compared with the words pair by pair.
No opening, the first user turn, is in two folds; the interval is a bootstrap over openings.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf import load
from nanorlhf.config import arg, die, from_cli
from nanorlhf.data import dialogue, examples, files, split
from nanorlhf.data.values import as_messages, as_turns
from nanorlhf.judging import reply_ids
from nanorlhf.scoring import score_responses


@dataclass
class Config:
    """Write fold0.jsonl to fold4.jsonl; compare fold0/rm to fold4/rm, if there, with words."""

    data: str = arg("", "comparisons, as train_rm.py reads them", positional=True)
    out: str = arg("out_folds", "folder of the folds and their models", positional=True)
    turns: int = arg(1, "messages before the reply that models read")


def main(cfg):
    folds, words, model = [[] for _ in range(5)], [], []
    for e in examples.load_feedback([cfg.data])[1]:
        if sorted(e.target) != [1, 2]:
            die(f"{e.source}: needs comparisons, and no ties")
        e.completions = [e.completions[e.target.index(rank)] for rank in (1, 2)]
        e.columns["opening"] = e.first_turn
        folds[split.fold_of(e.first_turn, 5)].append(e)
        e.messages = e.messages[-cfg.turns :]
    for k, fold in enumerate(folds):
        files.write_records(f"{cfg.out}/fold{k}.jsonl", map(as_pair, fold))
        words += by_words(sum(folds[:k] + folds[k + 1 :], []), fold)
        path = f"{cfg.out}/fold{k}/rm"
        model += by_model(path, fold) if Path(path).exists() else []
    table = {"words": words}
    if len(model) == len(words):
        table |= {"model": model, "difference": [a - b for a, b in zip(model, words)]}
    for name, values in table.items():
        mean, (low, high) = grouped_interval(values, [e.columns["opening"] for e in sum(folds, [])])
        print(f"{name:10} {mean:.3f} [{low:.3f}, {high:.3f}] of {len(values)} pairs")


def as_pair(example):
    """A record of a comparison, from which train_sft.py takes the chosen reply."""
    replies = [as_messages(example.messages + as_turns(c)) for c in example.completions]
    return {"chosen": replies[0], "rejected": replies[1]}


def by_model(path, pairs):
    """For each pair, 1.0 if a reward model scores the chosen reply higher."""
    model, tokenizer = load(path)
    asked = [dialogue.encode_prompt(tokenizer, e.messages) for e in pairs]
    replies = lambda k: [reply_ids(tokenizer, e.messages, e.completions[k]) for e in pairs]
    score = lambda k: score_responses(model, tokenizer, asked, replies(k), chunk=32)
    return (score(0) > score(1)).float().tolist()


def by_words(known, unseen):
    """The same by logistic regression on the difference of log counts of words. (Least count, decay
    and kind of count were chosen on other folds, in its favour.)"""
    words = lambda reply: re.findall(r"[a-z']+", " ".join(w for _, w in as_turns(reply)).lower())
    pairs = [[Counter(words(c)) for c in e.completions] for e in [*known, *unseen]]
    n, total = len(known), Counter(w for pair in pairs[: len(known)] for c in pair for w in c)
    often = [word for word, count in total.items() if count >= 5]
    x = torch.tensor([[[counts[w] for w in often] for counts in pair] for pair in pairs]).log1p()
    x, weight = x[:, 0] - x[:, 1], torch.zeros(len(often), requires_grad=True)  # (pairs, words)
    adam = torch.optim.Adam([weight], lr=0.02)
    for _ in range(300):
        loss = -torch.nn.functional.logsigmoid(x[:n] @ weight).mean()
        (weight.grad,) = torch.autograd.grad(loss + 1e-2 * weight.square().sum(), weight)
        adam.step()
    return (x[n:] @ weight > 0).float().tolist()


def grouped_interval(values, groups, draws=2000):
    """(mean, (low, high)) by a bootstrap that draws all values of a group together."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    group, n = torch.tensor([numbers[name] for name in groups]), len(numbers)
    drawn = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(draws, n).scatter_add(1, drawn, torch.ones(draws, n))[:, group]
    means = times @ torch.tensor(values) / times.sum(1)  # (draws,)
    return sum(values) / len(values), means.quantile(torch.tensor([0.025, 0.975])).tolist()


if __name__ == "__main__":
    main(from_cli(Config))
