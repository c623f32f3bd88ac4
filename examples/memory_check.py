"""Compare `python -m nanorlhf memory` with what the stages really take.

    python examples/memory_check.py OUT_DIR [words that pick rows, such as ppo float32]

Runs each stage for three steps on generated data with random weights, every run in a process of
its own. Measured is, on a GPU, torch.cuda.max_memory_allocated; on a CPU the largest resident
memory less what the imports took. The rows with GPT-2's vocabulary need its file (tiktoken loads
it once, or reads it from TIKTOKEN_CACHE_DIR).
"""

import json
import subprocess
import sys
from pathlib import Path

from nanorlhf import checkpoint
from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.model import GPT, GPTConfig, RewardModel
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


def main(folder, words):
    off = 0
    print(f"{'sizes':5} {'stage':5} {'dtype':8}  predicted  measured  ratio  flags")
    for dtype in ("float32", "bfloat16"):
        for sizes, stage, flags in ROWS:
            row = f"{sizes} {stage} {dtype} {flags}"
            if not all(word in row for word in words):
                continue
            start = starting_point(folder / sizes, *SIZES[sizes])
            measured = measure(folder, start, stage, f"{flags} --dtype {dtype}".split())
            predicted = predict(start, stage, f"{flags} --dtype {dtype}".split())
            ratio = predicted["peak"] / measured
            off += abs(ratio - 1) > 0.15
            print(f"{sizes:5} {stage:5} {dtype:8}  {predicted['peak'] / 2**30:5.2f} GiB "
                  f"{measured / 2**30:5.2f} GiB  {ratio:5.2f}  {flags}: {predicted['phase']}",
                  flush=True)  # fmt: skip
    print(f"{off} rows are off by more than 15 %")


def starting_point(folder, make_tokenizer, sizes):
    """Random weights as checkpoints of stages 1 and 3, and data for all stages."""
    if (folder / "rm/latest").exists():
        return folder
    tokenizer = make_tokenizer()
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


def measure(folder, start, stage, flags):
    """Bytes that a stage's script takes at most."""
    _, (block_size, n_layer, n_head, d_model) = SIZES[start.name]
    tokenizer = "gpt2" if start.name == "gpt2" else "bytes"
    own = {
        "gpt": f"--tokenizer {tokenizer} --block_size {block_size} --n_layer {n_layer} "
               f"--n_head {n_head} --d_model {d_model}",
        "sft": f"--init {start}/gpt",
        "rm": f"--init {start}/gpt",
        "ppo": f"--init {start}/gpt --reward {start}/rm --eval_prompts 8 --max_new_tokens {T} "
               "--ppo_epochs 1",
    }[stage]  # fmt: skip
    common = f"--data {start}/{stage}.jsonl --val_data {start}/{stage}_val.jsonl --max_steps 3 "
    common += f"--eval_every 3 --save_every 3 --out_dir {folder}/run"
    command = [sys.executable, "-c", RUN, f"train_{stage}", *f"{own} {common}".split(), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[3:])}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def predict(start, stage, flags):
    flags = [*flags, "--init", f"{start}/gpt", "--eval_prompts", "8"]
    flags += ["--prompt_tokens", str(P), "--max_new_tokens", str(T)]
    cfg = memory.checked(from_cli(memory.Config, flags))
    return memory.predict(cfg, stage, memory.model_sizes(cfg.init))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
