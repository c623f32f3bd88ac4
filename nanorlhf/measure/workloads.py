"""What `bench` times: this project's own steps at random weights, and the machine's limits. And
what a step costs in FLOP and in bytes.

Letters: P prompt tokens, T new tokens, S positions, D width, L layers, N parameters, the embedding
of positions apart. The functions of the first two parts make a workload: a function of no
arguments that does the work once.
"""

import dataclasses
import itertools
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from nanorlhf import engine, model
from nanorlhf.config import TrainConfig, die
from nanorlhf.hf.folder import model_config_of, read_json
from nanorlhf.llama import make_gpt
from nanorlhf.machine.device import cast
from nanorlhf.measure.stages import load_stage
from nanorlhf.measure.timing import phase_clock
from nanorlhf.model import ActorCritic, GPTConfig, RewardModel, frozen_reference
from nanorlhf.sampling import generate, uniforms
from nanorlhf.scoring import score_responses

COPY_BYTES = 2**28  # read, and as many written


def gpt_config(cfg, block_size):
    """The architecture of --init, or the GPTConfig that train_gpt.py makes of these flags."""
    if cfg.init:
        return dataclasses.replace(config_of(cfg.init), block_size=block_size)
    sizes = (cfg.vocab_size, block_size, cfg.n_layer, cfg.n_head, cfg.d_model)
    return GPTConfig(*sizes, gelu="none")


@cache
def config_of(folder):
    path = Path(folder, "config.json")
    if not path.is_file():
        die(f"--init {folder}: no config.json there; this takes a folder in Hugging Face layout")
    return model_config_of(read_json(path), folder)


# ---- ours --------------------------------------------------------------------------------------


def training(cfg, dtype, device):
    """train_gpt.py's step: loss, gradients, clipping, AdamW, over random tokens."""
    flags = TrainConfig(batch_size=cfg.batch_size)
    gpt = make_gpt(gpt_config(cfg, cfg.seq_len))
    optimizer = engine.Optimizer(gpt, flags, dtype, device)
    batch = {
        "tokens": torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len + 1)),
        "weight": torch.full((cfg.batch_size,), float(cfg.seq_len)),
        "tokens_per_byte": torch.ones(cfg.batch_size),
    }
    loss_fn = load_stage("gpt").text_loss
    return lambda: engine.train_step(gpt, loss_fn, batch, flags, optimizer, 1e-4, device)


def generation(cfg, dtype, device, new_tokens, block_size):
    """Sampling with the cache. The end token has an id that cannot be sampled, so that every
    response reaches `new_tokens`."""
    gpt = cast(make_gpt(gpt_config(cfg, block_size)), dtype, device).eval()
    prompts = torch.randint(cfg.vocab_size, (cfg.rows, cfg.prompt_tokens), device=device)
    mask = torch.ones_like(prompts, dtype=torch.bool)

    def work():
        noise = uniforms(cfg.seed, 0, range(cfg.rows), new_tokens)
        return generate(gpt, prompts, mask, new_tokens, cfg.vocab_size, 0, noise)

    return work


def without_attention(work):
    """The same work, but attention returns its queries and reads no key and no value: what is left
    of a token's cost should not grow with the text. On a GPU every call of `generate` records its
    CUDA graph anew, so that too has no attention in it."""

    def run():
        with patch.object(model, "attention", lambda q, k, v, bias, dropout: q):
            return work()

    return run


def ppo(cfg, dtype, device, critic):
    """One iteration of train_ppo.py: its own functions in the order of its main. The workload
    returns the seconds of each phase."""
    stage = load_stage("ppo")
    flags = stage.Config(
        seed=cfg.seed,
        batch_size=cfg.rows,
        minibatch_size=cfg.rows // cfg.minibatches,
        ppo_epochs=cfg.ppo_epochs,
        max_new_tokens=cfg.max_new_tokens,
        learning_rate=1e-5,
        critic=critic,
        max_steps=10**6,
    )
    config = gpt_config(cfg, cfg.prompt_tokens + cfg.max_new_tokens + 1)
    gpt = make_gpt(config)
    value_net = RewardModel(make_gpt(config)) if critic == "separate" else critic
    policy = ActorCritic(gpt, value_net).eval()
    optimizer = engine.Optimizer(policy, flags, dtype, device, eps=1e-5)
    reference = frozen_reference(gpt)
    # the reward model knows one id more, the end of text, which the policy cannot write: so every
    # response is of full length, and is still scored at its end
    reward_config = gpt_config(cfg, config.block_size)
    reward_config.vocab_size += 1
    reward = cast(RewardModel(make_gpt(reward_config)), dtype, device).eval().requires_grad_(False)
    tokenizer = SimpleNamespace(
        eos_id=cfg.vocab_size, pad_id=0, decode=lambda ids: " ".join(map(str, ids))
    )

    def score(prompts, ids, texts):
        return score_responses(reward, tokenizer, [p.ids for p in prompts], ids)

    prompt_ids = torch.randint(cfg.vocab_size, (cfg.rows, cfg.prompt_tokens)).tolist()
    prompts = [SimpleNamespace(ids=ids, text="", source="random") for ids in prompt_ids]
    seconds, steps = phase_clock(vars(stage), device), itertools.count()

    def work():
        seconds.update(dict.fromkeys(seconds, 0.0))
        iterate(stage, flags, policy, reference, optimizer, prompts, tokenizer, score, next(steps))
        if seconds:  # make_rollout calls measure, which is a phase of its own
            seconds["make_rollout"] -= seconds["measure"]
        return dict(seconds)

    return work


def iterate(stage, cfg, policy, reference, optimizer, prompts, tokenizer, score, step):
    """One iteration of train_ppo.py's main, evaluation and files apart."""
    models = policy, reference
    rollout = stage.make_rollout(cfg, *models, prompts, tokenizer, step, stage.measure)
    scores = stage.score_rollout(cfg, score, prompts, rollout)
    rollout |= stage.ppo_advantages(cfg, rollout, scores, cfg.kl_coef)
    stats = stage.update(cfg, *models, optimizer, rollout, None, step)
    row = stage.rollout_stats(rollout, scores, None, prompts) | stats
    return {name: float(value) for name, value in row.items()}


# ---- limits ------------------------------------------------------------------------------------


def matmul_rows(device):
    return 2**16 if device.type == "cuda" else 4096  # less would not fill a GPU


def matmul_flops(width, device):
    return 2 * matmul_rows(device) * width * 4 * width


def matmul(width, dtype, device):
    """(rows x D) (D x 4 D): the product that a block of GPT is mostly made of."""
    a = torch.randn(matmul_rows(device), width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    out = a @ b
    return lambda: torch.mm(a, b, out=out)


def copy(device):
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def show_limits(cfg, runs):
    """Print and return (FLOP/s, bytes/s); None for a limit that did not run."""
    flop_rate = bandwidth = None
    if "matrix product" in runs:
        run = runs["matrix product"]
        flop_rate = matmul_flops(cfg.d_model, run.device) / run.median
        size = f"({matmul_rows(run.device)} x {cfg.d_model}) ({cfg.d_model} x {4 * cfg.d_model})"
        print(f"  limit: {size}, {flop_rate / 1e12:.3f} TFLOP/s")
    if "copy" in runs:
        bandwidth = 2 * COPY_BYTES / runs["copy"].median
        print(f"  limit: a copy of {COPY_BYTES / 2**20:.0f} MiB, {bandwidth / 1e9:.1f} GB/s")
    return flop_rate, bandwidth


# ---- costs -------------------------------------------------------------------------------------


def parameters(cfg):
    """N: all that a token is multiplied with; a tied embedding counts once, since it is the head,
    and another one not at all, nor do positions."""
    config = gpt_config(cfg, 1)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in make_gpt(config).named_parameters()}
    looked_up = ["wpe.weight", *(["wte.weight"] if "lm_head.weight" in sizes else [])]
    return sum(n for name, n in sizes.items() if name not in looked_up)


def forward_flops(cfg, S):
    """(FLOP of the blocks, of the head) for one token's forward pass: 2 per parameter, and 4 L S
    times the width of all heads for attention to S positions."""
    config, head = gpt_config(cfg, S), 2 * cfg.vocab_size * cfg.d_model
    width = config.n_head * config.cache_heads[1]
    return 2 * parameters(cfg) - head + 4 * config.n_layer * width * S, head


def training_flops(cfg):
    """FLOP of a step: 6 N + 12 L D S per token, as the backward pass costs twice the forward."""
    return 3 * sum(forward_flops(cfg, cfg.seq_len)) * cfg.batch_size * cfg.seq_len


def ppo_flops(cfg, critic):
    """{phase: FLOP} of the phases whose limit is the rate of matrix products."""
    T, S = cfg.max_new_tokens, cfg.prompt_tokens + cfg.max_new_tokens
    blocks_of_token, head_of_token = forward_flops(cfg, S)
    trunk = cfg.rows * S * blocks_of_token  # every token goes through the blocks
    head = cfg.rows * T * head_of_token  # logits are taken of responses alone
    networks = 2 if critic == "separate" else 1
    return {
        "measure": (networks + 1) * trunk + 2 * head,
        "reference_logits": trunk + head,
        "score_rollout": trunk * (S + 1) / S,
        "update": 3 * cfg.ppo_epochs * (networks * trunk + head),
    }


def generation_bytes(cfg, dtype, new_tokens):
    """Bytes that generation has to read: for each new token all weights, and the cached keys and
    values of the positions before it."""
    P, T = cfg.prompt_tokens, new_tokens
    positions = sum(P + t for t in range(1, T))
    heads, width = gpt_config(cfg, P + T).cache_heads
    cached = 2 * cfg.n_layer * heads * width * cfg.rows * positions
    return (T * parameters(cfg) + cached) * dtype.itemsize
