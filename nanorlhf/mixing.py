"""Several judges as one, and responses that judges leave out: what train_ppo.py needs beside one
reward model.

Shapes: J judges, B responses of a rollout, T response tokens.
"""

from pathlib import Path

import torch

from nanorlhf.config import die, is_function

PENALTY = 0.5  # of the variance, in `combined`


def check(cfg):
    """Exits 2 where the flags of --reward do not fit each other."""
    n, mix = len(cfg.reward), cfg.reward_mix
    if not n or len(set(cfg.reward)) < n:
        die(f"--reward {' '.join(cfg.reward)}: name each judge once")
    if cfg.reward_weights and len(cfg.reward_weights) != n:
        die(f"--reward_weights: {len(cfg.reward_weights)} for {n} judges of --reward")
    if mix != "sum" and n < 2:
        die(f"--reward_mix {mix} is for several judges; --reward names one")
    if mix == "uncertain" and any(map(is_function, cfg.reward)):
        die("--reward_mix uncertain is for reward models that judge the same, and for no function")


def names_of(specs):
    """Short names for the columns of metrics.csv: of path.py:short and of out/short, "short"; the
    whole where two would be alike."""
    names = [spec.rpartition(":")[2] if is_function(spec) else Path(spec).name for spec in specs]
    return names if len(set(names)) == len(names) else specs


def combined(scores, mix):
    """One score of several: (J, B), nan where a judge leaves a response out -> (B,), nan where all
    do. A judge is not counted where it leaves a response out.

        sum        s_1 + ... + s_J
        min        the lowest: a policy has to please all; worst-case optimisation
        uncertain  mean(s) - PENALTY var(s), the variance divided by J: where reward models disagree
                   none of them knows; uncertainty-weighted optimisation

    The last two are of arXiv:2310.02743, where PENALTY is lambda. Scores are in standard
    deviations, so that it can be a constant.
    """
    mean = scores.nanmean(0)  # (B,)
    result = {
        "sum": scores.nansum(0),
        "min": scores.nan_to_num(nan=torch.inf).amin(0),
        "uncertain": mean - PENALTY * ((scores - mean) ** 2).nanmean(0),
    }[mix]
    return result.masked_fill(scores.isnan().all(0), torch.nan)


def one_of_several(cfg, rollout, scores):
    """scores (J, B) of the judges -> (B,). What each says of its own stays in the rollout, to be
    logged. A response that all of them leave out teaches nothing: no token of it is in the mask, it
    weighs 0, and its score is nan."""
    names = names_of(cfg.reward)
    if len(names) > 1:
        rollout["by_judge"] = {f"score_{name}": row for name, row in zip(names, scores)}
    weights = scores.new_tensor(cfg.reward_weights or [1.0] * len(names))
    mixed = combined(scores * weights[:, None], cfg.reward_mix)
    is_left_out = mixed.isnan()
    if is_left_out.all():
        die(f"--reward {' '.join(cfg.reward)} left out all {len(mixed)} responses: None of each")
    rollout["n_left_out"] = int(is_left_out.sum())
    mask, weight = rollout["response_mask"], rollout["weight"]
    rollout["response_mask"] = mask & ~is_left_out[:, None].to(mask.device)  # (B, T)
    rollout["weight"] = weight.masked_fill(is_left_out.to(weight.device), 0)
    return mixed
