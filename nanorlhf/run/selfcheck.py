"""`--check`: before its first step a run checks the mechanics that silently ruin results.

A few rows go through the functions that the run will use, and what comes out is compared with
something simpler: the row alone, without cache and pads; a plain softmax; the template. Which
tokens carry loss is asked of the gradient, so of the loss as it is. Nothing stays: no gradient,
no weight, no random number. Shapes: B rows, T positions, V vocabulary entries.
"""

import time
from dataclasses import replace

import torch
from torch.nn.modules.module import register_module_forward_hook

from nanorlhf.config import die, world_size
from nanorlhf.data.batches import grouped, pad, split, to_device
from nanorlhf.machine import ranks
from nanorlhf.model import GPT, RewardModel
from nanorlhf.run import session
from nanorlhf.sampling import KVCache, uniforms

MISTAKES = {
    "pad": "pad is eos: no mask can tell the end of a response from what is behind it",
    "cache": "the key-value cache moves logits by {:.1%} (stale keys? another position or mask?)",
    "padding": "padding on the {} moves logits by {:.1%} (positions count pads? pads attended to?)",
    "eos": "an eos carries no loss: stopping is never learned (pad = eos? a mask one token short?)",
    "mask": "loss is on {} tokens, {!r}, not on {}, {!r} (prompt or pads in the mask? shifted?)",
    "ratio": "ratio is {:.4g} (+- {:.2g}) at step 0, should be 1: the update computes log-probs "
    "otherwise than the rollout (dropout on? another temperature? positions of padded rows?)",
    "reference": "the reference is not frozen: it moves with the policy, and KL says nothing",
    "kl": "policy and reference differ by {:.2g} nats at step 0 (no copy of --init? other dtype?)",
    "sampling": "tokens are {:.2g} off what their noise picks at temperature {} (filtered?)",
    "logprobs": "log-probs are {:.2g} nats off log softmax(logits / {}) (undivided? next state?)",
    "temperature": "ratio is {:.4g} (+- {:.2g}) at temperature {}: the update has another one",
    "head": "the loss reads the reward model at {} of {} tokens, not at the eos (before? a pad?)",
    "score": "a score is {:.2g} off that at the eos of the text alone (read one before? at a pad?)",
    "gradients": "gradient of {} is {} (detached? no_grad? frozen, or not, after Optimizer()?)",
}
# What rounding may do: to logits, in their standard deviations; to log-probs, in nats
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
LOGPROBS = {torch.float32: 1e-5, torch.bfloat16: 0.05}
PROBE = 3.0  # a temperature at which a forgotten division shows, and rounding does not


def check(stage, checks):
    """Each of the checks says its name where it holds, and ends the run where not."""
    began, states = time.perf_counter(), session.random_states()
    passed = "  ".join(checks)
    session.restore_random(states)  # a user's reward function may have drawn from them
    print(f"[{stage}] checks: {passed}  ({time.perf_counter() - began:.1f} s)")


def require(name, holds, *found):
    """What to print of a check that holds."""
    if not holds:
        die(f"check failed: {MISTAKES[name].format(*found)}; --no-check runs anyway")
    return f"{name} ✓"


def supervised(loss_fn, batch, optimizer, cfg, tokenizer, dtype):
    """Stages 1 to 3, on the first rows of a batch: no more than fit in a micro-batch."""
    model, n = optimizer.model.train(), len(batch["weight"])
    gpt = model if isinstance(model, GPT) else model.gpt
    few = max(1, min(4, n // (cfg.grad_accum * world_size())))
    batch = next(split(batch, -(-n // few)))
    whole = ranks.unsharded(gpt, dtype) if cfg.shard else gpt
    yield from forward_checks(whole, batch["tokens"].flatten(0, -2).tolist(), tokenizer)
    if batch["weight"].any():  # else only ties: there is nothing to learn from
        where, outputs = (text_checks, gpt.ln_f) if model is gpt else (head_check, model)
        seen = taught(loss_fn, batch, optimizer, gpt, outputs)
        if batch["tokens"].dim() == 2 or model is not gpt:  # of completions (B, K, T) only a
            yield from where(seen, batch, tokenizer)  # reward model's loss is known here
        yield gradient_check(optimizer)


@torch.no_grad()
def forward_checks(gpt, rows, tokenizer):
    """Logits of a row are the same alone, piece by piece, and beside a longer one."""
    device, pad_id, training = gpt.device, tokenizer.pad_id, gpt.training
    require("pad", pad_id != tokenizer.eos_id)
    rows = [[i for i in row if i != pad_id] for row in rows if row[0] != pad_id]
    long = max(rows, key=len)[: min(48, gpt.config.block_size)]
    short = min(rows, key=len)[: max(2, len(long) * 2 // 3)]
    more, close = min(4, len(short) - 1), LOGITS[gpt.dtype]
    gpt.eval()  # what dropout would change is the ratio
    gap = lambda found, wanted: float(((found - wanted).std(-1) / wanted.std(-1)).max())
    alone = [logits(gpt, torch.tensor([row], device=device))[0] for row in (long, short)]
    off = gap(cached(gpt, [long], more, pad_id)[0], alone[0][-more - 1 :])
    yield require("cache", off <= close, off)
    off = gap(logits(gpt, pad([long, short], pad_id)[0].to(device))[1, : len(short)], alone[1])
    require("padding", off <= close, "right", off)
    off = gap(cached(gpt, [long, short], more, pad_id)[1], alone[1][-more - 1 :])
    yield require("padding", off <= close, "left", off)
    gpt.train(training)


def cached(gpt, rows, more, pad_id):
    """Logits (B, more + 1, V) at the ends of rows: all but `more` tokens at once, padded on the
    left, then these one by one, as `generate` does."""
    device, R = gpt.device, max(map(len, rows))
    tokens, mask = pad([row[:-more] for row in rows], pad_id, left=True)
    tokens, mask = [x[:, more - R :].to(device) for x in (tokens, mask)]  # of one row: no pads
    cache = KVCache(gpt.config, (~mask).sum(1), R, gpt.dtype)
    cache.reach(R)
    last = torch.tensor([row[-more:] for row in rows], device=device).split(1, 1)
    return torch.stack([logits(gpt, x, cache)[:, -1] for x in (tokens, *last)], 1)


def logits(gpt, tokens, cache=None):
    """In float32: GPT-2's are near -100, where bfloat16 has steps of half a nat."""
    return gpt.hidden(tokens, cache).float() @ gpt.head_weight.float().T


def taught(loss_fn, batch, optimizer, gpt, outputs):
    """[(tokens that were read, which of their outputs have a gradient)] of each row."""
    read, out = [], []
    see = lambda module, args, x: read.extend(args[0].tolist())
    keep = lambda module, args, x: out.append(x) or x.retain_grad()
    with gpt.wte.register_forward_hook(see), outputs.register_forward_hook(keep):
        loss, _ = loss_fn(optimizer.model, to_device(batch, gpt.device))
    optimizer.backward(loss, {}, batch["weight"])
    return list(zip(read, [flags for x in out for flags in has_gradient(x)]))


def has_gradient(x):
    """(B, T, ...) -> lists of bool: on which of them the loss depends."""
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    return (grad != 0).view(*x.shape[:2], -1).any(-1).tolist()


def text_checks(seen, batch, tokenizer):
    """What carries loss is what the assistant says and its eos; before the first role, or where
    there are none, what the batch's own mask says, and all without a mask."""
    roles, rows = {tokenizer.user_id: False, tokenizer.assistant_id: True}, []
    masks = batch.get("mask", torch.ones_like(batch["tokens"]).bool())
    for row, mask in zip(batch["tokens"].tolist(), masks.tolist()):
        wanted, speaks = [], None
        for token, masked in zip(row, mask):
            wanted.append(masked if speaks is None else speaks)
            speaks = roles.get(token, speaks and token != tokenizer.eos_id)
        found = next((flags for read, flags in seen if read == row[: len(read)]), [])
        rows.append((row[1:], (found + [False] * len(row))[: len(row) - 1], wanted[1:]))
    return loss_checks(rows, tokenizer)


def loss_checks(rows, tokenizer):
    """rows: (tokens, which of them carry loss, which should)."""
    picked = lambda ids, which: [i for i, w in zip(ids, which) if w]
    about = lambda *x: (sum(x[1]), tokenizer.decode(picked(*x))[:60])
    eos, ends = tokenizer.eos_id, 0
    for ids, found, wanted in rows:
        wrong = {i for i, f, w in zip(ids, found, wanted) if f != w}
        require("eos", wrong != {eos})
        require("mask", not wrong, *about(ids, found), *about(ids, wanted))
        ends += sum(i == eos and w for i, w in zip(ids, wanted))
    yield "eos ✓" if ends else "eos – (none in these rows)"
    yield "mask ✓"


def head_check(seen, batch, tokenizer):
    """Of the scores at all positions the loss takes the one at the eos."""
    for row, flags in seen:
        read, n = [t + 1 for t, f in enumerate(flags) if f], len(row) - row.count(tokenizer.pad_id)
        require("head", read in ([], [n]) and row[n - 1] == tokenizer.eos_id, read, n)
    yield "score ✓"


def gradient_check(optimizer, idle=()):
    """A gradient for all that is trained, for nothing else; then it is forgotten. Vectors may
    have one of 0: what adds the same to all scores changes no ranking."""
    for name, p in optimizer.params.items():
        trained = name in optimizer.trained
        grad = optimizer.masters[name].grad if trained else p.grad
        norm = None if grad is None else float(ranks.whole(grad.norm()))
        fine = norm is not None and (0 < norm < float("inf") or norm == 0 and p.dim() < 2)
        require("gradients", fine == trained or name.startswith(idle), name, norm)
    optimizer.discard()
    return "gradients ✓"


def ppo(cfg, optimizer, reference, score, prompts, tokenizer, make_rollout, measure, ppo_loss):
    """Stage 4, on responses to some of the first prompts, with the stage's own functions."""
    policy, close = optimizer.model, LOGPROBS[reference.dtype]
    gpt = ranks.unsharded(policy.gpt, reference.dtype) if cfg.shard else policy.gpt
    rollout = lambda cfg, some: make_rollout(cfg, policy, reference, some, tokenizer, 0, measure)
    loss = lambda cfg, rows: ppo_loss(cfg, policy, reference, rows)
    some = sorted(prompts[: cfg.batch_size], key=lambda p: len(p.ids))
    prompts = some[:: -(-len(some) // 8)]
    sampled = rollout(replace(cfg, max_new_tokens=min(cfg.max_new_tokens, 128)), prompts)
    yield from forward_checks(gpt, [p.ids + r for p, r in zip(prompts, sampled["ids"])], tokenizer)
    few = max(1, cfg.minibatch_size // (cfg.grad_accum * world_size()))
    rows, ratio, off = first_update(cfg, sampled, few, loss, optimizer.backward)
    is_eos = rows["responses"] == tokenizer.eos_id
    wanted = is_eos.cumsum(1) - is_eos.long() == 0  # up to the first eos, and that too
    found = has_gradient(rows["advantages"])
    yield from loss_checks(zip(rows["responses"].tolist(), found, wanted.tolist()), tokenizer)
    yield require("ratio", abs(ratio - 1) <= close and off <= 4 * close, ratio, off)
    require("reference", not any(p.requires_grad for p in reference.parameters()))
    kl = (sampled["logprobs"] - sampled["ref_logprobs"])[sampled["response_mask"]].abs().max()
    yield require("kl", kl <= close, float(kl))
    yield temperature_check(cfg, gpt, prompts[::2], rollout, loss)
    yield from score_check(score, prompts, sampled, tokenizer.eos_id)
    yield gradient_check(optimizer, () if cfg.vf_coef else ("value_head", "critic"))


def first_update(cfg, sampled, n, loss, backward):
    """The loss of n rows, in another order than they were measured in, group by group; returns
    (rows, ratio, how far its logarithm is from 0: approx_kl is half of a mean square)."""
    mean, order = ranks.WeightedMean(), torch.arange(len(sampled["ids"])).flip(0)[:n]
    rows = {k: v[order] for k, v in sampled.items() if torch.is_tensor(v)}
    rows["advantages"] = torch.ones_like(rows["logprobs"]).requires_grad_()
    if "values" in rows:  # --critic none has none
        rows["returns"] = rows["values"] + 1
    for group in grouped(rows, cfg):
        value, stats = loss(cfg, group)
        backward(value, {}, group["weight"])
        mean.add(stats, float(group["weight"].sum()))
    return rows, mean.result()["ratio"], abs(2 * mean.result()["approx_kl"]) ** 0.5


@torch.no_grad()
def temperature_check(cfg, gpt, prompts, rollout, loss):
    """Sampling, rollout and update at another temperature, against softmax(logits / T)."""
    cfg = replace(cfg, temperature=PROBE, max_new_tokens=min(16, cfg.max_new_tokens))
    close, device = LOGPROBS[gpt.dtype], gpt.device
    noise = uniforms(cfg.seed, 0, range(len(prompts)), cfg.max_new_tokens).to(device)
    sampled, missed, off = rollout(cfg, prompts), [], []
    logprobs = torch.stack([sampled["logprobs"], sampled["ref_logprobs"]], 1)  # (B, 2, T)
    for prompt, ids, u, both in zip(prompts, sampled["ids"], noise, logprobs):
        row, n = torch.tensor([prompt.ids + ids], device=device), len(ids)
        probs = (gpt(row)[0, -n - 1 : -1].float() / PROBE).softmax(-1)  # (T, V)
        own, high = [x.gather(1, row[0, -n:, None])[:, 0] for x in (probs, probs.cumsum(-1))]
        missed.append(torch.maximum(high - own - u[:n], u[:n] - high).clamp(min=0))
        off.append((both[:, :n] - own.log()).abs().amax(0))
    missed, off = [float(torch.cat(x).mean()) for x in (missed, off)]
    require("sampling", missed <= close / 10, missed, PROBE)
    require("logprobs", off <= 10 * close, off, PROBE)
    _, ratio, off = first_update(
        cfg, sampled, len(prompts), loss, lambda value, stats, weight: None
    )
    return require("temperature", abs(ratio - 1) <= close and off <= 4 * close, ratio, off, PROBE)


def score_check(score, prompts, sampled, eos_id):
    """A reward model's score is what it says at the eos of the row alone."""
    seen = []
    with register_module_forward_hook(lambda module, args, x: seen.append(module)):
        scores = score(prompts, sampled["ids"], sampled["texts"])
    for model in [m for m in seen if isinstance(m, RewardModel)][:1]:  # none: a user's function
        for prompt, ids, found in zip(prompts, sampled["ids"], scores):
            row = [*prompt.ids, *ids, eos_id] if ids[-1] != eos_id else [*prompt.ids, *ids]
            row = torch.tensor([row[-model.gpt.config.block_size :]], device=scores.device)
            off = abs(float(found - model(row)[0, -1]))
            require("score", off <= 4 * LOGITS[model.score_head.weight.dtype], off)
        yield "score ✓"
