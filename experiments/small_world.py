"""A world of 31 sentences, in which everything is known: what does each algorithm maximise, and
does it end where it should?

    python -m experiments.small_world

A sentence is of "a" and "b" and ends with ".". The sixteen that are cut off after four letters
share a low score, as --missing_eos_score gives it. Policy and value function are tables with a row
for each prefix; the sampler, the rollout, the loss, the update and the optimizer are the project's
own. PPO's objective and the policy that maximises it (arXiv:2305.18290, eq. 4) are sums over 31
sentences y, with beta = --kl_coef:

    J(pi)  = sum_y pi(y) (score(y) - beta log(pi(y) / ref(y)))
    pi*(y) = ref(y) exp(score(y) / beta) / Z,    J(pi*) = beta log Z

`climb(estimate)` puts an estimator of your own into this world: docs/forking.md. `walk` has the
numbers of one sentence, token by token: chapters 4 and 5 of docs/course.

Shapes: N sentences, as many prefixes, B rows, T positions.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

import train_ppo
from experiments import train_dpo, train_rloo
from nanorlhf import functional as f
from nanorlhf import picture
from nanorlhf.config import arg, from_cli
from nanorlhf.data.batches import pad
from nanorlhf.engine import Optimizer, linear_rate, train_step
from nanorlhf.model import GPT, ActorCritic, GPTConfig, frozen_reference
from nanorlhf.rollout import make_rollout
from nanorlhf.sampling import uniforms

N, BETA, EOS, PAD, ASKED = 31, 0.5, 2, 3, 4  # the prompt is one token, ASKED, that says nothing
# "." "a." "b." "aa." ... "bbb." "aaaa" ... "bbbb": n + 1 in binary without its first digit
IDS = [[*map(int, f"{n + 1:b}"[1:]), *[EOS] * (n < 15)] for n in range(N)]
SENTENCES = ["".join("ab."[i] for i in ids) for ids in IDS]
SCORES = torch.tensor([3, 8, 3, -13, 9, 4, -5, 6, 4, 3, 0, 5, -7, -2, -5] + 16 * [-10]) / 10  # (N,)
TOKENS, REAL = pad([[ASKED, *ids] for ids in IDS], PAD)  # (N, 5)
TOKENIZER = SimpleNamespace(pad_id=PAD, ends=(EOS,), decode=str)
SETTINGS = {"max_new_tokens": 4, "kl_coef": BETA, "max_steps": 100, "learning_rate": 0.1}


@dataclass
class Config:
    """PPO, RLOO, DPO, GRPO and best of n in a world of 31 sentences, beside the known optimum."""

    to: str = arg("out/small_world.png", "the picture")


class Table(GPT):
    """A policy without a network: its hidden state says which prefix it has read, one-hot, and its
    head holds the logits after each. At first these have probabilities 1/2, 1/4 and 1/4 in an order
    that `seed` shuffles, so that each sentence is a whole number of 256."""

    def __init__(self, seed):
        torch.nn.Module.__init__(self)
        self.config, self.n_frozen, self.wte = GPTConfig(5, 8, 1, 1, N), 0, torch.nn.Embedding(5, N)
        order = torch.rand(3, N, generator=torch.Generator().manual_seed(seed)).argsort(0)
        self.wte.weight.data.fill_(-1e4)[:3] = torch.tensor([0.5, 0.25, 0.25]).log()[order]

    def hidden(self, tokens, cache=None):
        if cache is not None:  # the keys are the tokens themselves
            cache.places(tokens.shape[1])
            new = tokens[:, None, :, None].to(self.dtype)
            tokens = cache.of(0).extend(new, new)[0][:, 0, :, 0].long()
        letters = tokens < EOS
        size = 2.0 ** letters.cumsum(1)  # how many prefixes are as long: a place is a binary number
        prefix = size - 1 + size * (letters * tokens / size).cumsum(1)  # (B, T)
        return torch.eye(N, dtype=self.dtype)[prefix.long()]  # (B, T, N)


def log_probs(gpt):
    """log pi(y) of the 31 sentences, (N,)."""
    logprobs = f.logprobs_from_logits(gpt(TOKENS[:, :-1]), TOKENS[:, 1:])
    return logprobs.masked_fill(~REAL[:, 1:], 0).sum(1)


def objective(logp, ref, beta=BETA):
    """J of log-probabilities (..., N) -> (...)."""
    return (logp.exp() * (SCORES - beta * (logp - ref))).sum(-1)


def optimum(ref, beta=BETA):
    """log pi*, (N,)."""
    return (ref + SCORES / beta).log_softmax(-1)


def best_of(n, ref):
    """log-probability of being the best of n that the reference says, (N,). Where several have the
    best score, each is as likely to be taken as it was to be said."""
    is_better, is_equal = SCORES > SCORES[:, None], SCORES == SCORES[:, None]  # (N, N)
    better, equal = (is_better * ref.exp()).sum(1), (is_equal * ref.exp()).sum(1)  # (N,)
    return ref - equal.log() + ((1 - better) ** n - (1 - better - equal).clamp(min=0) ** n).log()


def walk(sentence, logp, ref, beta=BETA):
    """(logprobs, ref_logprobs, values), each (1, T), of a sentence under the policy logp (N,) and
    the reference ref (N,). The values are exact: the mean, over the policy's ways on from there, of
    the score minus beta times the KL that is still to come."""
    columns = []
    for t in range(len(sentence)):
        here, then = starts_with(sentence[:t]), starts_with(sentence[: t + 1])  # (N,)
        before, ref_before = logp[here].logsumexp(0), ref[here].logsumexp(0)
        to_come = SCORES - beta * ((logp - before) - (ref - ref_before))  # (N,)
        value = ((logp - before).exp() * to_come)[here].sum()
        taken, ref_taken = logp[then].logsumexp(0), ref[then].logsumexp(0)
        columns.append((taken - before, ref_taken - ref_before, value))
    return [torch.stack(column)[None] for column in zip(*columns)]


def starts_with(prefix):
    """Which of the sentences do, (N,) bool."""
    return torch.tensor([sentence.startswith(prefix) for sentence in SENTENCES])


def climb(estimate=train_ppo.ppo_advantages, config=train_ppo.Config, **flags):
    """Train as train_ppo.py does, from the reference policy, with an estimator and flags of its
    config; by DPO where `estimate` is train_dpo. Returns log pi at the start and after each
    iteration, (iterations + 1, N)."""
    cfg = config(**SETTINGS | flags)
    policy = ActorCritic(Table(0), cfg.critic)
    frozen = frozen_reference(policy.gpt)
    optimizer = Optimizer(policy, cfg, torch.float32, torch.device("cpu"), eps=1e-5)
    prompts = [SimpleNamespace(ids=[ASKED])] * (cfg.batch_size * cfg.rollouts_per_prompt)
    path = [log_probs(policy.gpt)]
    for step in range(cfg.max_steps):
        if estimate is train_dpo:
            dpo_step(cfg, policy.gpt, frozen, optimizer, step)
        else:
            rollout = make_rollout(cfg, policy, frozen, prompts, TOKENIZER, step, train_ppo.measure)
            scores = SCORES[[IDS.index(ids) for ids in rollout["ids"]]]  # (B,)
            rollout |= estimate(cfg, rollout, scores, cfg.kl_coef)
            train_ppo.update(cfg, policy, frozen, optimizer, rollout, None, step)
        path.append(log_probs(policy.gpt))
    return torch.stack(path).detach()


def dpo_step(cfg, gpt, reference, optimizer, step):
    """One step on 64 rankings of all 31 sentences. Labelers rank by score + Gumbel noise: then they
    prefer one sentence to another as often as Bradley and Terry say."""
    ranks = f.rank_of(SCORES - (-uniforms(cfg.seed, step, range(64), N).log()).log())  # (B, N)
    rows = {"tokens": TOKENS.expand(64, N, 5), "mask": REAL.expand(64, N, 5)}
    rows |= {"present": ranks > 0, "target": ranks, "weight": torch.ones(64)}
    n_answer = torch.tensor([len(ids) for ids in IDS]).expand(64, N)
    rows |= {"n_answer": n_answer, "n_completion": n_answer + 1}  # with the prompt
    loss_fn = lambda gpt, rows: train_dpo.dpo_loss(cfg.kl_coef, reference, gpt, rows)
    train_step(gpt, loss_fn, rows, cfg, optimizer, linear_rate(step, cfg), gpt.device)


def main(cfg):
    group = train_rloo.group_advantages, train_rloo.Config
    grpo = {"baseline": "grpo", "kl_coef": 0.0, "kl_loss_coef": BETA}
    paths = {"PPO": climb(), "RLOO": climb(*group), "DPO": climb(train_dpo)}
    paths |= {"GRPO": climb(*group, **grpo), "kl_coef 0": climb(kl_coef=0.0)}
    ref = paths["PPO"][0]
    logp = torch.stack([ref, optimum(ref), *(x[-1] for x in paths.values()), best_of(4, ref)])
    p, names = logp.exp(), ["reference", "optimum", *paths, "best of 4"]
    labels = [f"{sentence:4} {score:+.1f}" for sentence, score in zip(SENTENCES, SCORES)]
    sums = objective(logp, ref), (p * (logp - ref)).sum(1), (p - p[1]).abs().sum(1) / 2
    print(f"{'':10}", *(f"{name:>10}" for name in names))
    for label, row in zip([*labels, "J", "KL, nats", "variation"], [*p.T, *sums]):
        print(f"{label:10}", *(f"{x:10.4f}" for x in row))

    figure, (bars, lines) = picture.pyplot().subplots(2, 1, figsize=(11, 8), height_ratios=[3, 2])
    bars.bar(labels, p[0], color=picture.GREY, alpha=0.5, label="reference")
    bars.bar(labels, p[1], fill=False, edgecolor=picture.BLUE, linewidth=1.5, label="optimum")
    for i, mark in enumerate("os^Dxv", 2):
        bars.plot(labels, p[i], mark, fillstyle="none", label=names[i])
    bars.tick_params("x", rotation=90, labelfontfamily="monospace")
    lines.plot(torch.stack([objective(path, ref) for path in paths.values()]).T, label=[*paths])
    lines.hlines(sums[0][:2], 0, len(paths["PPO"]), [picture.GREY, picture.BLUE], linewidth=1)
    bars.set(yscale="log", ylim=(1e-5, 2), title="probability of each sentence; below, its score")
    lines.set(xlabel="iteration", title="J; thin lines: the optimum's, the reference's")
    bars.legend(ncols=4)
    lines.legend(loc="lower left")
    picture.save(figure, cfg.to)


if __name__ == "__main__":
    main(from_cli(Config))
