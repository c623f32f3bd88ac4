"""What a reward model is worth: accuracy on held-out prompts, calibration, agreement."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from nanorlhf.config import die, doing, reason
from nanorlhf.data import world
from nanorlhf.data.split import fold_of
from nanorlhf.functional import ordered_pairs, rank_of, ranking_accuracy
from nanorlhf.machine import durable


def make_report(cfg, kind, val_set, val_scores, heldout_set, heldout_scores):
    """Accuracies on held-out prompts and calibration, from raw scores."""
    if not all(math.isfinite(x) for row in (*val_scores, *heldout_scores) for x in row):
        die(f"{cfg.out_dir}: scores are not finite, training diverged; a lower --learning_rate?")
    judged = {"accuracy": (kind, val_set, val_scores)}
    if heldout_set:
        judged["accuracy_heldout_labelers"] = kind, heldout_set, heldout_scores
    if not cfg.data:  # the world knows what is better; it is looked at here and never trained on
        by_gold = [replace(e, target=gold_ranks(e)) for e in val_set]
        judged["accuracy_gold"] = "rankings", by_gold, val_scores
    shares = {name: accuracy_over(*what) for name, what in judged.items()}
    intervals = {name: interval_of(*what) for name, what in judged.items()}
    if not cfg.data:
        shares["labelers_agree"] = agreement(val_set, heldout_set)
    report = {"kind": kind} | {name: mean for name, (mean, _) in shares.items()}
    if kind != "ratings":
        report["calibration"] = calibration(kind, val_set, val_scores)
    counts = {name: n for name, (_, n) in shares.items()}
    return report | {"counts": counts, "intervals": intervals}


def accuracy_over(kind, examples, scores):
    """(accuracy, of how many pairs or labels): the quantity that training logs as `val_accuracy`.
    Rankings: of the ordered pairs of a prompt, averaged over prompts. Ratings: of all pairs of
    prompts. Thumbs: of all labels. None where there is nothing to order."""
    if kind == "thumbs":
        return share([(s[0] > 0) == (e.target[0] > 0.5) for e, s in zip(examples, scores)])
    if kind == "ratings":
        ratings = torch.tensor([[e.target[0] for e in examples]])
        return ranked_alike([[s[0] for s in scores]], rank_of(ratings).tolist())
    return ranked_alike(scores, [e.target for e in examples])


def interval_of(kind, examples, scores):
    """[low, high], 95 % of the accuracy of `accuracy_over`, with prompts as what varies; None where
    there is nothing to order. Two prompts judged rightly and two judged wrongly are added, as
    Agresti and Coull (1998) do for shares: one prompt judged rightly is no certainty."""
    mean, _ = accuracy_over(kind, examples, scores)
    if mean is None:
        return None
    of_prompt = defaultdict(list)
    for example, row in zip(examples, scores):
        of_prompt[example.first_turn].append((example, row))
    if kind == "ratings":  # a rating is in many pairs: they tell at least as much as n / 2 that
        n, variance = len(of_prompt) / 2, mean * (1 - mean)  # share none (Hoeffding 1963)
    else:
        parts = [(len(g), accuracy_over(kind, *zip(*g))[0]) for g in of_prompt.values()]
        sizes, shares = torch.tensor([(k, x) for k, x in parts if x is not None]).T.double()
        n = float(sizes.sum() ** 2 / (sizes**2).sum())  # prompts, were all judged equally often
        variance = float((sizes**2 * (shares - mean) ** 2).sum() / (sizes**2).sum())
    middle = (n * mean + 2) / (n + 4)
    square = (n * (variance + mean**2) + 2) / (n + 4)
    half = 1.96 * math.sqrt((square - middle**2) / (n + 4))
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def ranked_alike(scores, ranks):
    """(accuracy, number of ordered pairs) by `ranking_accuracy`; lists of one list a prompt."""
    scores, ranks = (pad_sequence([torch.tensor(row) for row in x], True) for x in (scores, ranks))
    n = int(ordered_pairs(ranks).sum())  # absent completions have rank 0
    return (ranking_accuracy(scores, ranks)[0].item() if n else None), n


def gold_ranks(example):
    golds = [world.gold(example.messages[0][1], text) for text in example.completions]
    return rank_of(torch.tensor([golds]))[0].tolist()


def share(right):
    """(mean, how many) of bools; the mean of none is None."""
    return (sum(right) / len(right) if right else None), len(right)


def ordered(examples, scores):
    """Score of the better minus score of the worse, for every ordered pair of a prompt."""
    return [
        (a - b) if r < q else (b - a)
        for e, s in zip(examples, scores)
        for (a, r), (b, q) in combinations(zip(s, e.target), 2)
        if r != q
    ]


def calibration(kind, examples, scores, bins=5):
    """Rows of (mean predicted probability, observed frequency, count). Pairs: that the one with
    the higher score wins, so from 0.5 on; thumbs: that the labeler likes it."""
    if kind == "thumbs":
        outcomes = [(s[0], e.target[0]) for e, s in zip(examples, scores)]
    else:
        outcomes = [(abs(margin), float(margin > 0)) for margin in ordered(examples, scores)]
    low = 0.0 if kind == "thumbs" else 0.5
    rows = [[] for _ in range(bins)]
    for logit, outcome in outcomes:
        p = torch.tensor(logit).sigmoid().item()
        rows[min(int((p - low) / (1 - low) * bins), bins - 1)].append((p, outcome))
    return [[sum(c) / len(row) for c in zip(*row)] + [len(row)] for row in rows if row]


def agreement(some, others):
    """(share, of how many) of two labelers who judged the same two responses that say the same."""
    same = []
    for a, b in zip(some, others):
        for i, j in combinations(range(len(a.target)), 2):
            if a.completions == b.completions and a.target[i] != a.target[j]:
                same.append((a.target[i] < a.target[j]) == (b.target[i] < b.target[j]))
    return share(same)


def over_folds(n_folds, some, others, scores_of):
    """(examples, scores) of all judgements of two FeedbackSets. They are split by their prompts
    into n_folds parts, and scores_of(training rows, rows) judges each part by what is learned from
    the others."""
    examples, rows = some.examples + others.examples, some.rows + others.rows
    fold = [fold_of(e.first_turn, n_folds) for e in examples]
    scores = [None] * len(rows)
    for k in range(n_folds):
        doing(f"[rm] fold {k + 1} of {n_folds}")
        inside = [i for i in range(len(rows)) if fold[i] == k]
        outside = [rows[i] for i in range(len(rows)) if fold[i] != k]
        if inside and outside:
            for i, row in zip(inside, scores_of(outside, [rows[i] for i in inside])):
                scores[i] = row
    if None in scores:
        die(f"--folds {n_folds}: the {len(rows)} judgements are of too few prompts to be split")
    return examples, scores


def print_folds(kind, examples, scores):
    """Accuracy over all judgements."""
    accuracy, n = accuracy_over(kind, examples, scores)
    words = share_text(accuracy, interval_of(kind, examples, scores), n)
    print(f"[rm] accuracy over folds: {words}")


def share_text(mean, interval, n):
    """A share with its interval, where there are both, and of how many it is."""
    if mean is None:
        return f"- of {n:,}"
    bounds = " [{:.3f}, {:.3f}]".format(*interval) if interval else ""
    return f"{mean:.3f}{bounds} of {n:,}"


def keep_report(cfg, path, report):
    """The score's mean and sd go into the checkpoint, everything into a file and on the screen."""
    set_score_scale(path, report["score_mean"], report["score_sd"])
    durable.write_text(Path(cfg.out_dir, "report.json"), json.dumps(report, indent=1))
    print_report(report)


def set_score_scale(path, mean, sd):
    """Write a reward model's standardisation into its checkpoint, whole or not at all."""
    try:
        weights = torch.load(path / "weights.pt", weights_only=True)
        weights |= {"score_mean": torch.tensor(mean), "score_sd": torch.tensor(sd)}
        durable.write(path / "weights.pt", lambda partial: torch.save(weights, partial))
    except (OSError, RuntimeError) as error:
        die(f"{path}: could not be written ({reason(error)})")


def print_report(report):
    print("[rm] on held-out prompts:")
    for name, n in report["counts"].items():
        words = share_text(report[name], report["intervals"].get(name), n)
        print(f"  {name:26} {words} {'labels' if report['kind'] == 'thumbs' else 'pairs'}")
    mean, sd = report["score_mean"], report["score_sd"]
    print(f"  raw scores: mean {mean:.3f}, sd {sd:.3f}, which become 0 and 1")
    print(f"  on {report['score_unit']}")
    for p, observed, count in report.get("calibration", []):
        print(f"  predicted {p:.2f}  observed {observed:.2f}  ({count} judgements)")
