"""Prompts -> responses with their log-probs and values, and the minibatches of the update.

Shapes: B rows of a rollout, b of a part of it (a process's share, a group, a micro-batch), P prompt
positions, padded on the left, T response positions, padded on the right, S positions of prompt and
response side by side, padded on the right, D width.
"""

import numpy as np
import torch

from nanorlhf import functional as f
from nanorlhf.config import note
from nanorlhf.data.batches import by_length, micro_batches, pad, pads_last
from nanorlhf.engine import unsharded
from nanorlhf.machine import ranks
from nanorlhf.run.log import show_sample
from nanorlhf.sampling import generate, is_end, response_mask, uniforms


@torch.no_grad()
def make_rollout(cfg, policy, reference, prompts, tokenizer, step, measure):
    """Sample a response to each prompt and `measure` it. Returns a dict of (B, ...) tensors, and
    of two lists of B, the responses' "ids" and "texts". Row i's noise is keyed by (seed, step, i).
    Under torchrun each process answers a share of the prompts; then all hold the whole rollout."""
    share = ranks.rows(len(prompts))
    rollout = respond(cfg, policy.gpt, prompts, tokenizer, step, share)
    n_groups = -(-len(prompts) * cfg.grad_accum // cfg.minibatch_size)  # as small as micro-batches
    for index, rows in by_length(rollout, n_groups, always=True):
        if policy.gpt.n_frozen:  # these layers run once, for both models and all epochs
            rows["trunk"] = reference.trunk(rows["tokens"], policy.gpt.n_frozen)  # (b, S, D)
        measured = measure(cfg, policy, reference, rows)
        measured |= {"trunk": rows["trunk"]} if "trunk" in rows else {}
        for name, x in measured.items():  # put the group's results into full-size tensors
            like = rollout["tokens" if name == "trunk" else "responses"]
            whole = rollout.setdefault(name, x.new_zeros(*like.shape, *x.shape[2:]))
            whole[index, : x.shape[1]] = x
    rollout = {name: ranks.gather(x, len(prompts)) for name, x in rollout.items()}
    responses, mask = rollout["responses"].cpu(), rollout["response_mask"].cpu()
    rollout["ids"] = [row[m].tolist() for row, m in zip(responses, mask)]
    rollout["texts"] = [tokenizer.decode(ids) for ids in rollout["ids"]]
    return rollout


def respond(cfg, gpt, prompts, tokenizer, step, share):
    """Sample responses to the prompts whose indices are in `share`, and lay prompt and response
    side by side, padded on the right: then one forward pass reads both and needs no mask."""
    padded = pad([p.ids for p in prompts], tokenizer.pad_id, left=True)
    # (b, P): as wide as the longest prompt of all, on every process
    prompt_tokens, prompt_mask = (x[share].to(gpt.device) for x in padded)
    noise = uniforms(cfg.seed, step, share, cfg.max_new_tokens)
    limits, whole = (cfg.max_new_tokens, tokenizer.ends, tokenizer.pad_id), unsharded(gpt, cfg)
    responses = generate(whole, prompt_tokens, prompt_mask, *limits, noise, cfg.temperature)
    responses = ranks.pad_alike(responses, tokenizer.pad_id)  # (b, T)
    mask = response_mask(responses, tokenizer.ends)  # (b, T)
    real = torch.cat([prompt_mask, mask], 1)  # (b, P + T)
    tokens = pads_last(torch.cat([prompt_tokens, responses], 1), real)  # (b, S)
    before = prompt_mask.sum(1, keepdim=True) - 1  # (b, 1): the last token of each prompt
    n_response = mask.sum(1).cpu()  # what is called "n_..." stays on the CPU, to cut rows by
    return {
        "tokens": ranks.pad_alike(tokens, tokenizer.pad_id),
        "n_tokens": real.sum(1).cpu(),
        "n_response": n_response,
        "weight": n_response,  # in a mean over tokens a row weighs as many as its response has
        "states": before + torch.arange(mask.shape[1], device=gpt.device),  # (b, T)
        "responses": responses,
        "response_mask": mask,
        "ended": is_end(responses, tokenizer.ends).any(1),
    }


def minibatches(rollout, cfg, step):
    """Yields ((step, epoch, i), micro-batches) for each optimizer step of the update. The rows are
    shuffled anew in every epoch. The micro-batches are this process's part of a minibatch."""
    tensors = {name: x for name, x in rollout.items() if torch.is_tensor(x)}
    for epoch in range(cfg.ppo_epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollout["ids"]))
        order = order[rollout["weight"][order].numpy() > 0]  # a row that no judge judged weighs 0
        for i in range(0, len(order), cfg.minibatch_size):
            index = order[i : i + cfg.minibatch_size]
            yield (step, epoch, i), micro_batches({k: x[index] for k, x in tensors.items()}, cfg)


def rollout_stats(rollout, scores, gold, prompts):
    """A rollout in numbers: KL and rewards are sums over a response, in nats and in reward units,
    averaged over responses; the rest are means over responses or tokens. `gold`, if given, is
    asked as well; nothing learns from what it says."""
    mask = rollout["response_mask"]
    counts = mask.any(1)  # all but what every judge left out
    per_response = lambda x: x.masked_fill(~mask, 0).sum(1)[counts].mean()
    per_token = lambda x: f.masked_mean(x, mask)
    estimate = lambda kind: f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], kind)
    row = {
        "scores": scores[counts].mean(),
        "scores_sd": scores[counts].std(correction=0),
        "kl": per_response(estimate("k1")),
        "kl_k2": per_response(estimate("k2")),
        "kl_k3": per_response(estimate("k3")),
        "kl_exact": per_response(rollout["kl_exact"]),
    }
    if "rewards" in rollout:
        row["rewards"] = per_response(rollout["rewards"])
    if "values" in rollout and "returns" in rollout:
        values, returns = rollout["values"], rollout["returns"]
        row["returns"], row["values"] = per_token(returns), per_token(values)
        row["explained_variance"] = f.explained_variance(values, returns, mask)
    if "returns" in rollout:  # of the advantages before whitening, which hides their scale
        raw = rollout["returns"] - rollout.get("values", 0)
        row["advantages_sd"] = per_token((raw - per_token(raw)) ** 2).sqrt()
    row["entropy"] = per_token(rollout["entropy"])
    row["eos_rate"] = rollout["ended"][counts].float().mean()
    row["length"] = mask.sum(1)[counts].float().mean()
    row |= {name: x.nanmean() for name, x in rollout.get("by_judge", {}).items()}
    row |= {"left_out": rollout["n_left_out"]} if "n_left_out" in rollout else {}
    if gold:
        judged = [i for i, is_judged in enumerate(counts.tolist()) if is_judged]
        row["gold"] = gold([prompts[i] for i in judged], [rollout["texts"][i] for i in judged])
    return row


def mean_stats(history):
    """The mean of each stat over several optimizer steps."""
    return {name: sum(stats[name] for stats in history) / len(history) for name in history[0]}


def show_samples(prompts, rollout, scores, n=2):
    """Print the first prompts with their responses, scores and exact KL, in nats."""
    note("[ppo] held-out prompts, and what the policy answers now:")
    kl = rollout["kl_exact"].masked_fill(~rollout["response_mask"], 0).sum(1)  # (B,)
    for i in range(min(n, len(prompts))):
        figures = f"score {scores[i]:.2f}, kl {kl[i]:.1f}"
        show_sample(prompts[i].text, f"{rollout['texts'][i]} ({figures})")
