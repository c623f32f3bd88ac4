"""Time training, generation and PPO, every figure beside its limit on this machine.

    python -m nanorlhf bench
    python -m nanorlhf bench --what train gen --n_layer 12 --d_model 768 --n_head 12
    python -m nanorlhf bench --vs hf,trl=DIR,nanogpt=DIR --require
    python -m nanorlhf bench --what gen ppo --init FOLDER --dtype bfloat16    # a Llama's sizes

Whatever is compared runs in turns, one repetition of each after the other, so that a machine whose
speed drifts slows all alike: the limits too. Compute is held against matrix products of the same
precision, decoding against the bandwidth of a large copy.

The last line is JSON. `train_`, `gen_` and `ppo_` figures are ours over a peer's, as speed: above
1 ours is faster. `mfu` and `decode_bandwidth` are shares of a limit. `flat_` is the cost of a
generated token without attention, at the shortest length over that at the longest: 1 if the cost
does not grow with the text.
"""

import dataclasses
import json
from dataclasses import dataclass
from statistics import median

import torch

from nanorlhf.config import arg, die, warn
from nanorlhf.machine.device import pick_device
from nanorlhf.measure import workloads as w
from nanorlhf.measure.stages import load_stage
from nanorlhf.measure.timing import PHASES, compare, machine, memory, race, show

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MFU_SIZES = {
    "init": "",
    "n_layer": 4,
    "d_model": 512,
    "n_head": 8,
    "vocab_size": 1024,
    "batch_size": 32,
    "seq_len": 128,
}
LENGTHS = (64, 128, 256, 448)  # new tokens, for `long`
REQUIRED = {  # the least of each figure, for --require
    "cpu": {
        "train_bf16": 2.0,
        "train_fp32": 1.0,
        "gen_bf16": 4.0,
        "gen_fp32": 4.0,
        "ppo_bf16": 4.0,
        "ppo_fp32": 2.5,
        "ppo_separate_bf16": 2.0,
        "mfu_512": 0.5,
        "flat_bf16": 1 / 1.2,
        "flat_fp32": 1 / 1.2,
    },
    "cuda": {
        "gen_bf16": 10.0,
        "ppo_bf16": 5.0,
        "mfu": 0.45,
        "decode_bandwidth": 0.5,
        "flat_bf16": 1 / 1.2,
        "flat_fp32": 1 / 1.2,
    },
}
FIGURES = (
    "train_bf16",
    "train_fp32",
    "gen_bf16",
    "gen_fp32",
    "ppo_bf16",
    "ppo_fp32",
    "ppo_separate_bf16",
    "mfu_512",
    "decode_bandwidth",
    "mfu",
    "flat_bf16",
    "flat_fp32",
)
WHAT = ("limits", "train", "mfu_512", "gen", "long", "ppo")


@dataclass
class Config:
    """Time training, generation and PPO beside the limits of this machine, and beside others."""

    what: list[str] = arg(list(WHAT), "what to time", choices=WHAT)
    dtype: list[str] = arg(
        ["float32", "bfloat16"], "compute precisions", choices=("float32", "bfloat16")
    )
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, ...")
    threads: int = arg(0, "of a CPU; 0: as PyTorch chooses")
    seed: int = arg(1, "of weights, tokens and sampling", low=0)
    repeats: int = arg(7, "repetitions of everything")
    vs: str = arg("", "who runs beside it, with commas between: hf, trl=DIR, nanogpt=DIR")
    require: bool = arg(False, "exit 1 where a figure is below what this project asks of itself")
    init: str = arg("", "a folder in Hugging Face layout, for its architecture and not its weights")
    n_layer: int = arg(4, "blocks, without --init; so the next three")
    d_model: int = arg(256, "width")
    n_head: int = arg(4, "attention heads")
    vocab_size: int = arg(1024, "entries")
    batch_size: int = arg(32, "train: sequences per step")
    seq_len: int = arg(128, "train: tokens per sequence", low=2)
    rows: int = arg(64, "gen, long, ppo: prompts")
    prompt_tokens: int = arg(16, "gen, long, ppo: of each prompt")
    max_new_tokens: int = arg(48, "gen, ppo: of each response, all of this length", low=2)
    ppo_epochs: int = arg(4, "ppo: passes over a rollout")
    minibatches: int = arg(4, "ppo: optimizer steps per pass")
    critic: str = arg("both", "ppo: the value function", choices=("shared", "separate", "both"))


def main(cfg):
    if cfg.init:
        sizes = w.config_of(cfg.init)
        names = ("n_layer", "d_model", "n_head", "vocab_size")
        cfg = dataclasses.replace(cfg, **{name: getattr(sizes, name) for name in names})
    device, peers = checked(cfg)
    torch.set_float32_matmul_precision("highest")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    print(
        f"{machine(device)}; torch {torch.__version__}, seed {cfg.seed}, medians of "
        f"{cfg.repeats} repetitions [least, most]"
    )
    size = f"{w.parameters(cfg) / 1e6:.3f} M parameters, positions apart"
    print(
        f"{cfg.init or 'GPT-2'}, {cfg.n_layer} layers x {cfg.d_model}, {cfg.n_head} heads, "
        f"vocabulary {cfg.vocab_size}: {size}"
    )
    figures = dict.fromkeys(FIGURES)
    sections = {
        "limits": limits,
        "train": train,
        "mfu_512": mfu_512,
        "gen": generate,
        "long": lengths,
        "ppo": ppo,
    }
    for what in (name for name in WHAT if name in cfg.what):
        for name in sorted(cfg.dtype, reverse=True):  # bfloat16 last: its mfu is the one to keep
            figures |= sections[what](cfg, getattr(torch, name), device, peers)
    print(f"\npeak memory of the whole process, peers included: {memory():.2f} GiB")
    failed = below(figures, REQUIRED[device.type]) if cfg.require else []
    print(json.dumps({k: v and round(v, 4) for k, v in figures.items()}), flush=True)
    if failed:
        raise SystemExit(1)
    return figures


def checked(cfg):
    """(device, {peer: folder}). Flags that make no sense exit 2 before anything is timed."""
    numbers = (field.name for field in dataclasses.fields(cfg) if field.type in (int, "int"))
    for name in numbers:
        if getattr(cfg, name) < (0 if name in ("threads", "seed") else 1):
            die(f"--{name} {getattr(cfg, name)}: must be at least 1")
    if cfg.d_model % cfg.n_head:
        die(f"--d_model {cfg.d_model} must be a multiple of --n_head {cfg.n_head}")
    if cfg.vocab_size < 4:
        die(f"--vocab_size {cfg.vocab_size}: must be at least 4")
    if cfg.rows % cfg.minibatches:
        die(f"--rows {cfg.rows} must be a multiple of --minibatches {cfg.minibatches}")
    if not cfg.what or not cfg.dtype:
        die("--what and --dtype must not be empty")
    device = pick_device(cfg)
    if device.type not in REQUIRED:
        die(f"--device {cfg.device}: bench knows {' and '.join(REQUIRED)}")
    if cfg.init and "nanogpt" in cfg.vs:
        die("--vs nanogpt: nanoGPT has no other architecture than GPT-2's; leave out --init")
    load_stage("ppo")  # exits 2 here, and not after minutes, where the script is missing
    if cfg.vs and cfg.repeats < 7:
        warn(f"--repeats {cfg.repeats}: ratios of so few are for a look, not to be quoted")
    return device, others().parse(cfg.vs) if cfg.vs else {}


# ---- sections: each prints a table and returns {figure: number} ---------------------------------


def limits(cfg, dtype, device, peers):
    works = {"matrix product": w.matmul(cfg.d_model, dtype, device), "copy": w.copy(device)}
    w.show_limits(cfg, race(f"limits, {SHORT[dtype]}", works, cfg.repeats, device))
    return {}


def train(cfg, dtype, device, peers):
    works = {"ours": w.training(cfg, dtype, device)}
    works["matrix product"] = w.matmul(cfg.d_model, dtype, device)
    if "nanogpt" in peers:
        works["nanogpt"] = others().nanogpt_training(peers["nanogpt"], cfg, dtype, device)
    size = f"{cfg.n_layer} layers x {cfg.d_model}, {cfg.batch_size} x {cfg.seq_len} tokens"
    runs = race(f"training, {SHORT[dtype]}: {size} a step", works, cfg.repeats, device)
    flop_rate, _ = w.show_limits(cfg, runs)
    mfu = lambda run: w.training_flops(cfg) / run.median / flop_rate
    for name in ("ours", *peers.keys() & {"nanogpt"}):
        show(name, runs[name], cfg.batch_size * cfg.seq_len, f"MFU {mfu(runs[name]):.3f}")
    ratio = compare(runs, "ours", "nanogpt", f"train_{SHORT[dtype]}")
    return {"mfu": mfu(runs["ours"])} | ratio


def mfu_512(cfg, dtype, device, peers):
    """Training at one size for all machines, in bfloat16 alone."""
    if dtype != torch.bfloat16:
        return {}
    return {"mfu_512": train(dataclasses.replace(cfg, **MFU_SIZES), dtype, device, {})["mfu"]}


def generate(cfg, dtype, device, peers):
    T, block_size = cfg.max_new_tokens, cfg.prompt_tokens + cfg.max_new_tokens + 1
    works = {"ours": w.generation(cfg, dtype, device, T, block_size), "copy": w.copy(device)}
    if "hf" in peers:
        works["hf"] = others().hf_generation(cfg, dtype, device)
    size = f"{cfg.rows} prompts of {cfg.prompt_tokens}, {T} new tokens each"
    runs = race(f"generation, {SHORT[dtype]}: {size}", works, cfg.repeats, device)
    _, bandwidth = w.show_limits(cfg, runs)
    read = w.generation_bytes(cfg, dtype, T)
    share = lambda run: read / run.median / bandwidth
    for name in ("ours", *peers.keys() & {"hf"}):
        show(name, runs[name], cfg.rows * T, f"{share(runs[name]):.3f} of the bandwidth")
    ratio = compare(runs, "ours", "hf", f"gen_{SHORT[dtype]}")
    return {"decode_bandwidth": share(runs["ours"])} | ratio


def lengths(cfg, dtype, device, peers):
    """Attention apart, a token's cost should not grow with the text."""
    block_size, works = max(512, cfg.prompt_tokens + max(LENGTHS)), {}
    for length in LENGTHS:
        works[length] = w.generation(cfg, dtype, device, length, block_size)
        works[f"{length} without attention"] = w.without_attention(works[length])
    title = f"longer texts, {SHORT[dtype]}: microseconds per new token of all {cfg.rows} rows"
    runs = race(title, works, cfg.repeats, device)
    print("  new tokens      all  attention  the rest")
    rest = {}  # length -> seconds per new token without attention
    for length in LENGTHS:
        whole, part = runs[length], runs[f"{length} without attention"]
        attention = median(a - b for a, b in zip(whole.seconds, part.seconds)) / length
        rest[length] = part.median / length
        print(
            f"  {length:10}{1e6 * whole.median / length:9.0f}{1e6 * attention:11.0f}"
            f"{1e6 * rest[length]:10.0f}"
        )
    first, last = LENGTHS[0], LENGTHS[-1]
    print(f"  the rest at {last} over that at {first}: {rest[last] / rest[first]:.3f}")
    return {f"flat_{SHORT[dtype]}": rest[first] / rest[last]}


def ppo(cfg, dtype, device, peers):
    critics = ("shared", "separate") if cfg.critic == "both" else (cfg.critic,)
    works = {critic: w.ppo(cfg, dtype, device, critic) for critic in critics}
    works |= {"matrix product": w.matmul(cfg.d_model, dtype, device), "copy": w.copy(device)}
    host = None
    if "trl" in peers:
        host = lambda turn: others().trl_race(cfg, dtype, device, turn)
    runs = race(
        f"a PPO iteration, {SHORT[dtype]}: {cfg.rows} prompts of {cfg.prompt_tokens}, "
        f"{cfg.max_new_tokens} new tokens each, {cfg.ppo_epochs} epochs x {cfg.minibatches} steps",
        works,
        cfg.repeats,
        device,
        host,
    )
    flop_rate, bandwidth = w.show_limits(cfg, runs)
    for name in (*critics, *(["trl"] if host else [])):
        show(name, runs[name], cfg.rows * cfg.max_new_tokens)
    figures = {}
    for critic in critics:
        middle = "" if critic == "shared" else "separate_"
        figures |= compare(runs, critic, "trl", f"ppo_{middle}{SHORT[dtype]}")
    for critic in critics:
        show_phases(cfg, dtype, critic, runs[critic], flop_rate, bandwidth)
    return figures


def show_phases(cfg, dtype, critic, run, flop_rate, bandwidth):
    print(f"  where the time goes, {critic} critic")
    phases = {name: median(seconds[name] for seconds in run.results) for name in run.results[0]}
    flops = w.ppo_flops(cfg, critic)
    read = w.generation_bytes(cfg, dtype, cfg.max_new_tokens)
    for name, seconds in phases.items():
        limit = f"{read / seconds / bandwidth:.3f} of the bandwidth"
        if name in flops:
            limit = f"MFU {flops[name] / seconds / flop_rate:.3f}"
        print(f"    {PHASES[name]:22}{seconds:9.4f} s {seconds / run.median:6.1%}  {limit}")
    # a phase whose title is indented is a part of the one above it
    rest = run.median - sum(s for name, s in phases.items() if not PHASES[name].startswith(" "))
    print(f"    {'the rest':22}{rest:9.4f} s {rest / run.median:6.1%}")


# ---- output ------------------------------------------------------------------------------------


def below(figures, required):
    """Print each figure beside what is required. Returns the names of those below it, or of all if
    none was measured."""
    measured = {name: figures[name] for name in required if figures[name] is not None}
    failed = [name for name, value in measured.items() if not value >= required[name]]
    for name, least in required.items():
        shown = f"{measured[name]:.3f}" if name in measured else "not measured"
        print(f"  {name:18}{shown:>12}, required {least:.3f}{'  BELOW' * (name in failed)}")
    return failed if measured else list(required)


def others():
    """peers.py, imported only where --vs asks for it."""
    from nanorlhf.measure import peers

    return peers
