"""Compare `python -m nanorlhf memory` with what the stages really take.

    python examples/memory_check.py OUT_DIR [words that pick rows, such as ppo float32] [--jobs 8]

Runs each stage for three steps on generated data with random weights, every run in a process of
its own. Measured is, on a GPU, torch.cuda.max_memory_allocated; on a CPU the largest resident
memory less what the imports took. With --jobs so many run side by side, which a GPU's figures do
not mind. The rows with GPT-2's vocabulary need its file (tiktoken loads it once, or reads it from
TIKTOKEN_CACHE_DIR) and are left out without it.
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
SIZES = {  # context, blocks, heads, width
    "wide": (byte_tokenizer, (256, 6, 8, 512)),  # activations and weights fill the memory
    "gpt2": (gpt2_tokenizer, (128, 4, 4, 256)),  # logits do
}
ROWS = [  # sizes, stage, flags
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
import torch._dynamo, torch.utils.checkpoint  # a first step imports them
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
    off = 0
    with ThreadPoolExecutor(jobs) as pool:
        run = lambda i, row: measure(folder / f"run_{i}", starts[row[0]], row)
        measured = [pool.submit(run, i, row) for i, row in enumerate(rows)]
        for row, found in zip(rows, measured):
            (sizes, stage, dtype, flags), found = row, found.result()
            predicted = predict(starts[sizes], row)
            ratio = predicted["peak"] / found
            off += abs(ratio - 1) > 0.15
            print(
                f"{sizes:5} {stage:5} {dtype:8}  {predicted['peak'] / 2**30:5.2f} GiB "
                f"{found / 2**30:5.2f} GiB  {ratio:5.2f}  {flags}: {predicted['phase']}",
                flush=True,
            )
    print(f"{off} rows are off by more than 15 %")


def starting_point(folder, make_tokenizer, sizes):
    """Random weights as checkpoints of stages 1 and 3, and data for all stages; None without a
    vocabulary."""
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
    text = lambda n, i: "".join(word.upper() if i >> k & 1 else word for k in range(n))
    prompts = [text(P - 2, i) for i in range(512)]
    few = prompts[:64]  # at its end train_rm.py scores its training data
    answers = [text(T - 1, i) for i in range(4)]
    records = {
        "gpt": [{"text": text(sizes[0], i)} for i in range(512)],
        "sft": [{"prompt": p, "completion": answers[0]} for p in prompts],
        "rm": [{"prompt": p, "completions": answers, "ranks": [1, 2, 3, 4]} for p in few],
        "ppo": [{"prompt": p} for p in prompts],
    }
    for name, rows in records.items():
        for file, part in ((name, rows), (f"{name}_val", rows[:32])):
            (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def measure(out_dir, start, row):
    """Bytes that a stage's script takes at most."""
    _, stage, dtype, flags = row
    _, (block_size, n_layer, n_head, d_model) = SIZES[start.name]
    tokenizer = "gpt2" if start.name == "gpt2" else "bytes"
    own = {
        "gpt": f"--tokenizer {tokenizer} --block_size {block_size} --n_layer {n_layer} "
        f"--n_head {n_head} --d_model {d_model}",
        "sft": f"--init {start}/gpt",
        "rm": f"--init {start}/gpt",
        "ppo": f"--init {start}/gpt --reward {start}/rm --eval_prompts 8 --max_new_tokens {T} "
        "--ppo_epochs 1",
    }[stage]
    common = f"--data {start}/{stage}.jsonl --val_data {start}/{stage}_val.jsonl --max_steps 3 "
    common += f"--eval_every 3 --save_every 3 --out_dir {out_dir} --dtype {dtype} {flags}"
    command = [sys.executable, "-c", RUN, f"train_{stage}", *f"{own} {common}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def predict(start, row):
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
