"""`--check`: before its first step a run looks for mistakes that would ruin its results silently.

A few rows go through the functions that the run will use. What comes out is compared with something
simpler: the row alone, without cache and pads; a plain softmax; the chat template. Which tokens
carry loss is read from the gradient of the run's own loss. The checks change nothing: gradients are
forgotten, weights are not touched, and random generators go back to where they were.

Shapes: B rows, T positions, V vocabulary entries, n tokens of one response.
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
    "sampling": "sampled tokens are {:.2g} off those that their noise picks at temperature {} "
    "(top-k or top-p on?)",
    "logprobs": "log-probs are {:.2g} nats off log softmax(logits / {}) (not divided? one state "
    "late?)",
    "temperature": "ratio is {:.4g} (+- {:.2g}) at temperature {}: the update uses another one",
    "head": "the loss reads the score at token {} of {}, not at the eos (one before? at a pad?)",
    "score": "a score is {:.2g} off the one at the eos of the same text alone (one token before? "
    "at a pad?)",
    "gradients": "gradient of {} is {} (detached? no_grad? frozen, or not, after Optimizer()?)",
}
# How far rounding may move logits, in their standard deviations, and log-probs, in nats
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
LOGPROBS = {torch.float32: 1e-5, torch.bfloat16: 0.05}
PROBE = 3.0  # a temperature at which a forgotten division shows, beyond what rounding does


def check(stage, checks):
    """Run the checks and print their names: each yields its name where it holds, and ends the run
    where it does not."""
    began, states = time.perf_counter(), session.random_states()
    passed = "  ".join(checks)
    session.restore_random(states)  # a user's reward function may have drawn from them
    print(f"[{stage}] checks: {passed}  ({time.perf_counter() - began:.1f} s)")


def require(name, holds, *figures):
    """End the run where a check does not hold, with its message; else return what to print."""
    if not holds:
        die(f"check failed: {MISTAKES[name].format(*figures)}; --no-check runs anyway")
    return f"{name} ✓"


def supervised(loss_fn, batch, optimizer, cfg, tokenizer, dtype):
    """Stages 1 to 3, on the first rows of a batch: no more than fit in a micro-batch."""
    model, n_rows = optimizer.model.train(), len(batch["weight"])
    gpt = model if isinstance(model, GPT) else model.gpt
    few = max(1, min(4, n_rows // (cfg.grad_accum * world_size())))
    batch = next(split(batch, -(-n_rows // few)))
    whole = ranks.unsharded(gpt, dtype) if cfg.shard else gpt
    yield from forward_checks(whole, batch["tokens"].flatten(0, -2).tolist(), tokenizer)
    if not batch["weight"].any():  # all are tied: there is nothing to learn from
        return
    if model is gpt:
        learned = learned_positions(loss_fn, batch, optimizer, gpt, gpt.ln_f)
        if batch["tokens"].dim() == 2:  # else a fork's own loss on completions (B, K, T)
            yield from text_checks(learned, batch, tokenizer)
    else:
        learned = learned_positions(loss_fn, batch, optimizer, gpt, model)
        yield from head_check(learned, tokenizer)
    yield gradient_check(optimizer)


@torch.no_grad()
def forward_checks(gpt, rows, tokenizer):
    """A row has the same logits whether it is read alone, through the cache, or beside a longer
    row, with its pads on the right or on the left."""
    device, pad_id, training = gpt.device, tokenizer.pad_id, gpt.training
    require("pad", pad_id != tokenizer.eos_id)
    rows = [[i for i in row if i != pad_id] for row in rows if row[0] != pad_id]
    long = max(rows, key=len)[: min(48, gpt.config.block_size)]
    short = min(rows, key=len)[: max(2, len(long) * 2 // 3)]
    n_last, tolerance = min(4, len(short) - 1), LOGITS[gpt.dtype]
    gpt.eval()  # where dropout is on by mistake, the ratio shows it
    long_alone = logits(gpt, torch.tensor([long], device=device))[0]  # (T, V)
    short_alone = logits(gpt, torch.tensor([short], device=device))[0]
    gap = largest_gap(cached(gpt, [long], n_last, pad_id)[0], long_alone[-n_last - 1 :])
    yield require("cache", gap <= tolerance, gap)
    beside = logits(gpt, pad([long, short], pad_id)[0].to(device))[1, : len(short)]
    gap = largest_gap(beside, short_alone)
    require("padding", gap <= tolerance, "right", gap)
    gap = largest_gap(cached(gpt, [long, short], n_last, pad_id)[1], short_alone[-n_last - 1 :])
    yield require("padding", gap <= tolerance, "left", gap)
    gpt.train(training)


def largest_gap(logits, wanted):
    """How far logits (T, V) are from the wanted ones, in standard deviations of these; the largest
    of T positions. What is the same for a whole row of V changes no probability and is left out."""
    return float(((logits - wanted).std(-1) / wanted.std(-1)).max())


def cached(gpt, rows, n_last, pad_id):
    """Logits (B, n_last + 1, V) at the ends of rows, read as `generate` reads them: all but the
    last n_last tokens at once, padded on the left, and then these one by one."""
    device, longest = gpt.device, max(map(len, rows))
    tokens, mask = pad([row[:-n_last] for row in rows], pad_id, left=True)
    width = longest - n_last  # `pad` made it a multiple of 8; a single row is to have no pads
    tokens, mask = tokens[:, -width:].to(device), mask[:, -width:].to(device)
    cache = KVCache(gpt.config, (~mask).sum(1), longest, gpt.dtype)
    cache.reach(longest)
    last = torch.tensor([row[-n_last:] for row in rows], device=device).split(1, 1)
    return torch.stack([logits(gpt, x, cache)[:, -1] for x in (tokens, *last)], 1)


def logits(gpt, tokens, cache=None):
    """(B, T, V) in float32: GPT-2's are near -100, where bfloat16 has steps of half a nat."""
    return gpt.hidden(tokens, cache).float() @ gpt.head_weight.float().T


def learned_positions(loss_fn, batch, optimizer, gpt, module):
    """What the loss learns from: [(tokens, flags)] of every row that the model reads. A flag says
    whether the loss depends on the module's output at that position."""
    read, outputs = [], []

    def keep_tokens(embedding, args, output):
        read.extend(args[0].tolist())

    def keep_output(module, args, output):
        outputs.append(output)
        output.retain_grad()

    with gpt.wte.register_forward_hook(keep_tokens), module.register_forward_hook(keep_output):
        loss, _ = loss_fn(optimizer.model, to_device(batch, gpt.device))
    optimizer.backward(loss, {}, batch["weight"])
    return list(zip(read, [flags for x in outputs for flags in has_gradient(x)]))


def has_gradient(x):
    """Lists of bool (B, T): whether the loss depends on x (B, T, ...) there."""
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    return (grad != 0).view(*x.shape[:2], -1).any(-1).tolist()


def text_checks(learned, batch, tokenizer):
    """Loss is on the assistant's words and their eos, and on nothing else. Before the first role
    token, so in all of a text without roles or in another template than ours, the batch's mask
    decides; without one, all count."""
    roles, rows = {tokenizer.user_id: False, tokenizer.assistant_id: True}, []
    masks = batch.get("mask", torch.ones_like(batch["tokens"]).bool())
    for row, mask in zip(batch["tokens"].tolist(), masks.tolist()):
        wanted, speaks = [], None  # whether the assistant speaks; None before the first role
        for token, is_masked_in in zip(row, mask):
            wanted.append(is_masked_in if speaks is None else speaks)
            if token in roles:
                speaks = roles[token]
            elif speaks and token == tokenizer.eos_id:
                speaks = False
        found = next((flags for read, flags in learned if read == row[: len(read)]), [])
        found = (found + [False] * len(row))[: len(row) - 1]
        rows.append((row[1:], found, wanted[1:]))  # the output at one position predicts the next
    return loss_checks(rows, tokenizer)


def loss_checks(rows, tokenizer):
    """rows: (tokens, which of them carry loss, which of them should)."""

    def about(ids, flags):
        marked = [i for i, flag in zip(ids, flags) if flag]
        return len(marked), tokenizer.decode(marked)[:60]

    eos_id, n_ends = tokenizer.eos_id, 0
    for ids, found, wanted in rows:
        wrong = {i for i, f, w in zip(ids, found, wanted) if f != w}
        require("eos", wrong != {eos_id})
        require("mask", not wrong, *about(ids, found), *about(ids, wanted))
        n_ends += sum(i == eos_id and w for i, w in zip(ids, wanted))
    yield "eos ✓" if n_ends else "eos – (none in these rows)"
    yield "mask ✓"


def head_check(learned, tokenizer):
    """Of a row's scores, one at each position, the loss takes the one at the eos."""
    for row, flags in learned:
        n_tokens = len(row) - row.count(tokenizer.pad_id)
        read = [place for place, flag in enumerate(flags, 1) if flag]
        at_eos = read in ([], [n_tokens]) and row[n_tokens - 1] == tokenizer.eos_id
        require("head", at_eos, read, n_tokens)
    yield "score ✓"


def gradient_check(optimizer, idle=()):
    """All that is trained has a gradient, and nothing else has; then the gradients are forgotten.
    A vector's may be 0: a bias that adds the same to all scores changes no ranking. Parameters
    whose names start with one of `idle` may have none."""
    for name, p in optimizer.params.items():
        trained = name in optimizer.trained
        grad = optimizer.masters[name].grad if trained else p.grad
        norm = None if grad is None else float(ranks.whole(grad.norm()))
        fine = norm is not None and (0 < norm < float("inf") or norm == 0 and p.dim() < 2)
        require("gradients", fine == trained or name.startswith(idle), name, norm)
    optimizer.discard()
    return "gradients ✓"


def ppo(cfg, optimizer, reference, score, prompts, tokenizer, make_rollout, measure, ppo_loss):
    """Stage 4, with the stage's own functions, on responses to at most 8 of the first prompts: some
    of all lengths."""
    policy, tolerance = optimizer.model, LOGPROBS[reference.dtype]
    gpt = ranks.unsharded(policy.gpt, reference.dtype) if cfg.shard else policy.gpt

    def rollout(cfg, prompts):
        return make_rollout(cfg, policy, reference, prompts, tokenizer, 0, measure)

    def loss(cfg, rows):
        return ppo_loss(cfg, policy, reference, rows)

    by_length = sorted(prompts[: cfg.batch_size], key=lambda prompt: len(prompt.ids))
    prompts = by_length[:: -(-len(by_length) // 8)]
    sampled = rollout(replace(cfg, max_new_tokens=min(cfg.max_new_tokens, 128)), prompts)
    texts = [prompt.ids + ids for prompt, ids in zip(prompts, sampled["ids"])]
    yield from forward_checks(gpt, texts, tokenizer)
    few = max(1, cfg.minibatch_size // (cfg.grad_accum * world_size()))
    rows, ratio, spread = first_update(cfg, sampled, few, loss, optimizer.backward)
    is_eos = rows["responses"] == tokenizer.eos_id
    wanted = is_eos.cumsum(1) - is_eos.long() == 0  # up to the first eos, and that too
    found = has_gradient(rows["advantages"])
    yield from loss_checks(zip(rows["responses"].tolist(), found, wanted.tolist()), tokenizer)
    yield require("ratio", is_one(ratio, spread, tolerance), ratio, spread)
    require("reference", not any(p.requires_grad for p in reference.parameters()))
    kl = (sampled["logprobs"] - sampled["ref_logprobs"])[sampled["response_mask"]].abs().max()
    yield require("kl", kl <= tolerance, float(kl))
    yield temperature_check(cfg, gpt, prompts[::2], rollout, loss)
    yield from score_check(score, prompts, sampled, tokenizer.eos_id)
    yield gradient_check(optimizer, () if cfg.vf_coef else ("value_head", "critic"))


def first_update(cfg, sampled, n, loss, backward):
    """The loss of n rows of a rollout, in another order than they were measured in. Returns (rows,
    the mean ratio, the root mean square of its logarithm)."""
    order = torch.arange(len(sampled["ids"])).flip(0)[:n]
    rows = {name: x[order] for name, x in sampled.items() if torch.is_tensor(x)}
    rows["advantages"] = torch.ones_like(rows["logprobs"]).requires_grad_()
    if "values" in rows:  # --critic none has none
        rows["returns"] = rows["values"] + 1
    mean = ranks.WeightedMean()
    for group in grouped(rows, cfg):
        value, stats = loss(cfg, group)
        backward(value, {}, group["weight"])
        mean.add(stats, float(group["weight"].sum()))
    stats = mean.result()
    # near a ratio of 1, approx_kl is half of that mean square
    return rows, stats["ratio"], abs(2 * stats["approx_kl"]) ** 0.5


def is_one(ratio, spread, tolerance):
    """Whether the ratio is 1 but for rounding, both its mean and, by its spread, token by token."""
    return abs(ratio - 1) <= tolerance and spread <= 4 * tolerance


@torch.no_grad()
def temperature_check(cfg, gpt, prompts, rollout, loss):
    """At another temperature, sampling, rollout and update agree with softmax(logits / PROBE)."""
    cfg = replace(cfg, temperature=PROBE, max_new_tokens=min(16, cfg.max_new_tokens))
    tolerance, device = LOGPROBS[gpt.dtype], gpt.device
    noise = uniforms(cfg.seed, 0, range(len(prompts)), cfg.max_new_tokens).to(device)
    sampled, misses, gaps = rollout(cfg, prompts), [], []
    logprobs = torch.stack([sampled["logprobs"], sampled["ref_logprobs"]], 1)  # (B, 2, T)
    for prompt, ids, u, both in zip(prompts, sampled["ids"], noise, logprobs):
        row, n = torch.tensor([prompt.ids + ids], device=device), len(ids)
        probs = (gpt(row)[0, -n - 1 : -1].float() / PROBE).softmax(-1)  # (n, V)
        tokens, u = row[0, -n:, None], u[:n]  # (n, 1), (n,)
        p = probs.gather(1, tokens)[:, 0]  # (n,)
        high = probs.cumsum(-1).gather(1, tokens)[:, 0]  # (n,)
        # inverse-CDF sampling: u picks the token for which high - p <= u < high
        misses.append(torch.maximum(high - p - u, u - high).clamp(min=0))
        gaps.append((both[:, :n] - p.log()).abs().amax(0))
    miss, gap = float(torch.cat(misses).mean()), float(torch.cat(gaps).mean())
    require("sampling", miss <= tolerance / 10, miss, PROBE)
    require("logprobs", gap <= 10 * tolerance, gap, PROBE)

    def no_backward(value, stats, weight):
        pass

    _, ratio, spread = first_update(cfg, sampled, len(prompts), loss, no_backward)
    return require("temperature", is_one(ratio, spread, tolerance), ratio, spread, PROBE)


def score_check(score, prompts, sampled, eos_id):
    """A response's score is what the reward model says at the eos of that text alone. Where the
    reward is a user's function, there is nothing to compare with."""
    models = []

    def keep_model(module, args, output):
        if isinstance(module, RewardModel):
            models.append(module)

    with register_module_forward_hook(keep_model):
        scores = score(prompts, sampled["ids"], sampled["texts"])
    if not models:
        return
    model = models[0]
    for prompt, ids, found in zip(prompts, sampled["ids"], scores):
        row = [*prompt.ids, *ids]
        if row[-1] != eos_id:
            row.append(eos_id)
        row = torch.tensor([row[-model.gpt.config.block_size :]], device=scores.device)
        gap = abs(float(found - model(row)[0, -1]))
        require("score", gap <= 4 * LOGITS[model.score_head.weight.dtype], gap)
    yield "score ✓"
