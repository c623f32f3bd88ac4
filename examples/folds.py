"""Cross-validate a reward model on comparisons, beside models that count words on the same folds.

    python examples/folds.py FEEDBACK OUT_DIR TURNS --init GPT [flags of train_rm.py] \\
        [-- flags of train_sft.py]

Models read the last TURNS messages before the reply. There are five folds, grouped by opening, the
first user turn, so that no opening is on both sides. With a `--`, each fold first fine-tunes the
GPT on the chosen replies that it may see. Every stage runs for a fixed number of steps, and its
last checkpoint counts. The interval is a bootstrap over openings. The folds are left in OUT_DIR, as
fold0.jsonl to fold4.jsonl.
"""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import torch

from nanorlhf.config import die
from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import load_feedback
from nanorlhf.data.files import write_records
from nanorlhf.data.split import fold_of
from nanorlhf.data.values import as_messages, as_turns
from nanorlhf.run import checkpoint
from nanorlhf.scoring import completion_scores

FOLDS = 5


def main(path, out_dir, turns, rm_flags, sft_flags):
    kind, examples = load_feedback([path])
    if kind != "rankings" or any(sorted(e.target) != [1, 2] for e in examples):
        die(f"{path}: needs comparisons, and no ties")
    for e in examples:
        e.completions = [c for _, c in sorted(zip(e.target, e.completions), key=lambda p: p[0])]
    openings = [e.first_turn for e in examples]
    fold = np.array([fold_of(opening, FOLDS) for opening in openings])
    for e in examples:
        e.messages = e.messages[-turns:]
    baselines = {"bag of words": words_of, "words and word pairs": word_pairs_of}
    # right[name][i]: 1 if the pair i is ordered as the labeler did by a model that has not seen it
    right = {name: np.zeros(len(examples)) for name in ("reward model", *baselines)}
    parts = [[e for e, i in zip(examples, fold) if i == k] for k in range(FOLDS)]
    files = [write_pairs(f"{out_dir}/fold{k}.jsonl", part) for k, part in enumerate(parts)]
    for k in range(FOLDS):
        is_held_out = fold == k
        seen = files[:k] + files[k + 1 :]
        rm = train(f"{out_dir}/fold{k}", seen, files[k], rm_flags, sft_flags)
        right["reward model"][is_held_out] = right_by_model(rm, parts[k])
        for name, features_of in baselines.items():
            right[name][is_held_out] = right_by_counts(features_of, examples, is_held_out)
        shares = ", ".join(f"{name} {r[is_held_out].mean():.3f}" for name, r in right.items())
        print(f"fold {k}: {shares}", flush=True)
    right |= {f"minus {name}": right["reward model"] - right[name] for name in baselines}
    for name, values in right.items():
        low, high = bootstrap(values, openings)
        print(f"{name:26} {values.mean():.3f} [{low:.3f}, {high:.3f}]")
    print(f"{len(examples)} pairs, {len(set(openings))} openings")


def write_pairs(path, examples):
    """A file of comparisons, from which train_sft.py takes the chosen replies."""
    dialogues = lambda e: [as_messages(e.messages + as_turns(c)) for c in e.completions]
    return write_records(path, [dict(zip(("chosen", "rejected"), dialogues(e))) for e in examples])


def train(folder, seen, unseen, rm_flags, sft_flags):
    """Fine-tune, if there are flags for it, and train a reward model, on files of pairs. Returns
    its last checkpoint: the best one would have been chosen on the pairs that are held out."""
    data = ["--data", *seen, "--val_data", unseen]
    if sft_flags:
        init = rm_flags[rm_flags.index("--init") + 1]
        sft = run("sft", f"{folder}/sft", [*data, "--init", init, *sft_flags])
        rm_flags = [*rm_flags, "--init", str(sft)]
    return run("rm", f"{folder}/rm", [*data, *rm_flags])


def run(stage, out_dir, flags):
    """Run train_STAGE.py; returns its last checkpoint."""
    command = [sys.executable, f"train_{stage}.py", "--out_dir", out_dir, *flags]
    subprocess.run(command, check=True)
    return checkpoint.find(out_dir, prefer="latest")


def right_by_model(path, examples):
    """For each pair, whether a reward model orders it as the labeler did."""
    model, found = checkpoint.load_reward_model(path)
    tokenizer = found.tokenizer
    rows = dialogue.encode_feedback(tokenizer, examples, model.gpt.config.block_size)
    if len(rows) < len(examples):
        die(f"{path}: its context is too short for {len(examples) - len(rows)} held-out pairs")
    right = []
    with torch.no_grad():
        for batch in batches.batches(rows, 32, batches.feedback_batch, tokenizer.pad_id):
            scores = completion_scores(model.eval(), batch)  # (B, 2), the chosen first
            right += (scores[:, 0] > scores[:, 1]).tolist()
    return np.array(right)


def right_by_counts(features_of, examples, is_held_out, steps=300, decay=1e-2):
    """The same for held-out pairs by logistic regression on the difference of log counts, fitted on
    the others. (Least count, decay and kind of count were chosen on other folds, in its favour.)"""
    counts = [[Counter(features_of(said(c))) for c in e.completions] for e in examples]
    total = Counter()
    for pair, held_out in zip(counts, is_held_out):
        if not held_out:
            for count in pair:
                total.update(count.keys())
    index = {w: i for i, w in enumerate(w for w, n in total.items() if n >= 5)}
    x = torch.zeros(len(counts), len(index))
    for row, pair in enumerate(counts):
        for count, sign in zip(pair, (1.0, -1.0)):
            for w, n in count.items():
                if w in index:
                    x[row, index[w]] += sign * np.log1p(n)
    is_held_out = torch.tensor(is_held_out)
    seen, unseen = x[~is_held_out], x[is_held_out]
    weight = torch.zeros(len(index), requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        loss = -torch.nn.functional.logsigmoid(seen @ weight).mean()
        (loss + decay * weight.square().sum()).backward()
        adam.step()
        adam.zero_grad()
    return (unseen @ weight > 0).float().detach().numpy()


def said(reply):
    return "\n".join(words for _, words in as_turns(reply))


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def word_pairs_of(text):
    words = words_of(text)
    return words + list(zip(["<", *words], [*words, ">"]))


def bootstrap(values, openings, draws=2000):
    """95 % interval of the mean of values, resampling all pairs of an opening together."""
    rng, groups = np.random.default_rng(0), sorted(set(openings))
    members = {opening: [] for opening in groups}
    for value, opening in zip(values, openings):
        members[opening].append(value)
    sums = np.array([[sum(members[g]), len(members[g])] for g in groups])  # (groups, 2)
    drawn = [sums[rng.integers(0, len(groups), len(groups))].sum(0) for _ in range(draws)]
    return np.percentile([total / count for total, count in drawn], [2.5, 97.5])


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    if cut < 5 or "--init" not in words[:cut] or not words[2].isdecimal() or words[2] == "0":
        die(
            "usage: python examples/folds.py FEEDBACK OUT_DIR TURNS --init GPT "
            "[flags of train_rm.py] [-- flags of train_sft.py]"
        )
    main(words[0], words[1], int(words[2]), words[3:cut], words[cut + 1 :])
