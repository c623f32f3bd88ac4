"""What `python -m nanorlhf memory` predicts, beside what a stage takes."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from nanorlhf.model import GPTConfig
from nanorlhf.tools import memory

ROOT = Path(__file__).parents[2]
SIZES = "--tokenizer bytes --block_size 256 --n_layer 6 --n_head 8 --d_model 512"
RUN = """
import json, sys, torch
import torch._dynamo  # else the first step imports it
import train_gpt
from nanorlhf.config import from_cli

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

before = status("VmRSS")
train_gpt.main(from_cli(train_gpt.Config))
gpu = torch.cuda.is_available()
print(json.dumps(torch.cuda.max_memory_allocated() if gpu else status("VmHWM") - before))
"""


def test_pretraining_takes_what_is_predicted(tmp_path):
    """On a GPU the bytes of all tensors; on a CPU resident memory less that of the imports."""
    for name, n in (("train", 600), ("val", 40)):
        lines = (json.dumps({"text": f"{i} " * 80}) for i in range(n))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    flags = f"{SIZES} --batch_size 16 --max_steps 3 --eval_every 3 --dtype float32 --no-check"
    flags += f" --data {tmp_path}/train.jsonl --val_data {tmp_path}/val.jsonl --out_dir {tmp_path}"
    command = [sys.executable, "-c", RUN, *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.splitlines()[-1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = memory.Config(device=device, dtype="float32", batch_size=16)
    predicted = max(memory.predict(cfg, "gpt", GPTConfig(260, 256, 6, 8, 512))[1].values())
    print(f"predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    assert abs(predicted / measured - 1) < 0.15
