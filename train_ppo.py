"""Stage 4: PPO. The policy maximises the reward model's score minus a KL penalty to the SFT model.

    python train_ppo.py                                  # prompts of the embedded world
    python train_ppo.py --kl_coef 0 --out_dir out/ppo_kl0    # no penalty: watch it fool the judge
    python train_ppo.py --reward my.py:function --data prompts.jsonl

One iteration: rollout -> score -> rewards with a KL penalty -> GAE -> epochs of clipped updates, as
in openai/lm-human-preferences (arXiv:1909.08593) and the TL;DR reproduction (arXiv:2403.17031).
Departures from lm-human-preferences: advantages are whitened once, over the rollout, as the TL;DR
reproduction does (theirs: per minibatch). From InstructGPT (arXiv:2203.02155, section 3.5): the
value function reads the policy's hidden states by default (--critic separate is theirs), PPO-ptx is
off by default, unfinished responses get a fixed score.

A rollout is a dict: "responses" and "response_mask", what was said and which of it is no padding;
"ids" and "texts", the same as lists; "ended", which responses ended by themselves; "logprobs",
"ref_logprobs", "values", "kl_exact", "entropy", what `measure` reads; and what `ppo_advantages`
makes of these. Its other keys are for rollout.py and model.py: which positions of "tokens" are the
"states" that responses were chosen in, a row's "weight" in a mean, the frozen layers' "trunk".
docs/forking.md has shapes, and a length penalty.

Shapes: B responses of a rollout, b of a micro-batch, T response tokens, V vocabulary entries.
"""

from dataclasses import dataclass

import torch

from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, arg, from_cli
from nanorlhf.engine import Optimizer, claim, leave, linear_rate, unsharded
from nanorlhf.fused import head_loss
from nanorlhf.loading import load_gpt
from nanorlhf.model import ActorCritic, freeze_layers, frozen_reference
from nanorlhf.rollout import make_rollout, mean_stats, minibatches, rollout_stats, show_samples
from nanorlhf.run import selfcheck
from nanorlhf.run.log import Log
from nanorlhf.run.session import Run, stop_if_not_finite
from nanorlhf.scoring import check_unit, make_critic, make_gold, make_rewards, one_score
from nanorlhf.sources import ppo_prompts, prompts_of_step, ptx_batches


@dataclass
class Config(TrainConfig):
    """Stage 4: PPO by the scores of a judge, with a KL penalty to the SFT policy."""

    out_dir: str = arg("out/ppo", "folder for this stage's checkpoints, metrics and samples")
    init: str = arg("out/sft", "checkpoint of the policy and of its frozen reference")
    reward: list[str] = arg(["out/rm"], "judges: reward-model folders, path.py:function")
    reward_weights: list[float] = arg([], "a factor for each judge; default: 1", low=-1e6)
    reward_mix: str = arg("sum", "of several judges' scores", ("sum", "min", "uncertain"))
    reward_timeout: float = arg(600.0, "seconds until a function is given up; 0: never")
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
    kl_target: float = arg(0.0, "steer kl_coef towards this KL, in nats per response; 0: do not")
    kl_loss_coef: float = arg(0.0, "weight of the exact KL, differentiated in the loss")
    gamma: float = arg(1.0, "discount per token", high=1)
    lam: float = arg(0.95, "lambda of generalized advantage estimation", high=1)
    cliprange: float = arg(0.2, "the policy ratio is clipped to 1 +- this")
    cliprange_value: float = arg(0.2, "new values are clipped to the old +- this")
    vf_coef: float = arg(0.1, "weight of the value loss")
    critic: str = arg("shared", "value function's network", choices=("shared", "separate", "none"))
    freeze_layers: int = arg(0, "freeze embeddings, head and so many blocks; 0: nothing")
    entropy_coef: float = arg(0.0, "weight of the entropy bonus")
    missing_eos_score: float = arg(-3.0, "score of a response that did not end by itself", low=-1e6)
    score_unended: bool = arg(False, "judge it as it stands, without --missing_eos_score")
    max_approx_kl: float = arg(0.0, "stop an iteration's update beyond this approx_kl; 0: never")
    ptx_coef: float = arg(0.0, "weight of the pretraining loss (PPO-ptx)")
    ptx_data: list[str] = arg([], "text for --ptx_coef; default: the embedded world's")
    temperature: float = arg(1.0, "of sampling and of every log-probability", low=0.01)
    max_new_tokens: int = arg(128, "length limit of a response")
    eval_prompts: int = arg(128, "fixed held-out prompts to evaluate on")
    eval_every: int = arg(8, "iterations between evaluations")
    save_every: int = arg(10, "iterations between checkpoints")


def ppo_advantages(cfg, rollout, scores, kl_coef):
    """InstructGPT's: the score at the last token, a KL penalty at every token, GAE. A fork hands
    another such function to `main`, for example with a penalty on length in its scores. scores (B,)
    -> four tensors (B, T)."""
    mask = rollout["response_mask"]  # (B, T)
    kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")  # (B, T), in nats
    rewards = f.shaped_rewards(scores, kl, mask, kl_coef)
    if cfg.kl_loss_coef:  # an action changes which states come: that part of the KL is a reward
        rewards = rewards - cfg.kl_loss_coef * rollout["kl_exact"].masked_fill(~mask, 0)
    values = rollout.get("values", torch.zeros_like(rewards))  # --critic none has none
    advantages, returns = f.gae(rewards, values, mask, cfg.gamma, cfg.lam)
    # over the rollout: a minibatch is a small sample of it, whose mean and sd are noise of its own
    white, scale = f.masked_whiten(advantages, mask), f.masked_sd(advantages, mask)
    estimates = {"rewards": rewards, "returns": returns, "advantages": white}
    return estimates | {"advantage_scale": scale.expand(mask.shape)}


def main(cfg, estimate=ppo_advantages, stage="ppo", on_row=None, freeze=freeze_layers):
    device, dtype = claim(cfg)
    gpt, init = load_gpt(cfg.init, template=cfg.template)
    tokenizer = init.tokenizer
    train_prompts, val_prompts = ppo_prompts(cfg, init)
    score = make_rewards(cfg, init, device, dtype, train_prompts + val_prompts)
    gold = make_gold(cfg, train_prompts + val_prompts)
    ptx_batch = ptx_batches(cfg, init, n_windows=8)
    torch.manual_seed(cfg.seed)
    freeze(gpt, cfg.freeze_layers)
    policy = ActorCritic(gpt, make_critic(cfg, gpt)).eval()  # eval: no dropout in PPO
    optimizer = Optimizer(policy, cfg, dtype, device, eps=1e-5)
    reference = frozen_reference(unsharded(gpt, cfg))  # of --init's weights: before `resume`
    run = Run(stage, cfg, optimizer, tokenizer, cfg.max_steps)
    start, state = run.resume()
    if cfg.check and start == 0:
        ours = make_rollout, measure, ppo_advantages, ppo_loss
        checks = selfcheck.ppo(cfg, optimizer, reference, score, train_prompts, tokenizer, ours)
        selfcheck.check(stage, checks)
    kl_coef, episodes = state.get("kl_coef", cfg.kl_coef), cfg.batch_size * cfg.rollouts_per_prompt
    log = Log(cfg, start, cfg.max_steps, on_row)

    for step in range(start, cfg.max_steps + 1):
        row, last = {}, step == cfg.max_steps
        if why := run.due(step):
            run.save(step, why, {"kl_coef": kl_coef})
        with run.saving(step, {"kl_coef": kl_coef}):  # a judge that fails costs no finished step
            if step % cfg.eval_every == 0 or last:
                row = evaluate(cfg, policy, reference, score, gold, val_prompts, tokenizer)
            if last:
                log.row(step, row)
                break

            # 1. rollout: the policy answers a batch of prompts
            prompts = prompts_of_step(train_prompts, cfg, step)
            rollout = make_rollout(cfg, policy, reference, prompts, tokenizer, step, measure)

            # 2. score the responses; one that did not end by itself gets a fixed score
            scores = score_rollout(cfg, score, prompts, rollout)  # (B,)
            if step == 0:
                check_unit(cfg, scores, rollout)

            # 3. rewards and advantages
            rollout |= estimate(cfg, rollout, scores, kl_coef)
            means = rollout_stats(rollout, scores, gold, prompts)

        # 4. several epochs of clipped minibatch steps
        means |= update(cfg, policy, reference, optimizer, rollout, ptx_batch, step)
        stop_if_not_finite(step, means["grad_norm"], [p.source for p in prompts])

        rates = {"kl_coef": kl_coef, "learning_rate": linear_rate(step, cfg)}
        log.row(step, means | row | rates)
        log.bar.update()
        if cfg.kl_target:
            horizon = max(episodes * cfg.max_steps // 3, 1)  # theirs, 10,000, suits a longer run
            kl_coef = f.adapt_kl_coef(kl_coef, float(means["kl"]), cfg.kl_target, episodes, horizon)
    log.close()
    leave()
    return row


def update(cfg, policy, reference, optimizer, rollout, ptx_batch, step):
    """--ppo_epochs passes of clipped minibatch steps over a rollout; the mean of their stats."""
    history = []
    for key, micro_batches in minibatches(rollout, cfg, step):
        for rows in micro_batches:
            loss, stats = ppo_loss(cfg, policy, reference, rows)
            optimizer.backward(loss, stats, rows["weight"])
        if cfg.ptx_coef:
            loss = ptx_loss(policy.gpt, ptx_batch(key))
            optimizer.backward_beside(cfg.ptx_coef * loss, {"ptx_loss": loss.detach()})
        stats = optimizer.stats()
        if cfg.max_approx_kl and stats["approx_kl"] > cfg.max_approx_kl:
            optimizer.discard()  # skip this step and the rest; its stats say how far it has gone
            return mean_stats([*history, stats | {"grad_norm": 0.0}])
        history.append(stats | {"grad_norm": optimizer.step(linear_rate(step, cfg))})
    return mean_stats(history)


def ppo_loss(cfg, policy, reference, rows):
    """The objective of one micro-batch, a mean over its response tokens: (loss, stats)."""
    mask = rows["response_mask"]  # (b, T)
    logprobs, advantages = rows["logprobs"], rows["advantages"]  # (b, T)
    logits, new_values = policy(rows)  # (b, T, V), (b, T)
    new_logprobs = f.logprobs_from_logits(logits, rows["responses"], cfg.temperature)
    loss, stats = f.policy_loss(new_logprobs, logprobs, advantages, mask, cfg.cliprange)
    stats["policy_loss"] = loss.detach()
    if new_values is not None:  # None: --critic none
        values, returns, clip = rows["values"], rows["returns"], cfg.cliprange_value
        vf, vf_stats = f.value_loss(new_values, values, returns, mask, clip)
        loss, stats = loss + cfg.vf_coef * vf, stats | vf_stats | {"value_loss": vf.detach()}
    if cfg.entropy_coef:
        entropy = f.entropy_from_logits(logits, cfg.temperature)
        loss = loss - cfg.entropy_coef * f.masked_mean(entropy, mask)
    if cfg.kl_loss_coef:
        kl = f.kl_exact(logits, reference_logits(reference, rows), cfg.temperature)
        kl = kl / rows.get("advantage_scale", 1.0)  # in the unit of the advantages
        loss = loss + cfg.kl_loss_coef * f.masked_mean(kl, mask)
    return loss, stats


def ptx_loss(gpt, batch):
    """The pretraining loss, mixed in so that the policy does not forget text (PPO-ptx)."""
    tokens = batch["tokens"].to(gpt.device)
    return head_loss(gpt.hidden(tokens[:, :-1]), gpt.head_weight, tokens[:, 1:])


def measure(cfg, policy, reference, rows):
    """Read sampled rows with policy and reference, each result (b, T). Log-probs are computed as
    `ppo_loss` will compute them, and not taken from the sampler: so the first ratio is 1."""
    logits, values = policy(rows)
    ref_logits, temperature = reference_logits(reference, rows), cfg.temperature
    measured = {
        "logprobs": f.logprobs_from_logits(logits, rows["responses"], temperature),
        "ref_logprobs": f.logprobs_from_logits(ref_logits, rows["responses"], temperature),
        "entropy": f.entropy_from_logits(logits, temperature),
        "kl_exact": f.kl_exact(logits, ref_logits, temperature),
    }
    return measured if values is None else measured | {"values": values}


@torch.no_grad()
def reference_logits(reference, rows):
    return reference.head(reference.in_states(rows))  # (b, T, V)


def score_rollout(cfg, score, prompts, rollout):
    """(B,): the judges' score, or missing_eos_score where a response did not end by itself. With
    --score_unended that one too has the judges'. Why -3: scores have sd 1, so it is below nearly
    all of them, and to end is better than not to; far lower, it would be all that is learned."""
    ended, scores = rollout["ended"], score(prompts, rollout["ids"], rollout["texts"])
    scores = one_score(cfg, rollout, scores).to(ended.device)
    return scores if cfg.score_unended else scores.masked_fill(~ended, cfg.missing_eos_score)


def evaluate(cfg, policy, reference, score, gold, prompts, tokenizer):
    """Metrics on the same held-out prompts with the same noise every time; prints samples."""
    # the noise is keyed by a step that is no training step's
    rollout = make_rollout(cfg, policy, reference, prompts, tokenizer, 2**32 - 1, measure)
    scores = score_rollout(cfg, score, prompts, rollout)
    show_samples(prompts, rollout, scores)
    row = rollout_stats(rollout, scores, gold, prompts)
    names = "scores kl_exact gold eos_rate length entropy".split() + [*rollout.get("by_judge", ())]
    return {"eval_" + name: row[name] for name in names if name in row}


if __name__ == "__main__":
    main(from_cli(Config))
