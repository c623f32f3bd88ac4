"""A fork of stage 3: direct preference optimisation. The policy learns from the feedback itself,
without a reward model and without sampling.

    python -m experiments.train_dpo              # the feedback that train_rm.py collected
    python -m nanorlhf evaluate --models dpo=out/dpo

Every policy is the best one for some reward under a KL penalty: for r = beta log(pi / ref). That
reward takes the score's place in the reward model's loss (arXiv:2305.18290, eq. 7):

    L = -log sigmoid(r(better) - r(worse))

Departure from the paper: all pairs of a ranking count, as one element of the batch, as in stage 3.
"""

from dataclasses import dataclass
from functools import partial

import torch

import train_rm
from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, arg, die, from_cli
from nanorlhf.data.dialogue import context, encode_feedback
from nanorlhf.data.examples import load_feedback
from nanorlhf.data.split import split_held_out
from nanorlhf.engine import claim, train
from nanorlhf.loading import load_gpt
from nanorlhf.machine.device import cast
from nanorlhf.model import frozen_reference


@dataclass
class Config(TrainConfig):
    """DPO: learn from comparisons or rankings directly."""

    out_dir: str = arg("out/dpo", "folder for this stage's checkpoints and metrics")
    init: str = arg("out/sft", "start, and reference")
    data: list[str] = arg(["out/rm/feedback.jsonl"], "comparisons or rankings")
    beta: float = arg(0.1, "weight of the KL penalty that the reward stands for")
    epochs: int = arg(2, "passes over the data")
    batch_size: int = arg(16, "prompts per optimizer step")
    learning_rate: float = arg(2e-4, "peak learning rate")
    weight_decay: float = arg(0.0, "AdamW decay, on matrices only")
    eval_every: int = arg(20, "steps between evaluations on held-out data")


def dpo_loss(beta, reference, policy, rows):
    """(loss, metrics): K completions of B prompts with their ranks, N of T tokens in all."""
    present, target = rows["present"], rows["target"]  # (B, K)
    tokens, real = rows["tokens"][present], rows["mask"][present]  # (N, T)
    n_prompt = (rows["n_completion"] - rows["n_answer"])[present.cpu()].to(tokens.device)  # (N,)
    is_answer = torch.arange(tokens.shape[1], device=tokens.device) >= n_prompt[:, None]  # (N, T)
    mask = (real & is_answer)[:, 1:]  # (N, T - 1): the completion and its eos
    with torch.no_grad():
        ref_logits = reference(tokens[:, :-1])  # (N, T - 1, V)
    both = [f.logprobs_from_logits(x, tokens[:, 1:]) for x in (policy(tokens[:, :-1]), ref_logits)]
    r = beta * (both[0] - both[1]).masked_fill(~mask, 0).sum(1)  # (N,)
    r = torch.zeros_like(present, dtype=r.dtype).masked_scatter(present, r)  # (B, K)
    accuracy, margin = f.ranking_accuracy(r.detach(), target)
    return f.ranking_loss(r, target), {"accuracy": accuracy, "margin": margin}


def main(cfg):
    device, dtype = claim(cfg)
    gpt, start = load_gpt(cfg.init, template=cfg.template)
    tokenizer, reference = start.tokenizer, cast(frozen_reference(gpt), dtype, device)
    kind, examples = load_feedback(cfg.data, cfg.columns)
    if kind != "rankings":
        die(f"{cfg.data[0]} holds {kind}; DPO needs comparisons or rankings")
    splits = split_held_out(examples, [])
    rows, val_rows = [encode_feedback(tokenizer, s, context(cfg, gpt.config)) for s in splits]
    next_batch = partial(train_rm.batch_of, cfg, tokenizer, rows)
    val_batches = train_rm.batches_of(cfg, tokenizer, val_rows)
    max_steps = train_rm.steps_over(cfg, len(rows))
    loss_fn = partial(dpo_loss, cfg.beta, reference)
    return train("dpo", cfg, gpt, loss_fn, next_batch, val_batches, tokenizer, max_steps, cfg.data)


if __name__ == "__main__":
    main(from_cli(Config))
