"""Question: how much of a response's return can a value function know before it is written?

    python -m experiments.value_ceiling                  # 3 seeds, about 20 minutes of one core
    python -m experiments.value_ceiling --quick

The value function of --critic shared is linear in the policy's hidden states. What such a function
can explain of the returns, score minus KL penalty from a token to the end, is measured by ridge
regression on these states as they are, fitted on one half of the responses and measured on the
other. (The value loss also moves the states, a little; and PPO's own explained_variance is of GAE's
returns, which hold the values themselves.) --critic separate starts with the reward model's states.
"""

from dataclasses import dataclass

import torch

import train_ppo
from experiments.lab import Lab, LabConfig, interval, models_of, quietly
from nanorlhf import functional as f
from nanorlhf.config import arg, from_cli
from nanorlhf.loading import load_gpt
from nanorlhf.machine.device import cast, pick_device
from nanorlhf.model import ActorCritic, frozen_reference
from nanorlhf.rollout import make_rollout
from nanorlhf.run import checkpoint
from nanorlhf.scoring import make_scorer
from nanorlhf.sources import ppo_prompts


@dataclass
class Config(LabConfig):
    """The share of the returns' variance that is linear in hidden states."""

    steps: int = arg(24, "iterations of PPO")
    prompts: int = arg(2048, "prompts that are answered; half of them to fit on")


def main(cfg):
    if cfg.quick:
        cfg.seeds, cfg.steps, cfg.prompts = [1], 2, 64
    lab = Lab(cfg, "value_ceiling", "seed policy states part explained", "steps prompts", False)
    keys = [{"seed": seed, "policy": policy} for policy in ("SFT", "PPO") for seed in cfg.seeds]
    found = {}
    for r in lab.each(explained, keys):
        arm = r["policy"], r["states"], r["part"]
        found.setdefault(arm, []).append(float(r["explained"]))
    for arm, values in found.items():
        print("{:4} {:14} {:12} {:.3f} +- {:.3f}".format(*arm, *interval(values)))


def explained(lab, seed, policy):
    cfg, (sft, reward) = lab.cfg, models_of(lab.cfg, seed)
    about = {"init": sft, "reward": reward, "seed": seed, "max_steps": cfg.steps}
    ppo = train_ppo.Config(**about, out_dir=f"{lab.folder}/ppo_{seed}", save_every=cfg.steps)
    device, answering = pick_device(ppo), sft if policy == "SFT" else quietly(train_ppo, ppo)
    ready = lambda model: cast(model, torch.float32, device).eval()
    (gpt, found), judge = load_gpt(answering), checkpoint.load_reward_model(reward)[0]
    prompts = ppo_prompts(ppo, found)[0][: cfg.prompts]
    score = make_scorer(reward, found, device, torch.float32, prompts)
    actor, reference = ActorCritic(gpt, "none"), frozen_reference(load_gpt(sft)[0])
    with torch.no_grad():
        models = ready(actor), ready(reference)
        rollout = make_rollout(ppo, *models, prompts, found.tokenizer, 0, train_ppo.measure)
        scores = train_ppo.score_rollout(ppo, score, prompts, rollout)
        rewards = train_ppo.ppo_advantages(ppo, rollout, scores, ppo.kl_coef)["rewards"]
        rows = {name: rollout[name] for name in ("tokens", "states")}
        states = {"policy": gpt.in_states(rows), "reward model": ready(judge).gpt.in_states(rows)}
    return [
        {"states": name, "part": part, "explained": share}
        for name, hidden in states.items()
        for part, share in shares(hidden, rewards, rollout["response_mask"])
    ]


def shares(hidden, rewards, mask):
    """(part, 1 - variance left over / variance) of the returns, by ridge regression on the states
    (B, T, D); of all tokens and of each quarter of the responses. Rewards (B, T), mask (B, T)."""
    returns = rewards.masked_fill(~mask, 0).flip(1).cumsum(1).flip(1)  # (B, T), gamma is 1
    fit = torch.arange(len(mask), device=mask.device)[:, None] < len(mask) // 2  # (B, 1)
    x = torch.cat([hidden, torch.ones_like(hidden[..., :1])], 2).double()  # (B, T, D + 1)
    A, b = x[mask & fit], returns[mask & fit].double()
    ridge = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    w = torch.linalg.solve(A.T @ A + ridge, A.T @ b)  # (D + 1,)
    length = mask.sum(1, keepdim=True)
    quarter = 4 * torch.arange(mask.shape[1], device=mask.device) // length  # (B, T)
    for part in ("all", "quarter 1", "quarter 2", "quarter 3", "quarter 4"):
        rest = mask & ~fit & ((quarter == int(part[-1]) - 1) if part != "all" else True)
        y, predicted = returns[rest].double(), x[rest] @ w
        yield part, float(f.explained_variance(predicted, y, torch.ones_like(y) > 0))


if __name__ == "__main__":
    main(from_cli(Config))
