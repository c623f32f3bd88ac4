"""Ours against others' code, on the same work, in turns: how many times faster ours is.

    pip download --no-deps trl==1.10.0 && python -m zipfile -e trl-1.10.0-*.whl trl_1_10
    git clone https://github.com/karpathy/nanoGPT
    python -m experiments.peers --nanogpt nanoGPT --trl trl_1_10

    train  nanoGPT's model and optimizer, under autocast as its train.py; --compile compiles both
    gen    Hugging Face's generate, its weights in the dtype itself, with its dynamic cache; with
           --compile it takes its static cache, for which it compiles on a GPU
    ppo    TRL 1.10's PPOTrainer, the last with PPO, under accelerate's mixed precision; it samples
           and keeps frozen models in float32, and has a value network of its own

All models have random weights, and all responses are of full length. The last line is JSON: ratios
of medians, as speed, and `mfu_512`, our MFU in bfloat16 at width 512. A peer that is not given or
not installed is named, and left out.
"""

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from statistics import median

import torch

from experiments.peer_trl import LM, TRL_FILE, TRL_NEEDS, import_from, trl_trainer
from nanorlhf.config import arg, die, from_cli, note
from nanorlhf.engine import choose_compiled
from nanorlhf.machine.device import pick_device
from nanorlhf.model import RewardModel
from nanorlhf.tools import bench

# packages of each peer; `model` is nanoGPT's file
NEEDS = {"train": ("model",), "gen": ("transformers",), "ppo": (*TRL_NEEDS, "tokenizers")}


@dataclass
class Config(bench.Config):
    """Time our training, generation and PPO in turns with nanoGPT, transformers and TRL."""

    nanogpt: str = arg("", "folder of nanoGPT, with its model.py")
    trl: str = arg("", "folder that holds the unpacked package trl 1.10")


def main(cfg):
    if cfg.init and cfg.nanogpt:
        die("--nanogpt: it has no other architecture than GPT-2's; leave out --init")
    import_from("--nanogpt", cfg.nanogpt, "model.py")
    import_from("--trl", cfg.trl, TRL_FILE)
    device, sizes, figures = pick_device(cfg), bench.sizes_of(cfg), {}
    choose_compiled(cfg)
    precisions = {"float32": "fp32", "bfloat16": "bf16"}
    for what in cfg.what:
        missing = [package for package in NEEDS[what] if find_spec(package) is None]
        if missing:
            note(f"{what} is left out: {', '.join(missing)} is not given, or not installed")
            continue
        for name in precisions if cfg.dtype == "auto" else [cfg.dtype]:
            ratios = RACES[what](cfg, sizes, getattr(torch, name), device)
            figures |= {f"{row}_{precisions[name]}": ratio for row, ratio in ratios.items()}
    if "train" in cfg.what:
        flags = {"d_model": 512, "n_head": 8, "device": cfg.device, "repeats": cfg.repeats}
        ours = bench.main(bench.Config(["train"], dtype="bfloat16", **flags))
        figures["mfu_512"] = round(ours["train_share"], 4)
    print(json.dumps(figures))


def ratio(title, ours, theirs):
    """How many times faster ours is, by the medians of the seconds; prints it."""
    turns, mine, other = sorted(b / a for a, b in zip(ours, theirs)), median(ours), median(theirs)
    spread = f"turn by turn {turns[0]:.2f} to {turns[-1]:.2f}"
    print(f"{title}: {mine:.4f} s against {other:.4f}: {other / mine:.2f} times, {spread}")
    return round(other / mine, 4)


def race(what, peer, works, cfg, device):
    *_, seconds = islice(bench.turns(works, device), cfg.repeats)
    return {what: ratio(f"{what}, {peer}", seconds["ours"], seconds["theirs"])}


# ---- nanoGPT: training -------------------------------------------------------------------------


def train(cfg, sizes, dtype, device):
    """One step as in nanoGPT's train.py."""
    from model import GPT, GPTConfig

    lengths = {"block_size": cfg.seq_len, "vocab_size": sizes.vocab_size, "dropout": 0.0}
    with redirect_stdout(sys.stderr):
        gpt = GPT(GPTConfig(n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.d_model, **lengths))
        optimizer = gpt.to(device).configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    gpt = torch.compile(gpt) if cfg.compile else gpt
    tokens = torch.randint(sizes.vocab_size, (cfg.batch_size, cfg.seq_len + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def theirs():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = gpt(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ours = bench.training(cfg, sizes, dtype, device)["train"]
    return race("train", "nanoGPT", {"ours": ours, "theirs": theirs}, cfg, device)


# ---- transformers: generation ------------------------------------------------------------------


def gen(cfg, sizes, dtype, device):
    gpt, T = hf_model(cfg, LM).to(device, dtype).eval(), cfg.max_new_tokens
    tokens = torch.randint(2, sizes.vocab_size, (cfg.rows, cfg.prompt_tokens), device=device)
    kwargs = {"do_sample": True, "top_k": 0, "max_new_tokens": T, "min_new_tokens": T}
    kwargs |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": 1}
    kwargs |= {"cache_implementation": "static"} if cfg.compile else {}  # a GPU then compiles
    ours = bench.generation(cfg, sizes, dtype, device)["gen"]
    works = {"ours": ours, "theirs": lambda: gpt.generate(tokens, **kwargs)}
    return race("gen", "transformers", works, cfg, device)


def hf_model(cfg, kind):
    """A model with random weights, of the `transformers` class of this name."""
    import transformers

    kwargs = {"eos_token_id": None, "pad_token_id": 1, "num_labels": 1}
    if cfg.init:
        config = transformers.AutoConfig.from_pretrained(cfg.init, **kwargs)
    else:
        kwargs |= {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.d_model}
        kwargs |= {"n_positions": cfg.prompt_tokens + cfg.max_new_tokens + 1, "bos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=cfg.vocab_size, **kwargs)
    return getattr(transformers, kind).from_config(config, dtype=torch.float32)


# ---- TRL: PPO ----------------------------------------------------------------------------------


def ppo(cfg, sizes, dtype, device):
    """TRL's loop cannot be called step by step. Between two of its iterations, with the clock
    stopped, each of ours runs once. Its first one warms up."""
    from transformers import TrainerCallback

    def iteration(critic):
        phases = bench.ppo(cfg, sizes, dtype, device, critic)
        return lambda: [phases[name]() for name in ("rollout", "scoring", "update")]

    works = {"ppo": iteration("shared")}
    if dtype == torch.bfloat16:
        works["ppo_separate"] = iteration(RewardModel(sizes.build()))
    turns, theirs, ours = bench.turns(works, device), [], {}
    wait = torch.get_device_module(device).synchronize

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            wait()
            theirs.append(time.perf_counter() - self.start)
            for work in works.values() if device.type == "cuda" else ():
                work()  # TRL empties the allocator's cache: fill it again
            wait()
            ours.update(next(turns))
            self.start = time.perf_counter()

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        trainer = random_trl(cfg, sizes, dtype, device, folder)
        trainer.add_callback(Clock())
        torch.set_num_threads(threads)
        trainer.train()
    return {row: ratio(f"{row}, TRL", seconds[1:], theirs[1:]) for row, seconds in ours.items()}


def random_trl(cfg, sizes, dtype, device, folder):
    """TRL's trainer of random models, in this precision."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{i}": i for i in range(sizes.vocab_size)}, unk_token="t2")
    ends = {"eos_token": "t0", "pad_token": "t1", "unk_token": "t2", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **ends)
    n, bf16 = cfg.rows * (cfg.repeats + 1), dtype == torch.bfloat16
    prompts = torch.randint(2, sizes.vocab_size, (n, cfg.prompt_tokens)).tolist()
    # PPOTrainer makes an Accelerator without telling it of bf16. That one reads the variable which
    # `accelerate launch --mixed_precision` sets; without it, transformers 5 trains in float32
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    flags = {"per_device_train_batch_size": cfg.rows, "num_ppo_epochs": cfg.ppo_epochs}
    flags |= {"num_mini_batches": cfg.rows // cfg.minibatch_size, "learning_rate": 1e-5}
    flags |= {"local_rollout_forward_batch_size": cfg.rows, "response_length": cfg.max_new_tokens}
    flags |= {"use_cpu": device.type == "cpu", "bf16": bf16}
    trainer = trl_trainer(folder, tokenizer, lambda kind: hf_model(cfg, kind), prompts, **flags)
    del os.environ["ACCELERATE_MIXED_PRECISION"]
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    return trainer


RACES = {"train": train, "gen": gen, "ppo": ppo}


if __name__ == "__main__":
    main(from_cli(Config))
