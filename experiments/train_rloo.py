"""A fork of stage 4 without a value function: a response is measured against the other responses
to its prompt.

    python -m experiments.train_rloo                     # RLOO
    python -m experiments.train_rloo --baseline grpo --out_dir out/grpo
    python -m nanorlhf evaluate --models rloo=out/rloo grpo=out/grpo

With R_i the reward of a whole response, KL penalty included, and K responses to each prompt:

    RLOO  A_i = R_i - mean of the other R_j    REINFORCE, leave one out, arXiv:2402.14740, eq. 8
    GRPO  A_i = (R_i - mean R) / sd R          arXiv:2402.03300, section 4.1.2

All tokens of a response have its advantage. Departures from the papers: both run in PPO's clipped
epochs (RLOO's authors take one step a rollout: --ppo_epochs 1 --minibatch_size 128), and both have
the KL penalty in the reward (GRPO's authors put it in the loss: --kl_coef 0 --kl_loss_coef 0.05).
"""

from dataclasses import dataclass

import train_ppo
from nanorlhf import functional as f
from nanorlhf.config import arg, from_cli


@dataclass
class Config(train_ppo.Config):
    """RLOO or GRPO: PPO whose baseline is the other responses to the same prompt."""

    out_dir: str = arg("out/rloo", "folder for this stage's checkpoints, metrics and samples")
    baseline: str = arg("rloo", "mean of the others, or mean and sd of all", ("rloo", "grpo"))
    rollouts_per_prompt: int = arg(4, "responses sampled to each prompt of a rollout", low=2)
    batch_size: int = arg(32, "prompts per rollout")
    critic: str = arg("none", "value function", choices=("none",))


def group_advantages(cfg, rollout, scores, kl_coef):
    """In place of ppo_advantages: {"rewards", "advantages"}, both (B, T), of scores (B,)."""
    mask, K = rollout["response_mask"], cfg.rollouts_per_prompt  # (B, T)
    kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")  # (B, T)
    rewards = f.shaped_rewards(scores, kl, mask, kl_coef)  # (B, T)
    R = rewards.sum(1).view(-1, K)  # (prompts, K): responses to one prompt are side by side
    advantages = R - R.mean(1, keepdim=True)
    if cfg.baseline == "rloo":
        advantages = advantages * K / (K - 1)  # the mean of the others in place of all's
    else:
        advantages = advantages / (R.std(1, keepdim=True, correction=0) + 1e-8)
    advantages = advantages.view(-1, 1).expand(mask.shape)  # (B, T)
    return {"rewards": rewards, "advantages": advantages.masked_fill(~mask, 0)}


def main(cfg):
    return train_ppo.main(cfg, estimate=group_advantages, stage=cfg.baseline)


if __name__ == "__main__":
    main(from_cli(Config))
