"""`--check`: before its first step a run looks for mistakes that would ruin its results silently.

A few short texts go through the functions that the run will use. What comes out is compared with
something simpler: a text alone, without cache and pads; a plain softmax; the chat template. Which
tokens carry loss is read from the gradient of the run's own loss. The checks change nothing: no
weight gets a gradient, and no random number is drawn. They cost a small part of a training step or
of a PPO iteration.

Shapes: B rows, T positions, V vocabulary entries, n tokens of one response.
"""

import copy
from dataclasses import replace

import torch
from torch.nn.modules.module import register_module_forward_hook

from nanorlhf.config import die, is_function
from nanorlhf.data.batches import pad, to_device
from nanorlhf.machine import ranks
from nanorlhf.model import GPT, RewardModel
from nanorlhf.run.doctor import is_one_step
from nanorlhf.sampling import KVCache, is_end, uniforms
from nanorlhf.scoring import score_responses

MISTAKES = {
    "pad": "pad is eos: no mask can tell the end of a response from what is behind it",
    "cache": "the key-value cache moves logits by {:.1%} (stale keys? another position or mask?)",
    "padding": "padding on the {} moves logits by {:.1%} (positions count pads? pads attended to?)",
    "eos": "an eos carries no loss: stopping is never learned (pad = eos? a mask one token short?)",
    "mask": "loss is on {} tokens, {!r}, not on {}, {!r} (prompt or pads in the mask? shifted?)",
    "old": "the loss ignores the rollout's log-probs, its ratio is always 1 (taken in the update?)",
    "ratio": "ratio is {:.4g} (+- {:.2g}) at step 0, not 1 (dropout on? temperature? positions?)",
    "reference": "the reference is not frozen: it moves with the policy, and KL says nothing",
    "kl": "policy and reference differ by {:.2g} nats at step 0 (no copy of --init? other dtype?)",
    "sampling": "samples are {:.2g} off what their noise picks at temperature {} (top-k or top-p?)",
    "logprobs": "log-probs are {:.2g} nats off log softmax(logits / {}) (not divided? one late?)",
    "rewards": "a score of 1 adds from {:.3g} to {:.3g} to a response's rewards (at every token?)",
    "score": "a score is {:.2g} off the one of the same text alone (read at a pad?)",
}
# How far rounding may move logits, in their standard deviations, and log-probs, in nats
LOGITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
LOGPROBS = {torch.float32: 1e-5, torch.bfloat16: 0.05}
PROBE = 3.0  # a temperature at which a forgotten division shows, beyond what rounding does


def check(stage, checks):
    """Run the checks and print the name of each as it passes: each yields its name where it holds,
    and ends the run where it does not."""
    print(f"[{stage}] checks:", end=" ", flush=True)
    for passed in checks:
        print(passed, end="  ", flush=True)
    print("(what each has tested: docs/trouble.md)", flush=True)


def require(name, holds, *figures):
    """End the run where a check does not hold, with its message; else return what to print."""
    if not holds:
        print(flush=True)  # the line of those that passed
        die(f"check failed: {MISTAKES[name].format(*figures)}; --no-check runs anyway")
    return f"{name} ✓"


@torch.no_grad()
def forward_checks(gpt, rows, tokenizer):
    """The logits at the end of a row are the same whether it is read alone, through the cache, or
    beside a longer row, with its pads on the right or on the left."""
    pad_id, tolerance = tokenizer.pad_id, LOGITS[gpt.dtype]
    require("pad", pad_id not in tokenizer.ends)
    rows = [[i for i in row if i != pad_id] for row in rows]
    long = max(rows, key=len)[: min(48, gpt.config.block_size - 1)]
    short = min(filter(None, rows), key=len)[: max(2, len(long) * 2 // 3)]
    alone = [logits(gpt, torch.tensor([row]))[0, -1] for row in (long, short)]
    right = logits(gpt, pad([long, short], pad_id)[0])[1, len(short) - 1]
    # `pad` makes the width a multiple of 8, but the longer row is to have no pads
    tokens, mask = (x[:, -len(long) :] for x in pad([long, short], pad_id, left=True))
    cache = KVCache(gpt.config, (~mask).sum(1).to(gpt.device), len(long), gpt.dtype)
    cache.reach(len(long))
    logits(gpt, tokens[:, :-1], cache)  # as `generate` reads: the last token comes on its own
    cached, left = logits(gpt, tokens[:, -1:], cache)[:, 0]
    # in standard deviations; what is the same for all of V changes no probability and is left out
    gaps = [(x - y).std() / y.std() for x, y in zip((cached, left, right), (*alone, alone[1]))]
    require("padding", gaps[2] <= tolerance, "right", float(gaps[2]))
    yield require("cache", gaps[0] <= tolerance, float(gaps[0]))
    yield require("padding", gaps[1] <= tolerance, "left", float(gaps[1]))


def logits(gpt, tokens, cache=None):
    """(B, T, V) in float32: GPT-2's are near -100, where bfloat16 has steps of half a nat."""
    return gpt.hidden(tokens.to(gpt.device), cache).float() @ gpt.head_weight.float().T


def loss_checks(tokens, learned, wanted, tokenizer):
    """The loss depends on the wanted tokens and on no others; three tensors of equal shape."""
    wrong, ends = learned != wanted, is_end(tokens, tokenizer.ends)
    require("eos", not wrong.any() or (wrong & ~ends).any())
    marked = [tokens[flags].tolist() for flags in (learned, wanted)]
    figures = [x for ids in marked for x in (len(ids), tokenizer.decode(ids)[:60])]
    require("mask", not wrong.any(), *figures)
    yield "eos ✓" if (wanted & ends).any() else "eos – (none in these rows)"
    yield "mask ✓"


def supervised(loss_fn, batch, optimizer, cfg, tokenizer, dtype):
    """Stages 1 to 3, on the first rows of a batch: no more than fit in a micro-batch."""
    model = optimizer.model.eval()  # the loop's first step makes it train again
    gpt = model if isinstance(model, GPT) else model.gpt
    few = max(1, min(4, len(batch["weight"]) // (cfg.grad_accum * ranks.world_size())))
    batch = {name: x[:few] for name, x in batch.items()}
    whole = ranks.unsharded(gpt, dtype) if cfg.shard else gpt
    yield from forward_checks(whole, batch["tokens"].flatten(0, -2).tolist(), tokenizer)
    if not batch["weight"].any():  # all are tied: there is nothing to learn from
        return
    tokens, states = [], []  # of every forward pass: (b, T), and the last hidden states (b, T, D)
    with (
        gpt.wte.register_forward_hook(lambda module, args, output: tokens.append(args[0])),
        gpt.ln_f.register_forward_hook(lambda module, args, output: states.append(output)),
    ):
        loss, _ = loss_fn(model, to_device(batch, gpt.device))
    grads = torch.autograd.grad(loss, states, allow_unused=True, materialize_grads=True)
    learned = [grad.ne(0).any(-1) for grad in grads]  # (b, T): does the loss depend on the state?
    if model is not gpt:  # of a text's scores, one at each position, the loss takes that at the eos
        read = torch.cat([x[flags] for x, flags in zip(tokens, learned)])
        yield from loss_checks(read, read == read, read == tokenizer.eos_id, tokenizer)
    elif batch["tokens"].dim() == 2:  # else a fork's own loss on completions (B, K, T)
        rows = batch["tokens"]
        wanted = said_by_assistant(rows, batch.get("mask", torch.ones_like(rows) > 0), tokenizer)
        learned = learned[0].cpu()[:, : wanted.shape[1]]  # the state predicts the next token
        yield from loss_checks(rows[:, 1:], learned, wanted, tokenizer)


def said_by_assistant(tokens, mask, tokenizer):
    """(B, T - 1): whether the next token is the assistant's, words or eos. Before the first role
    token, so in all of a text without roles or in another template than ours, the mask decides. A
    whole turn outside the mask, beside one inside, has weight 0 in the data: nobody wants it."""
    roles = [i for i in (tokenizer.user_id, tokenizer.assistant_id) if i is not None]
    is_role = torch.isin(tokens, torch.tensor(roles, dtype=tokens.dtype))
    is_turn = is_role | (tokens == tokenizer.eos_id) & (is_role.cumsum(1) > 0)  # ends or begins one
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    last = places.masked_fill(~is_turn, -1).cummax(1).values[:, :-1]
    turn = last.clamp(min=0)  # the place where the token's turn begins
    said = tokens.gather(1, turn) == tokenizer.assistant_id
    n_learned = torch.zeros_like(tokens).scatter_add(1, turn, mask[:, 1:].long())
    learned = said & (n_learned.gather(1, turn) > 0)  # by turns: all of one, or nothing
    said = torch.where(learned.any(1, keepdim=True), learned, said)
    return torch.where(last < 0, mask[:, 1:], said)


def ppo(cfg, optimizer, reference, score, prompts, tokenizer, ours):
    """Stage 4, with the script's own functions, on short responses to the ends of four prompts, and
    at the temperature PROBE. ours: make_rollout, measure, ppo_advantages, ppo_loss."""
    make_rollout, measure, ppo_advantages, ppo_loss = ours
    policy, tolerance = optimizer.model, LOGPROBS[reference.dtype]
    gpt = ranks.unsharded(policy.gpt, reference.dtype) if cfg.shard else policy.gpt
    require("reference", not any(p.requires_grad for p in reference.parameters()))
    prompts = [replace(p, ids=p.ids[-8 * i :]) for i, p in enumerate(prompts[:4], 1)]
    cfg = replace(cfg, temperature=PROBE, max_new_tokens=min(16, cfg.max_new_tokens))
    # hardly any text ends within so few tokens: what is half-way in the first one is made the eos
    half, ending = replace(cfg, max_new_tokens=-(-cfg.max_new_tokens // 2)), copy.copy(tokenizer)
    rows = make_rollout(half, policy, reference, prompts, tokenizer, 0, measure)
    ending.ends = (rows["ids"][0][-1],)
    rows = make_rollout(cfg, policy, reference, prompts, ending, 0, measure)  # with the same noise
    advantages = torch.ones_like(rows["logprobs"]).requires_grad_()
    # --critic none has no values
    update = rows | {"advantages": advantages, "returns": rows.get("values", advantages) + 1}
    loss, stats = ppo_loss(cfg, policy, reference, update)
    loss.backward(inputs=[advantages])
    ends = rows["responses"] == ending.ends[0]
    wanted = ends.cumsum(1) - ends.long() == 0  # up to the first eos, and that too
    yield from loss_checks(rows["responses"], advantages.grad != 0, wanted, ending)
    update["logprobs"] = rows["logprobs"] + 0.1  # a ratio of 0.9, which no clipping range hides
    with torch.no_grad():
        other, _ = ppo_loss(cfg, policy, reference, update)
    require("old", (other - loss).abs() > 1e-4 or is_one_step(vars(cfg)))
    # near a ratio of 1, approx_kl is half the mean square of its logarithm
    ratio, spread = float(stats["ratio"]), abs(2 * float(stats["approx_kl"])) ** 0.5
    is_one = abs(ratio - 1) <= tolerance and spread <= 4 * tolerance
    yield require("ratio", is_one, ratio, spread)
    kl = (rows["logprobs"] - rows["ref_logprobs"])[rows["response_mask"]].abs().max()
    yield require("kl", kl <= tolerance, float(kl))
    texts = [prompt.ids + ids for prompt, ids in zip(prompts, rows["ids"])]
    yield from forward_checks(gpt, texts, tokenizer)
    yield temperature_check(cfg, gpt, texts, rows)
    nothing = torch.zeros(len(texts), device=gpt.device)
    sums = [ppo_advantages(cfg, rows, x, 0.0)["rewards"].sum(1) for x in (nothing, nothing + 1)]
    least, most = (sums[1] - sums[0]).aminmax()
    yield require("rewards", most - least <= 1e-3 * most.abs(), float(least), float(most))
    if not any(map(is_function, cfg.reward)):  # a user's function may say anything
        yield score_check(score, prompts, rows, tokenizer)


def score_check(score, prompts, rows, tokenizer):
    """A reward model scores a text among others as it does the text alone. Only the models that
    `score` reads are asked, not `score` itself: a fork may mix theirs with anything, in any unit
    and over the whole batch."""
    modules, texts = set(), ([p.ids for p in prompts], rows["ids"])
    with register_module_forward_hook(lambda module, *_: modules.add(module)):
        score(prompts, rows["ids"], rows["texts"])
    models = [x for x in modules if isinstance(x, RewardModel)]
    for model in (x for x in models if x.gpt.config.vocab_size == tokenizer.vocab_size):
        alone = [score_responses(model, tokenizer, [p], [ids]) for p, ids in zip(*texts)]
        gap = float((score_responses(model, tokenizer, *texts) - torch.cat(alone)).abs().max())
        require("score", gap <= 4 * LOGITS[model.gpt.dtype], gap)
    return "score ✓" if models else "score – (no reward model was read)"


@torch.no_grad()
def temperature_check(cfg, gpt, texts, rows):
    """Sampling and log-probs agree with softmax(logits / PROBE); by the ratio, which is 1, and the
    KL, which is 0, so do the update and the reference."""
    noise = uniforms(cfg.seed, 0, range(len(texts)), cfg.max_new_tokens).to(gpt.device)
    misses, gaps = [], []
    for text, ids, u, logprobs in zip(texts, rows["ids"], noise, rows["logprobs"]):
        n, tokens = len(ids), torch.tensor([ids], device=gpt.device).T  # (n, 1)
        probs = (logits(gpt, torch.tensor([text]))[0, -n - 1 : -1] / PROBE).softmax(-1)  # (n, V)
        p = probs.gather(1, tokens)[:, 0]  # (n,)
        high = probs.cumsum(-1).gather(1, tokens)[:, 0]  # (n,)
        # inverse-CDF sampling: u picks the token for which high - p <= u < high
        misses.append(torch.maximum(high - p - u[:n], u[:n] - high).clamp(min=0))
        gaps.append((logprobs[:n] - p.log()).abs())
    miss, gap = float(torch.cat(misses).mean()), float(torch.cat(gaps).mean())
    require("sampling", miss <= LOGPROBS[gpt.dtype] / 10, miss, PROBE)
    require("logprobs", gap <= LOGPROBS[gpt.dtype] * 10, gap, PROBE)
    return "temperature ✓"
