"""Time training, generation and PPO, each beside its limit on this machine.

    python -m nanorlhf bench
    python -m nanorlhf bench --what train gen --n_layer 12 --d_model 768 --n_head 12
    python -m nanorlhf bench --what gen ppo --init FOLDER --dtype bfloat16    # another's sizes

The scripts' own functions run on random weights and tokens. What computes stands beside matrix
products of the same precision: its share of their rate is the MFU. What decodes stands beside the
bandwidth of a large copy. All take turns, so a machine whose speed drifts slows all alike, the
limits too. A PPO iteration is rollout, scoring and update; measuring is the part of the rollout
that reads the responses with both models, run once more by itself. The last line is JSON.

Letters: T new tokens, S positions, D width.
"""

import json
import time
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from types import SimpleNamespace

import torch

from nanorlhf.config import DeviceConfig, TrainConfig, arg, die
from nanorlhf.data.batches import by_length
from nanorlhf.engine import Optimizer, choose_compiled, train_step
from nanorlhf.loading import model_sizes
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.machine.python_file import load_script
from nanorlhf.model import ActorCritic, GPTConfig, RewardModel, frozen_reference
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import score_responses

COPY_BYTES = 2**28  # read, and as many written
PRODUCT_ROWS = 2**16 if torch.cuda.is_available() else 2**14  # less would not fill a GPU
# a tokenizer whose end, -1, nobody samples: all responses are full
ENDLESS = SimpleNamespace(eos_id=0, ends=(-1,), pad_id=0, decode=str)


@dataclass
class Config(DeviceConfig):
    """Time a training step, generation and a PPO iteration beside the limits of this machine."""

    IDLE = "n_layer d_model n_head vocab_size: init"
    what: list[str] = arg(["train", "gen", "ppo"], "what to time", choices=("train", "gen", "ppo"))
    compile: bool = arg(False, "as in the stages")
    repeats: int = arg(7, "repetitions of everything")
    init: str = arg("", "checkpoint or model folder, for its architecture and not its weights")
    n_layer: int = arg(4, "blocks, without --init; so the next three")
    d_model: int = arg(256, "width")
    n_head: int = arg(4, "attention heads")
    vocab_size: int = arg(1024, "entries", low=4)
    batch_size: int = arg(32, "train: sequences per step")
    seq_len: int = arg(128, "train: tokens per sequence", low=2)
    rows: int = arg(64, "gen, ppo: prompts")
    prompt_tokens: int = arg(16, "gen, ppo: of each prompt")
    max_new_tokens: int = arg(48, "gen, ppo: of each response, all of this length", low=2)
    ppo_epochs: int = arg(4, "ppo: passes over a rollout")
    minibatch_size: int = arg(16, "ppo: sequences per optimizer step")


def main(cfg):
    device, sizes = pick_device(cfg), sizes_of(cfg)
    dtype = pick_dtype(cfg, device)
    print(f"{sizes}, {dtype}, {device}, torch {torch.__version__}")
    choose_compiled(cfg)
    works = limits(sizes, dtype, device)
    for what in cfg.what:
        works |= WORKS[what](cfg, sizes, dtype, device)
    *_, rows = islice(turns(works, device), cfg.repeats)
    figures = {}
    for limit, amounts in costs(cfg, sizes, dtype).items():
        for row in filter(rows.get, amounts):
            low, middle, high = min(rows[row]), median(rows[row]), max(rows[row])
            share = amounts[row] / middle * median(rows[limit]) / amounts[limit]
            figures |= {f"{row}_seconds": middle, f"{row}_share": share}
            seconds = f"{middle:9.4f} s [{low:.4f}, {high:.4f}]"
            print(f"{row:10}{seconds}, {share:.3f} of a {limit}'s rate")
    print(json.dumps(figures))
    return figures


def sizes_of(cfg):
    """The GPTConfig to time, with room for everything."""
    if cfg.d_model % cfg.n_head:
        die(f"--d_model {cfg.d_model} must be a multiple of --n_head {cfg.n_head}")
    block_size = max(cfg.seq_len, cfg.prompt_tokens + cfg.max_new_tokens + 1)
    sizes = GPTConfig(cfg.vocab_size, block_size, cfg.n_layer, cfg.n_head, cfg.d_model, gelu="none")
    return replace(model_sizes(cfg.init), block_size=block_size) if cfg.init else sizes


def turns(works, device):
    """Warm up, then yield after each turn {row: its seconds in all turns so far}. In a turn each of
    {row: function} runs once."""
    rows, wait = {row: [] for row in works}, torch.get_device_module(device).synchronize
    for work in works.values():
        work()  # may compile, and fills caches
    while True:
        for row, work in works.items():
            start = time.perf_counter()
            work()
            wait()
            rows[row].append(time.perf_counter() - start)
        yield rows


# ---- what is timed: {row: function} -------------------------------------------------------------


def training(cfg, sizes, dtype, device):
    """A step of train_gpt.py: loss, gradients, clipping, AdamW."""
    script, flags, gpt = load_script("train_gpt"), TrainConfig(), sizes.build()
    adamw = Optimizer(gpt, flags, dtype, device)
    ids = torch.randint(sizes.vocab_size, (cfg.batch_size * cfg.seq_len + 1,)).numpy()
    batch = script.text_batch(ids, range(0, len(ids) - 1, cfg.seq_len), cfg.seq_len, "random")
    return {"train": lambda: train_step(gpt, script.text_loss, batch, flags, adamw, 1e-4, device)}


def generation(cfg, sizes, dtype, device):
    """Sampling with the cache."""
    gpt = cast(sizes.build(), dtype, device).eval()
    ids = torch.randint(sizes.vocab_size, (cfg.rows, cfg.prompt_tokens)).tolist()
    return {"gen": lambda: sample_responses(gpt, ENDLESS, ids, cfg.max_new_tokens, seed=1)}


def ppo(cfg, sizes, dtype, device, critic="shared"):
    """The phases of train_ppo.py: its functions in the order of its main."""
    script, gpt, rollout = load_script("train_ppo"), sizes.build(), {}
    flags = script.Config(minibatch_size=cfg.minibatch_size, ppo_epochs=cfg.ppo_epochs)
    flags.max_new_tokens = cfg.max_new_tokens
    policy = ActorCritic(gpt, critic).eval()
    optimizer = Optimizer(policy, flags, dtype, device, eps=1e-5)
    args = flags, policy, frozen_reference(gpt)
    judge = cast(RewardModel(sizes.build()), dtype, device)
    ids = torch.randint(sizes.vocab_size, (cfg.rows, cfg.prompt_tokens)).tolist()
    prompts = [SimpleNamespace(ids=prompt, text="", source="random") for prompt in ids]

    sample = lambda: rollout.update(script.make_rollout(*args, prompts, ENDLESS, 0, script.measure))
    update = lambda: script.update(*args, optimizer, rollout, None, 0)

    @torch.no_grad()
    def measure():
        for _, rows in by_length(rollout, -(-cfg.rows // cfg.minibatch_size), always=True):
            script.measure(*args, rows)

    def judged(prompts, responses, texts):
        return score_responses(judge, ENDLESS, ids, responses)

    def score():
        scores = script.score_rollout(flags, judged, prompts, rollout)
        rollout.update(script.ppo_advantages(flags, rollout, scores, flags.kl_coef))

    return {"rollout": sample, "measuring": measure, "scoring": score, "update": update}


WORKS = {"train": training, "gen": generation, "ppo": ppo}


def limits(sizes, dtype, device):
    """A product (n x D) (D x 4 D), of which a block is mostly made, and a copy."""
    a = torch.randn(PRODUCT_ROWS, sizes.d_model, device=device, dtype=dtype)
    b = torch.randn(sizes.d_model, 4 * sizes.d_model, device=device, dtype=dtype)
    out, source = a @ b, torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}


def costs(cfg, sizes, dtype):
    """{limit: {row: FLOP, as those of a product, or bytes, as those of a copy}}."""
    with torch.device("meta"):
        blocks = sum(p.numel() for p in sizes.build().h.parameters())
    (heads, width), head = sizes.cache_heads, sizes.vocab_size * sizes.d_model
    T, S = cfg.max_new_tokens, cfg.prompt_tokens + cfg.max_new_tokens

    def forward(S, T):
        """FLOP of a sequence of S tokens, T of which get logits. Backward costs twice that."""
        return 2 * (S * (blocks + 2 * sizes.n_layer * sizes.n_head * width * S) + T * head)

    flops = {
        "product": 8 * PRODUCT_ROWS * sizes.d_model**2,
        "train": 3 * cfg.batch_size * forward(cfg.seq_len, cfg.seq_len),
        "measuring": cfg.rows * 2 * forward(S, T),
        "scoring": cfg.rows * forward(S, 0),
        "update": 3 * cfg.ppo_epochs * cfg.rows * forward(S, T),
    }
    cached = 2 * sizes.n_layer * heads * width * cfg.rows * sum(range(S - T + 1, S))
    read = (T * (blocks + head) + cached) * dtype.itemsize  # all weights, for each token
    return {"product": flops, "copy": {"copy": 2 * COPY_BYTES, "gen": read, "rollout": read}}
