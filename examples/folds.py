"""Cross-validate a reward model on comparisons, beside models that count words on the same folds.

    python examples/folds.py FEEDBACK OUT_DIR TURNS --init GPT [flags of train_rm.py] \\
        [-- flags of train_sft.py]

Models read the last TURNS messages before the reply. Five folds, grouped by the first user turn:
no dialogue's opening is on both sides. With a `--`, each fold first fine-tunes the GPT on the
chosen replies that it may see. Every stage runs for a fixed number of steps and its last
checkpoint counts. The interval is a bootstrap over openings.
"""

import re
import subprocess
import sys
from collections import Counter
from zlib import crc32

import numpy as np
import torch

from nanorlhf.config import die
from nanorlhf.data import dialogue
from nanorlhf.data.examples import load_feedback, write_records
from nanorlhf.run import checkpoint
from nanorlhf.scoring import score_responses

FOLDS = 5


def main(path, out_dir, turns, rm_flags, sft_flags):
    kind, examples = load_feedback([path])
    if kind != "comparisons":
        die(f"{path}: needs comparisons, found {kind}")
    groups = [e.first_turn for e in examples]
    fold = np.array([crc32(b"fold" + turn.encode()) % FOLDS for turn in groups])
    for e in examples:
        e.messages = e.messages[-turns:]
    baselines = {"bag of words": words_of, "words and word pairs": word_pairs_of}
    right = {name: np.zeros(len(examples)) for name in ("reward model", *baselines)}
    for k in range(FOLDS):
        seen, held_out = [[e for e, f in zip(examples, fold) if (f == k) == s] for s in (0, 1)]
        rm = train(f"{out_dir}/fold{k}", seen, held_out, rm_flags, sft_flags)
        right["reward model"][fold == k] = of_model(rm, held_out)
        for name, features_of in baselines.items():
            right[name][fold == k] = of_counts(features_of, examples, fold == k)
        shares = ", ".join(f"{name} {r[fold == k].mean():.3f}" for name, r in right.items())
        print(f"fold {k}: {shares}", flush=True)
    right |= {f"minus {name}": right["reward model"] - right[name] for name in baselines}
    for name, r in right.items():
        low, high = bootstrap(r, groups)
        print(f"{name:26} {r.mean():.3f} [{low:.3f}, {high:.3f}]")
    print(f"{len(examples)} pairs, {len(set(groups))} openings")


def train(folder, seen, held_out, rm_flags, sft_flags):
    """Fine-tune, if there are flags for it, and train a reward model; returns its checkpoint: the
    last, as the best would be chosen on the very pairs that are held out."""
    for name, part in (("train", seen), ("val", held_out)):
        pairs, demonstrations = [], []
        for e in part:
            prompt = [{"role": role, "content": content} for role, content in e.messages]
            chosen, rejected = e.completions
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            demonstrations.append({"messages": [*prompt, {"role": "assistant", "content": chosen}]})
        write_records(f"{folder}/rm_{name}.jsonl", pairs)
        write_records(f"{folder}/sft_{name}.jsonl", demonstrations)
    if sft_flags:
        init = rm_flags[rm_flags.index("--init") + 1]
        sft = run("sft", folder, ["--init", init, *sft_flags])
        rm_flags = [*rm_flags, "--init", str(sft)]
    return run("rm", folder, rm_flags)


def run(stage, folder, flags):
    """Run train_STAGE.py on the files of a fold; returns its last checkpoint."""
    files = [f"{folder}/{stage}_{name}.jsonl" for name in ("train", "val")]
    command = [
        sys.executable,
        f"train_{stage}.py",
        "--data",
        files[0],
        "--val_data",
        files[1],
        "--out_dir",
        f"{folder}/{stage}",
        *flags,
    ]
    subprocess.run(command, check=True)
    return checkpoint.find(f"{folder}/{stage}", prefer="latest")


def of_model(path, examples):
    """Which pairs a reward model orders as the labeler did."""
    model, found = checkpoint.load_reward_model(path)
    tokenizer, scores = found.tokenizer, []
    for which in (0, 1):
        prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in examples]
        responses = [tokenizer.encode(e.completions[which]) for e in examples]
        scores.append(score_responses(model.eval(), tokenizer, prompts, responses, chunk=32))
    return (scores[0] > scores[1]).numpy()


def of_counts(features_of, examples, is_held_out, steps=300, decay=1e-2):
    """Logistic regression on the difference of log counts; returns what it gets right. (Least
    count, decay and kind of count were chosen on other folds, for this model's good.)"""
    counts = [[Counter(features_of(c)) for c in e.completions] for e in examples]
    total = Counter()
    for pair, held_out in zip(counts, is_held_out):
        for count in () if held_out else pair:
            total.update(count.keys())
    index = {w: i for i, w in enumerate(w for w, n in total.items() if n >= 5)}
    x = torch.zeros(len(counts), len(index))
    for row, pair in enumerate(counts):
        for count, sign in zip(pair, (1.0, -1.0)):
            for w, n in count.items():
                if w in index:
                    x[row, index[w]] += sign * np.log1p(n)
    held_out = torch.tensor(is_held_out)
    seen = x[~held_out]
    weight = torch.zeros(len(index), requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        loss = -torch.nn.functional.logsigmoid(seen @ weight).mean()
        (loss + decay * weight.square().sum()).backward()
        adam.step()
        adam.zero_grad()
    return (x[held_out] @ weight > 0).float().detach().numpy()


def words_of(text):
    return re.findall(r"[a-z']+", text.lower())


def word_pairs_of(text):
    words = words_of(text)
    return words + list(zip(["<", *words], [*words, ">"]))


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
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    if cut < 5 or "--init" not in words[:cut] or not words[2].isdecimal() or words[2] == "0":
        die(
            "usage: python examples/folds.py FEEDBACK OUT_DIR TURNS --init GPT "
            "[flags of train_rm.py] [-- flags of train_sft.py]"
        )
    main(words[0], words[1], int(words[2]), words[3:cut], words[cut + 1 :])
