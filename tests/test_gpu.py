"""On a CUDA GPU: what the CPU says, and the four stages through. Skips where there is none."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf.batches import pad
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.sampling import generate, uniforms

ROOT, GPU = Path(__file__).parents[1], "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FLAGS = {
    "gpt": "--max_steps 20 --documents 300 --d_model 64 --n_head 2 --sample_tokens 8",
    "sft": "--max_steps 10 --demonstrations 300 --max_new_tokens 16",
    "rm": "--max_steps 4 --prompts 20 --heldout_prompts 20 --max_new_tokens 16",
    "ppo": "--max_steps 2 --batch_size 8 --minibatch_size 4 --eval_prompts 4 --max_new_tokens 16",
}


def setting(dtype):
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(50, block_size=64, n_layer=2, n_head=2, d_model=32)).eval()
    rows = [torch.randint(0, 48, (n,)).tolist() for n in (1, 7, 20, 12)]
    return gpt.to(dtype), *pad(rows, 49, left=True)


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_logits_on_the_gpu_are_the_cpus(dtype, near):
    gpt, tokens, mask = setting(dtype)
    wanted = gpt(tokens, mask).float()
    found = gpt.to(GPU)(tokens.to(GPU), mask.to(GPU)).float().cpu()
    assert (found - wanted)[mask].abs().max() < near


def test_greedy_cached_generation_on_the_gpu_is_the_cpus():
    gpt, tokens, mask = setting(torch.float32)
    noise = uniforms(1, 0, range(4), 40)
    run = lambda where: generate(
        gpt.to(where), tokens.to(where), mask.to(where), 40, 48, 49, noise, temperature=0
    )
    assert torch.equal(run("cpu"), run(GPU).cpu())


@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_four_stages_run_on_the_gpu_and_ppo_starts_at_its_reference(dtype, near, tmp_path):
    for stage, flags in FLAGS.items():
        variants = ["", "--grad_checkpointing"]
        variants += ["--critic separate", "--freeze_layers 1"] if stage == "ppo" else []
        for more in variants:
            command = [sys.executable, ROOT / f"train_{stage}.py", *flags.split(), *more.split()]
            command += ["--device", GPU, "--dtype", dtype, "--eval_every", "10"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            if stage == "ppo":
                first = next(csv.DictReader((tmp_path / "out/ppo/metrics.csv").open()))
                assert abs(float(first["kl"])) < near
