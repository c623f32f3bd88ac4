"""The curves of the course, and the numbers of the response that it works through.

    python -m experiments.course_figures

It draws estimates.png of chapter 4 and clipped.png of chapter 5. The response is "aab." of the
world of 31 sentences (experiments/small_world.py), in which policy, reference and value function
are sums. `walk` has the numbers of any of these sentences, token by token; chapters take them from
there.

Shapes: N sentences, one row of T tokens.
"""

from dataclasses import dataclass

import torch

from experiments import small_world as world
from nanorlhf import functional as f
from nanorlhf import picture
from nanorlhf.config import arg, from_cli


@dataclass
class Config:
    """Draw the curves of docs/course."""

    to: str = arg("docs/course", "folder for estimates.png and clipped.png")


def walk(sentence, logp, ref, beta=world.BETA):
    """(logprobs, ref_logprobs, values), each (1, T), of a sentence under the policy logp (N,) and
    the reference ref (N,). The values are exact: the mean, over the policy's ways on from there, of
    the score minus beta times the KL that is still to come."""
    columns = []
    for t in range(len(sentence)):
        here, then = starts_with(sentence[:t]), starts_with(sentence[: t + 1])  # (N,)
        before, ref_before = logp[here].logsumexp(0), ref[here].logsumexp(0)
        to_come = world.SCORES - beta * ((logp - before) - (ref - ref_before))  # (N,)
        value = ((logp - before).exp() * to_come)[here].sum()
        taken, ref_taken = logp[then].logsumexp(0), ref[then].logsumexp(0)
        columns.append((taken - before, ref_taken - ref_before, value))
    return [torch.stack(column)[None] for column in zip(*columns)]


def starts_with(prefix):
    """Which of the sentences do, (N,) bool."""
    return torch.tensor([sentence.startswith(prefix) for sentence in world.SENTENCES])


def curves(plt, to, ratio_of, ylabel, lines):
    """Draws over the ratio of two probabilities; `lines` {name: function of a ratio (1, 1)}."""
    (figure, ax), ratio = plt.subplots(figsize=(6, 3.4)), torch.linspace(0.1, 3, 146)
    for name, line in lines.items():
        ax.plot(ratio, [float(line(x.view(1, 1))) for x in ratio], label=name)
    ax.set(xlabel=f"ratio of the token's probabilities, {ratio_of}", ylabel=ylabel)
    ax.legend()
    picture.save(figure, to)


def main(cfg):
    plt, one = picture.pyplot(), torch.ones(1, 1)
    k = lambda kind: lambda ratio: f.kl_estimate(ratio.log(), 0 * one, kind)
    loss = lambda A: lambda ratio: f.policy_loss(ratio.log(), 0 * one, A * one, one > 0, 0.2)[0]
    lines = {kind: k(kind) for kind in ("k1", "k2", "k3")}
    curves(plt, f"{cfg.to}/estimates.png", "policy / reference", "nats", lines)
    lines = {"A = +1": loss(1), "A = -1": loss(-1)}
    curves(plt, f"{cfg.to}/clipped.png", "new / old", "policy_loss", lines)


if __name__ == "__main__":
    main(from_cli(Config))
