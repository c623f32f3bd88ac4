"""Cross-validate a reward model on comparisons, beside a bag-of-words model on the same folds.

    python examples/folds.py FEEDBACK.jsonl.gz OUT_DIR --init out_hh/gpt [flags of train_rm.py]

Five folds, grouped by the first user turn: no dialogue's opening is on both sides. The interval
is a bootstrap over openings.
"""

import re
import subprocess
import sys
from zlib import crc32

import numpy as np
import torch

from nanorlhf import batches, checkpoint, data
from nanorlhf.config import die
from nanorlhf.formats.files import read_records
from nanorlhf.scoring import score_responses

FOLDS = 5


def main(path, out_dir, flags):
    kind, examples = data.load_feedback([path])
    if kind != "comparisons":
        die(f"{path}: needs comparisons, found {kind}")
    lines = dict(read_records([path]))
    fold = np.array([crc32(b"fold" + e.first_turn.encode()) % FOLDS for e in examples])
    right = {"reward model": np.zeros(len(examples)), "bag of words": np.zeros(len(examples))}
    for k in range(FOLDS):
        files = {}
        for name, rows in (("train", fold != k), ("val", fold == k)):
            records = [lines[e.source] for e, use in zip(examples, rows) if use]
            files[name] = data.write_records(f"{out_dir}/fold{k}/{name}.jsonl", records)
        command = [sys.executable, "train_rm.py", "--data", files["train"], "--val_data",
                   files["val"], "--out_dir", f"{out_dir}/fold{k}/rm", *flags]  # fmt: skip
        subprocess.run(command, check=True)
        held_out = [e for e, use in zip(examples, fold == k) if use]
        # the last checkpoint: the one with the best validation loss was chosen on these very pairs
        last = checkpoint.find(f"{out_dir}/fold{k}/rm", prefer="latest")
        right["reward model"][fold == k] = of_model(last, held_out)
        right["bag of words"][fold == k] = bag_of_words(examples, fold, k)
        shares = ", ".join(f"{name} {r[fold == k].mean():.3f}" for name, r in right.items())
        print(f"fold {k}: {shares}")
    groups = [e.first_turn for e in examples]
    right["difference"] = right["reward model"] - right["bag of words"]
    for name, r in right.items():
        low, high = bootstrap(r, groups)
        print(f"{name:13} {r.mean():.3f} [{low:.3f}, {high:.3f}]")
    print(f"{len(examples)} pairs, {len(set(groups))} openings")


def of_model(path, examples):
    """Which pairs a reward model orders as the labeler did."""
    model, found = checkpoint.load_reward_model(path)
    tokenizer, scores = found.tokenizer, []
    for which in (0, 1):
        prompts = [batches.encode_prompt(tokenizer, e.messages) for e in examples]
        responses = [tokenizer.encode(e.completions[which]) for e in examples]
        scores.append(score_responses(model.eval(), tokenizer, prompts, responses, chunk=32))
    return (scores[0] > scores[1]).numpy()


def bag_of_words(examples, fold, k, steps=300, decay=3e-3):
    """Logistic regression on the difference of log word counts; returns what it gets right."""
    words = [[set_of(c) for c in e.completions] for e in examples]
    vocabulary = {}
    for pair, f in zip(words, fold):
        for counts in pair if f != k else ():
            for w in counts:
                vocabulary[w] = vocabulary.get(w, 0) + 1
    index = {w: i for i, w in enumerate(w for w, n in vocabulary.items() if n >= 5)}
    x = torch.zeros(len(words), len(index))
    for row, (chosen, rejected) in enumerate(words):
        for counts, sign in ((chosen, 1.0), (rejected, -1.0)):
            for w, n in counts.items():
                if w in index:
                    x[row, index[w]] += sign * np.log1p(n)
    train = torch.tensor(fold != k)
    weight = torch.zeros(len(index), requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        loss = -torch.nn.functional.logsigmoid(x[train] @ weight).mean()
        (loss + decay * weight.square().sum()).backward()
        adam.step()
        adam.zero_grad()
    return (x[~train] @ weight > 0).float().detach().numpy()


def set_of(text):
    counts = {}
    for w in re.findall(r"[a-z']+", text.lower()):
        counts[w] = counts.get(w, 0) + 1
    return counts


def bootstrap(right, groups, draws=2000):
    """95 % interval of the mean, resampling whole groups."""
    rng, names = np.random.default_rng(0), sorted(set(groups))
    members = {g: [] for g in names}
    for value, g in zip(right, groups):
        members[g].append(value)
    sums = np.array([[sum(members[g]), len(members[g])] for g in names])
    found = [sums[rng.integers(0, len(names), len(names))].sum(0) for _ in range(draws)]
    return np.percentile([a / b for a, b in found], [2.5, 97.5])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        die("usage: python examples/folds.py FEEDBACK OUT_DIR [flags of train_rm.py]")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
