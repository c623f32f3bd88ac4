"""Compare `python -m nanorlhf memory` with what the stages really take.

    python examples/memory_check.py OUT_DIR [words that pick rows, such as ppo float32] [--jobs 8]

Runs each stage for three steps on generated data with random weights, every run in a process of
its own. On a GPU the measure is torch.cuda.max_memory_allocated, on a CPU the largest resident
memory less what the imports took. --jobs runs so many side by side, which does not change a GPU's
figures. The rows with GPT-2's vocabulary need its file, which tiktoken loads once or reads from
TIKTOKEN_CACHE_DIR; without it they are left out.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.model import GPT, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer, gpt2_tokenizer
from nanorlhf.tools import memory

ROOT = Path(__file__).parents[1]
P, T = 48, 80  # tokens of a prompt and of a response
SIZES = {  # name -> vocabulary, (context, blocks, heads, width)
    "wide": (byte_tokenizer, (256, 6, 8, 512)),  # most memory goes to activations and weights
    "gpt2": (gpt2_tokenizer, (128, 4, 4, 256)),  # most goes to logits
}
ROWS = [  # name in SIZES, stage, flags
    ("wide", "gpt", "--batch_size 16"),
    ("gpt2", "gpt", "--batch_size 32 --grad_accum 4"),
    ("wide", "sft", "--batch_size 36"),
    ("gpt2", "sft", "--batch_size 12"),
    ("gpt2", "sft", "--batch_size 32 --grad_accum 4 --grad_checkpointing"),
    ("wide", "rm", "--batch_size 10"),
    ("gpt2", "rm", "--batch_size 64 --grad_accum 2"),
    ("gpt2", "rm", "--batch_size 64 --grad_checkpointing"),
    ("wide", "ppo", "--batch_size 36 --minibatch_size 36"),
    ("wide", "ppo", "--batch_size 24 --minibatch_size 24 --critic separate"),
    ("wide", "ppo", "--batch_size 48 --minibatch_size 48 --freeze_layers 3"),
    ("gpt2", "ppo", "--batch_size 12 --minibatch_size 12"),
    ("gpt2", "ppo", "--batch_size 24 --minibatch_size 12 --grad_accum 2 --grad_checkpointing"),
]
RUN = """
import importlib, json, sys, torch
import torch._dynamo, torch.utils.checkpoint  # else the first step imports them
from nanorlhf.config import from_cli
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
sys.argv = sys.argv[1:]
stage = importlib.import_module(sys.argv[0])
before = status("VmRSS")
stage.main(from_cli(stage.Config))
gpu = torch.cuda.is_available()
print(json.dumps(torch.cuda.max_memory_allocated() if gpu else status("VmHWM") - before))
"""


def main(folder, words, jobs):
    rows = [
        (sizes, stage, dtype, flags)
        for dtype in ("float32", "bfloat16")
        for sizes, stage, flags in ROWS
        if all(w in f"{sizes} {stage} {dtype} {flags}" for w in words)
    ]
    chosen = {row[0] for row in rows}
    starts = {sizes: starting_point(folder / sizes, *SIZES[sizes]) for sizes in chosen}
    rows = [row for row in rows if starts[row[0]]]
    print(f"{'sizes':5} {'stage':5} {'dtype':8}  predicted  measured  ratio  flags")
    n_off = 0
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(measure, folder / f"run_{i}", starts[row[0]], row)
            for i, row in enumerate(rows)
        ]
        for row, run in zip(rows, runs):
            sizes, stage, dtype, flags = row
            measured, predicted = run.result(), predict(starts[sizes], row)
            ratio = predicted["peak"] / measured
            n_off += abs(ratio - 1) > 0.15
            print(
                f"{sizes:5} {stage:5} {dtype:8}  {predicted['peak'] / 2**30:5.2f} GiB "
                f"{measured / 2**30:5.2f} GiB  {ratio:5.2f}  {flags}: {predicted['phase']}",
                flush=True,
            )
    print(f"{n_off} rows are off by more than 15 %")


def starting_point(folder, make_tokenizer, sizes):
    """The folder with checkpoints of stages 1 and 3, of random weights, and with data for all
    stages; None where the vocabulary is missing."""
    if (folder / "rm/latest").exists():
        return folder
    try:
        tokenizer = make_tokenizer()
    except SystemExit:
        return None  # it has said why
    config = GPTConfig(tokenizer.vocab_size, *sizes)
    gpt = GPT(config)
    reward = RewardModel(gpt)
    reward.score_mean.fill_(0.1)
    for stage, net in (("gpt", gpt), ("rm", reward)):
        cfg = TrainConfig(out_dir=str(folder / stage))
        (folder / stage).mkdir(parents=True, exist_ok=True)
        checkpoint.save(cfg, stage, 0, net.state_dict(), {}, tokenizer, config, True, True)
    word = " a" if len(tokenizer.encode(" a")) == 1 else "a"  # one token, as is its capital

    def text(n, i):
        """The i-th text of n tokens: i in binary, written in small and capital letters."""
        return "".join(word.upper() if i >> k & 1 else word for k in range(n))

    prompts = [text(P - 2, i) for i in range(512)]  # the template adds 2 tokens
    answers = [text(T - 1, i) for i in range(4)]  # and an eos
    ranked = {"completions": answers, "ranks": [1, 2, 3, 4]}
    records = {
        "gpt": [{"text": text(sizes[0], i)} for i in range(512)],
        "sft": [{"prompt": p, "completion": answers[0]} for p in prompts],
        # few, as train_rm.py scores its training data in the end
        "rm": [{"prompt": p} | ranked for p in prompts[:64]],
        "ppo": [{"prompt": p} for p in prompts],
    }
    for stage, lines in records.items():
        for name, part in ((stage, lines), (f"{stage}_val", lines[:32])):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def measure(out_dir, start, row):
    """Run a stage's script; returns the bytes that it takes at most."""
    _, stage, dtype, flags = row
    _, (block_size, n_layer, n_head, d_model) = SIZES[start.name]
    tokenizer = "gpt2" if start.name == "gpt2" else "bytes"
    stage_flags = {
        "gpt": f"--tokenizer {tokenizer} --block_size {block_size} --n_layer {n_layer} "
        f"--n_head {n_head} --d_model {d_model}",
        "sft": f"--init {start}/gpt",
        "rm": f"--init {start}/gpt",
        "ppo": f"--init {start}/gpt --reward {start}/rm --eval_prompts 8 --max_new_tokens {T} "
        "--ppo_epochs 1",
    }[stage]
    common = f"--data {start}/{stage}.jsonl --val_data {start}/{stage}_val.jsonl --max_steps 3 "
    common += f"--eval_every 3 --save_every 3 --out_dir {out_dir} --dtype {dtype} {flags}"
    command = [sys.executable, "-c", RUN, f"train_{stage}", *f"{stage_flags} {common}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def predict(start, row):
    """What `python -m nanorlhf memory` predicts for the same run."""
    _, stage, dtype, flags = row
    flags += f" --dtype {dtype} --init {start}/gpt --eval_prompts 8"
    flags += f" --prompt_tokens {P} --max_new_tokens {T}"
    cfg = memory.checked(from_cli(memory.Config, flags.split()))
    return memory.predict(cfg, stage, memory.model_sizes(cfg.init))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=lambda name: Path(name).resolve())
    parser.add_argument("words", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    main(args.folder, args.words, args.jobs)
