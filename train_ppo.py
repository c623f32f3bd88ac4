"""Stage 4: PPO. The policy maximises the reward model's score minus a KL penalty to the SFT model.

    python train_ppo.py                                  # prompts of the embedded world
    python train_ppo.py --kl_coef 0 --out_dir out/ppo_kl0    # no penalty: watch it fool the judge
    python train_ppo.py --reward my.py:function --data prompts.jsonl

One iteration: rollout -> score -> KL-shaped rewards -> GAE -> clipped epochs. The semantics are
those of openai/lm-human-preferences (arXiv:1909.08593) and the TL;DR reproduction
(arXiv:2403.17031). Departures from InstructGPT (arXiv:2203.02155, section 3.5): the value
function reads the policy's trunk by default (--critic separate is theirs), PPO-ptx is off by
default, and a response that does not end by itself gets a fixed score.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch

from nanorlhf import engine
from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, arg, die, from_cli
from nanorlhf.data import batches, world
from nanorlhf.fused import head_loss
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine import ranks
from nanorlhf.machine.device import cast, pick_dtype
from nanorlhf.model import ActorCritic, RewardModel, at, freeze_layers, frozen_reference
from nanorlhf.run import checkpoint, selfcheck, session
from nanorlhf.run.log import Log
from nanorlhf.sampling import generate, response_mask, uniforms
from nanorlhf.scoring import call_function, load_function, make_scorer
from nanorlhf.sources import ppo_prompts, ptx_batches

EVAL_NOISE = 2**32 - 1  # the step that keys the noise of evaluation samples: no training step


@dataclass
class Config(TrainConfig):
    """Stage 4: PPO against a reward model, with a KL penalty to the SFT policy."""

    out_dir: str = arg("out/ppo", "folder for this stage's checkpoints, metrics and samples")
    init: str = arg("out/sft", "checkpoint of the policy and of its frozen reference")
    reward: str = arg("out/rm", "reward-model folder, or path.py:function(prompts, responses)")
    data: list[str] = arg([], "prompts: files or hf:owner/name; default: the embedded world's")
    val_data: list[str] = arg([], "held-out prompts; default: a tenth of the prompts")
    gold: str = arg("", "path.py:function to watch and never to learn from; default: the world's")
    max_steps: int = arg(24, "PPO iterations")
    batch_size: int = arg(128, "prompts per rollout")
    rollouts_per_prompt: int = arg(1, "responses sampled to each prompt of a rollout")
    minibatch_size: int = arg(64, "sequences per optimizer step; --grad_accum divides it")
    ppo_epochs: int = arg(2, "passes over each rollout")
    learning_rate: float = arg(3e-4, "at the start; falls linearly to 0 over the iterations")
    warmup_steps: int = arg(0, "iterations of linear warm-up")
    weight_decay: float = arg(0.0, "AdamW decay, on matrices only")
    kl_coef: float = arg(0.05, "weight of the per-token KL penalty, in reward units per nat")
    adaptive_kl: bool = arg(False, "steer kl_coef towards --kl_target")
    kl_target: float = arg(6.0, "with --adaptive_kl: nats per response", low=1e-6)
    kl_horizon: int = arg(0, "with --adaptive_kl: episodes; 0 is a third of the run")
    kl_loss_coef: float = arg(0.0, "weight of the differentiable exact KL in the loss")
    gamma: float = arg(1.0, "discount per token", high=1)
    lam: float = arg(0.95, "lambda of generalized advantage estimation", high=1)
    cliprange: float = arg(0.2, "the policy ratio is clipped to 1 +- this")
    cliprange_value: float = arg(0.2, "new values are clipped to the old +- this")
    vf_coef: float = arg(0.1, "weight of the value loss")
    critic: str = arg(
        "shared",
        "value head on the policy's trunk, or a copy of the reward model",
        choices=("shared", "separate"),
    )
    freeze_layers: int = arg(0, "freeze embeddings and this many blocks, shared with the reference")
    entropy_coef: float = arg(0.0, "weight of the entropy bonus")
    whiten_rewards: bool = arg(False, "divide the shaped rewards by their sd over the rollout")
    missing_eos_score: float = arg(-3.0, "score of a response that did not end by itself", low=-1e6)
    max_approx_kl: float = arg(0.0, "stop an iteration's update beyond this approx_kl; 0: never")
    ptx_coef: float = arg(0.0, "weight of the pretraining loss (PPO-ptx)")
    ptx_data: list[str] = arg([], "its text; default: the embedded world's")
    ptx_batch_size: int = arg(8, "text windows per micro-batch with --ptx_coef")
    temperature: float = arg(1.0, "of sampling and of every log-probability", low=0.01)
    max_new_tokens: int = arg(128, "length limit of a response")
    eval_prompts: int = arg(128, "fixed held-out prompts to evaluate on")
    eval_every: int = arg(8, "iterations between evaluations")
    save_every: int = arg(10, "iterations between checkpoints")


def main(cfg):
    device = engine.claim(cfg)
    dtype = pick_dtype(cfg, device)
    ready = lambda model: cast(model, dtype, device)
    gpt, init = load_gpt(cfg.init)
    tokenizer = init.tokenizer
    score = make_scorer(cfg.reward, init, ready)
    gold = make_gold(cfg)
    train_prompts, val_prompts = ppo_prompts(cfg, tokenizer, gpt.config.block_size)
    ptx_batch = ptx_batches(cfg, tokenizer, gpt.config.block_size)
    torch.manual_seed(cfg.seed)
    if not 0 <= cfg.freeze_layers <= gpt.config.n_layer:
        die(f"--freeze_layers {cfg.freeze_layers}: the model has {gpt.config.n_layer} blocks")
    freeze_layers(gpt, cfg.freeze_layers)
    critic = make_critic(cfg.reward, gpt) if cfg.critic == "separate" else None
    policy = ActorCritic(gpt, critic).eval()  # eval: no dropout in PPO, in the update neither
    optimizer = engine.Optimizer(policy, cfg, dtype, device, eps=1e-5)
    # of what --init holds, so before any --resume
    reference = frozen_reference(engine.sampler(gpt, cfg))
    session.announce("ppo", cfg, policy, device, dtype)
    prints = session.fingerprints(cfg, models=[("--init", cfg.init), ("--reward", cfg.reward)])
    run = session.Run("ppo", cfg, optimizer, tokenizer, gpt.config, cfg.max_steps, prints)
    start, state = run.resume()
    if cfg.check and start == 0:
        ours = score, train_prompts, tokenizer, make_rollout, ppo_loss
        selfcheck.check("ppo", selfcheck.ppo(cfg, optimizer, reference, *ours))
    kl_coef = state.get("kl_coef", cfg.kl_coef)
    episodes = cfg.batch_size * cfg.rollouts_per_prompt
    log = Log(cfg, start, cfg.max_steps, SHOWN)

    for step in range(start, cfg.max_steps + 1):
        row, last = {}, step == cfg.max_steps
        if run.is_due(step):
            run.save(step, {"kl_coef": kl_coef})
        if step % cfg.eval_every == 0 or last:
            row = evaluate(cfg, policy, reference, score, gold, val_prompts, tokenizer)
        if last:
            log.row(step, row)
            break

        # 1. rollout: the policy answers a batch of prompts
        indices = batches.epoch_batch(len(train_prompts), cfg.batch_size, cfg.seed, step)
        prompts = [train_prompts[i] for i in indices for _ in range(cfg.rollouts_per_prompt)]
        rollout = make_rollout(cfg, policy, reference, prompts, tokenizer, step)
        mask = rollout["response_mask"]  # (B, T)

        # 2. score the responses; one that did not end by itself gets a fixed score
        scores = score_rollout(cfg, score, prompts, rollout)  # (B,)

        # 3. rewards: the score at the last token, a KL penalty at every token
        kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")  # (B, T)
        rewards = f.shaped_rewards(scores, kl, mask, kl_coef)  # (B, T)
        if cfg.whiten_rewards:
            rewards = f.masked_whiten(rewards, mask, shift_mean=False)

        # 4. advantages, whitened over the whole rollout
        advantages, returns = f.gae(rewards, rollout["values"], mask, cfg.gamma, cfg.lam)
        rollout |= {"advantages": f.masked_whiten(advantages, mask), "returns": returns}

        # 5. several epochs of clipped minibatch steps
        learning_rate = schedule(step, cfg)
        stats = update(cfg, policy, reference, optimizer, rollout, learning_rate, ptx_batch, step)
        if not math.isfinite(stats["grad_norm"]):
            session.stop_nonfinite(step, [p.source for p in prompts])

        row = describe(gold, prompts, rollout, scores, rewards) | stats | row
        row |= {"kl_coef": kl_coef, "learning_rate": learning_rate}
        log.row(step, row)
        if cfg.adaptive_kl:
            horizon = cfg.kl_horizon or max(episodes * cfg.max_steps // 3, 1)
            kl_coef = f.adapt_kl_coef(kl_coef, row["kl"], cfg.kl_target, episodes, horizon)
        log.bar.update()
    ranks.on_main(log.close)
    ranks.leave()
    return row


SHOWN = (
    "scores",
    "kl",
    "gold",
    "entropy",
    "eos_rate",
    "length",
    "approx_kl",
    "explained_variance",
    "eval_scores",
    "eval_kl_exact",
    "eval_gold",
)


def schedule(step, cfg):
    """Linear warm-up, then linearly to 0 over the iterations."""
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    return cfg.learning_rate * warm * (1 - step / cfg.max_steps)


def make_critic(reward, gpt):
    """InstructGPT: the value function starts as a copy of the reward model, constants included;
    under --reward path.py:function there is none, and it starts from the policy's trunk."""
    if ".py:" in reward:
        return RewardModel(copy.deepcopy(gpt).requires_grad_(True))
    return checkpoint.load_reward_model(reward)[0]


@torch.no_grad()
def make_rollout(cfg, policy, reference, prompts, tokenizer, step):
    """Sample a response to each prompt and measure it: (B, ...) tensors; ids, texts as lists.
    Each rank takes its share of the rows, and then all hold the whole rollout."""
    device = policy.gpt.wte.weight.device
    tokens, prompt_mask = batches.pad([p.ids for p in prompts], tokenizer.pad_id, left=True)
    own = ranks.rows(len(prompts))
    tokens, prompt_mask = tokens[own], prompt_mask[own]  # as wide as the longest prompt of all
    noise = uniforms(cfg.seed, step, own, cfg.max_new_tokens)
    responses = generate(
        engine.sampler(policy.gpt, cfg),
        tokens.to(device),
        prompt_mask.to(device),
        cfg.max_new_tokens,
        tokenizer.eos_id,
        tokenizer.pad_id,
        noise,
        cfg.temperature,
    )
    responses = ranks.pad_alike(responses, tokenizer.pad_id)
    mask = response_mask(responses, tokenizer.eos_id)  # (B, T)
    real = torch.cat([prompt_mask.to(device), mask], 1)  # (B, P + T)
    first = prompt_mask.sum(1, keepdim=True).to(device) - 1  # (B, 1): where the first is chosen
    rollout = {
        # prompt and response side by side, pads behind them: (B, S)
        "tokens": batches.pads_last(torch.cat([tokens.to(device), responses], 1), real),
        "n_tokens": real.sum(1).cpu(),
        "n_response": mask.sum(1).cpu(),
        "states": first + torch.arange(mask.shape[1], device=device),  # (B, T)
        "responses": responses,
        "response_mask": mask,
        "ended": (responses == tokenizer.eos_id).any(1),
    }
    rollout["tokens"] = ranks.pad_alike(rollout["tokens"], tokenizer.pad_id)
    # log-probs and values come from the same forward as in the update, so ratio = 1 at first
    n_groups = -(-len(own) * cfg.grad_accum // cfg.minibatch_size)
    for index, rows in batches.by_length(rollout, n_groups, always=True):
        for name, x in measure(cfg, policy, reference, rows).items():
            shape = (len(own), *(rollout["tokens"] if name == "trunk" else mask).shape[1:])
            full = rollout.setdefault(name, x.new_zeros(*shape, *x.shape[2:]))
            full[index, : x.shape[1]] = x
    rollout = {name: ranks.gather(x, len(prompts)) for name, x in rollout.items()}
    responses, mask = rollout["responses"].cpu(), rollout["response_mask"].cpu()
    rollout["ids"] = [row[m].tolist() for row, m in zip(responses, mask)]
    rollout["texts"] = [tokenizer.decode(ids) for ids in rollout["ids"]]
    return rollout


def groups(cfg):
    """Groups of about one length in a micro-batch, at most. One, where all ranks of a sharded
    model must do as many forward passes, and where each would need the pretraining loss."""
    return 1 if cfg.shard or cfg.ptx_coef else 2


def measure(cfg, policy, reference, rows):
    """Log-probs, values, entropy and exact KL of some rows, each (b, T). The layers that are
    frozen run once: for policy and reference, and for all epochs of the update."""
    if cfg.freeze_layers:
        rows["trunk"] = reference.trunk(rows["tokens"], cfg.freeze_layers)  # (b, S, D)
    logits, values = policy(rows["tokens"], rows["states"], rows.get("trunk"), cfg.freeze_layers)
    ref_logits, T = reference_logits(cfg, reference, rows), cfg.temperature
    shared = {"trunk": rows["trunk"]} if cfg.freeze_layers else {}
    return shared | {
        "logprobs": f.logprobs_from_logits(logits, rows["responses"], T),
        "ref_logprobs": f.logprobs_from_logits(ref_logits, rows["responses"], T),
        "values": values,
        "entropy": f.entropy_from_logits(logits, T),
        "kl_exact": f.kl_exact(logits, ref_logits, T),
    }


@torch.no_grad()
def reference_logits(cfg, reference, rows):
    n, frozen = cfg.freeze_layers, rows.get("trunk")
    hidden = reference.hidden(rows["tokens"]) if frozen is None else reference.above(frozen, n)
    return reference.head(at(hidden, rows["states"]))  # (b, T, V)


def score_rollout(cfg, score, prompts, rollout):
    """(B,): the reward, or missing_eos_score where a response did not end by itself."""
    scores = score(prompts, rollout["ids"], rollout["texts"]).to(rollout["ended"].device)
    return scores.masked_fill(~rollout["ended"], cfg.missing_eos_score)


def update(cfg, policy, reference, optimizer, rollout, learning_rate, ptx_batch, step):
    """ppo_epochs passes of minibatch steps over a rollout; returns the mean of their stats."""
    tensors = {k: v for k, v in rollout.items() if torch.is_tensor(v)}
    tensors["weight"] = tensors["n_response"]
    B, history = len(tensors["tokens"]), []
    for epoch in range(cfg.ppo_epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(B)
        for i in range(0, B, cfg.minibatch_size):
            minibatch = {k: v[order[i : i + cfg.minibatch_size]] for k, v in tensors.items()}
            mean = engine.WeightedMean()
            micros = ranks.micro_batches(minibatch, cfg)
            own = [rows for m in micros for _, rows in batches.by_length(m, groups(cfg))]
            for rows in own:
                loss, stats = ppo_loss(cfg, policy, reference, rows)
                if cfg.ptx_coef:
                    ptx = ptx_loss(policy.gpt, ptx_batch((step, epoch, i)))
                    loss, stats["ptx_loss"] = loss + cfg.ptx_coef * ptx, ptx.detach()
                weight = float(rows["weight"].sum())
                optimizer.backward(loss, weight)
                mean.add(stats, weight)
            stats = mean.result()
            if cfg.max_approx_kl and stats["approx_kl"] > cfg.max_approx_kl:
                optimizer.discard()
                return average(history or [stats | {"grad_norm": 0.0}])
            history.append(stats | {"grad_norm": optimizer.step(learning_rate)})
    return average(history)


def average(history):
    return {k: sum(stats[k] for stats in history) / len(history) for k in history[0]}


def ppo_loss(cfg, policy, reference, rows):
    """The whole objective of one micro-batch: (loss, stats)."""
    mask = rows["response_mask"]
    logits, values = policy(rows["tokens"], rows["states"], rows.get("trunk"), cfg.freeze_layers)
    logprobs = f.logprobs_from_logits(logits, rows["responses"], cfg.temperature)
    pg, stats = f.policy_loss(logprobs, rows["logprobs"], rows["advantages"], mask, cfg.cliprange)
    vf, vf_stats = f.value_loss(values, rows["values"], rows["returns"], mask, cfg.cliprange_value)
    loss = pg + cfg.vf_coef * vf
    if cfg.entropy_coef:
        entropy = f.entropy_from_logits(logits, cfg.temperature)
        loss = loss - cfg.entropy_coef * f.masked_mean(entropy, mask)
    if cfg.kl_loss_coef:
        kl = f.kl_exact(logits, reference_logits(cfg, reference, rows), cfg.temperature)
        loss = loss + cfg.kl_loss_coef * f.masked_mean(kl, mask)
    return loss, stats | vf_stats | {"policy_loss": pg.detach(), "value_loss": vf.detach()}


def ptx_loss(gpt, batch):
    """The pretraining loss, mixed in so that the policy does not forget text (PPO-ptx)."""
    tokens = batch["tokens"].to(gpt.wte.weight.device)
    return head_loss(gpt.hidden(tokens[:, :-1]), gpt.wte.weight, tokens[:, 1:])


def describe(gold, prompts, rollout, scores, rewards):
    """The rollout in numbers; KL in nats per response, the rest means over responses or tokens."""
    mask = rollout["response_mask"]
    per_response = lambda x: x.masked_fill(~mask, 0).sum(1).mean()
    estimate = lambda kind: f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], kind)
    advantages = rollout["returns"] - rollout["values"]  # before whitening, which hides their scale
    centred = advantages - f.masked_mean(advantages, mask)
    row = {
        "scores": scores.mean(),
        "scores_sd": scores.std(correction=0),
        "kl": per_response(estimate("k1")),
        "kl_k2": per_response(estimate("k2")),
        "kl_k3": per_response(estimate("k3")),
        "kl_exact": per_response(rollout["kl_exact"]),
        "rewards": per_response(rewards),
        "returns": f.masked_mean(rollout["returns"], mask),
        "values": f.masked_mean(rollout["values"], mask),
        "explained_variance": f.explained_variance(rollout["values"], rollout["returns"], mask),
        "advantages_sd": f.masked_mean(centred**2, mask).sqrt(),
        "entropy": f.masked_mean(rollout["entropy"], mask),
        "eos_rate": rollout["ended"].float().mean(),
        "length": mask.sum(1).float().mean(),
    }
    if gold:  # looked at, never learned from
        judge = lambda: call_function(gold, [p.text for p in prompts], rollout["texts"]).mean()
        row["gold"] = ranks.on_main(judge)
    return row


def make_gold(cfg):
    """gold(prompts, responses): the user's function, or what the embedded world truly likes."""
    if cfg.gold:
        return load_function(cfg.gold, "--gold")
    return None if cfg.data else lambda prompts, texts: map(world.gold, prompts, texts)


def evaluate(cfg, policy, reference, score, gold, prompts, tokenizer):
    """The same held-out prompts and noise every time; prints samples with score and KL."""
    rollout = make_rollout(cfg, policy, reference, prompts, tokenizer, EVAL_NOISE)
    scores = score_rollout(cfg, score, prompts, rollout)
    rewards = torch.zeros_like(rollout["values"])
    row = describe(gold, prompts, rollout | {"returns": rewards}, scores, rewards)
    kl = rollout["kl_exact"].masked_fill(~rollout["response_mask"], 0).sum(1)
    for i in range(min(2, len(prompts))):
        about = f"score {scores[i]:.2f}, kl {kl[i]:.1f}"
        print(f"  prompt | {prompts[i].text}\n  sample | {rollout['texts'][i]} ({about})")
    names = ("scores", "kl_exact", "gold", "eos_rate", "length", "entropy")
    return {"eval_" + name: row[name] for name in names if name in row}


if __name__ == "__main__":
    main(from_cli(Config))
