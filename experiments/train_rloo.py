"""A fork of stage 4 without a value function: a response is measured against the other responses
to its prompt.

    python -m experiments.train_rloo                     # RLOO
    python -m experiments.train_rloo --baseline grpo --out_dir out/grpo
    python -m nanorlhf evaluate --models rloo=out/rloo grpo=out/grpo

With R_i the reward of a whole response, KL penalty included, and K responses to each prompt:

    RLOO  A_i = R_i - mean of the other R_j    REINFORCE, leave one out, arXiv:2402.14740, eq. 8
    GRPO  A_i = (s_i - mean s) / sd s          arXiv:2402.03300, section 4.1.2; s are the scores

All tokens of a response have its advantage. As in its paper, GRPO has its KL penalty in the loss.
In the reward it would be divided by the sd as well, and in a group of equal scores differences of
KL, however small, would become advantages of 1. The penalty is not divided by the sd (there is no
"advantage_scale"): --kl_coef is per unit of advantage, and what GRPO maximises is not
score - kl_coef * KL (docs/forking.md).

Departures from the papers: both run in PPO's clipped epochs (RLOO's authors take one step a
rollout: --ppo_epochs 1 --minibatch_size 128). GRPO's mean is over all tokens of a minibatch, where
its authors average over each response first (1/|o|); its sd is divided by n; its KL is the exact
one of each state, where they take k3 of the sampled token. A group of equal scores has advantage 0.
"""

from dataclasses import dataclass, replace

import torch

import train_ppo
from nanorlhf import functional as f
from nanorlhf.config import arg, die, from_cli, gone


@dataclass
class Config(train_ppo.Config):
    """RLOO or GRPO: PPO whose baseline is the other responses to the same prompt."""

    out_dir: str = arg("out/rloo", "folder for this stage's checkpoints, metrics and samples")
    baseline: str = arg("rloo", "mean of the others, or mean and sd of all", ("rloo", "grpo"))
    rollouts_per_prompt: int = arg(4, "responses sampled to each prompt of a rollout", low=2)
    batch_size: int = arg(32, "prompts per rollout")
    kl_coef: float = arg(0.05, "weight of the KL penalty: RLOO's in the reward, GRPO's in the loss")
    critic: str = gone("none")  # and so what follows
    gamma: float = gone(1.0)
    lam: float = gone(0.95)
    vf_coef: float = gone(0.1)
    cliprange_value: float = gone(0.2)


def group_advantages(cfg, rollout, scores, kl_coef):
    """In place of ppo_advantages: {"rewards", "advantages"}, both (B, T), of scores (B,)."""
    mask, K = rollout["response_mask"], cfg.rollouts_per_prompt  # (B, T)
    is_out = ~mask.any(1)  # (B,): every judge left it out, so it is in no group
    if cfg.baseline == "rloo":
        rewards = train_ppo.ppo_advantages(cfg, rollout, scores, kl_coef)["rewards"]  # (B, T)
        R = rewards.sum(1).masked_fill(is_out, torch.nan).view(-1, K)  # (prompts, K), side by side
        n = (~is_out).view(-1, K).sum(1, keepdim=True)
        advantages = (R - R.nanmean(1, keepdim=True)) * n / (n - 1).clamp(min=1)  # of the others
    else:
        rewards = f.shaped_rewards(scores, rollout["logprobs"], mask, 0.0)  # without a KL
        R = scores.masked_fill(is_out, torch.nan).view(-1, K)
        deviation = R - R.nanmean(1, keepdim=True)
        sd = (deviation**2).nanmean(1, keepdim=True).sqrt()  # of equal numbers 0, but for rounding
        low, high = (R.nan_to_num(nan=x) for x in (torch.inf, -torch.inf))
        equal = high.amax(1, keepdim=True) == low.amin(1, keepdim=True)
        advantages = (deviation / (sd + 1e-8)).masked_fill(equal, 0)
    advantages = advantages.view(-1, 1).expand(mask.shape)  # (B, T)
    return {"rewards": rewards, "advantages": advantages.masked_fill(~mask, 0)}


def main(cfg):
    if cfg.baseline == "grpo":
        if cfg.kl_target:
            die("--kl_target steers a penalty in the reward; GRPO has it in the loss")
        cfg = replace(cfg, kl_coef=0.0, kl_loss_coef=cfg.kl_coef + cfg.kl_loss_coef)
    return train_ppo.main(cfg, estimate=group_advantages, stage=cfg.baseline)


if __name__ == "__main__":
    main(from_cli(Config))
