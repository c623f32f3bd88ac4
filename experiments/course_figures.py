"""The pictures of the course, and the response of four tokens that it works through.

    python -m experiments.course_figures

The response is "aab." of the world of 31 sentences (experiments/small_world.py), in which policy,
reference and value function are sums. `walk` has the numbers of any of these sentences, token by
token; chapters take them from there.

Shapes: N sentences, one row of T tokens.
"""

from dataclasses import dataclass

import torch

from experiments import small_world as world
from nanorlhf import functional as f
from nanorlhf import picture
from nanorlhf.config import arg, from_cli

BLUE, SOFT = "#dfe8f3", "#4a5563"


@dataclass
class Config:
    """Draw the pictures of docs/course."""

    to: str = arg("docs/course", "folder for the pictures")


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


def canvas(plt, width, height):
    """Axes that are not drawn: x to the right and y down, 100 units an inch."""
    figure, ax = plt.subplots(figsize=(width / 100, height / 100))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def words(ax, x, y, text, box=None, side="center"):
    """Text at a place: grey, or black in a box that is filled with the colour `box`."""
    frame = box and {"boxstyle": "round,pad=0.6", "facecolor": box, "edgecolor": SOFT}
    style = {"fontsize": 11, "linespacing": 1.5, "color": "black" if box else SOFT}
    ax.text(x, y, text, ha=side, va="center", bbox=frame, **style)


def arrow(ax, start, end):
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"})


def stages(plt):
    """The four stages, with what they read and write."""
    figure, ax = canvas(plt, 1000, 330)
    reads = "web text", "demonstrations", "rankings", "prompts alone"
    does = "gpt.py\npredict text", "sft.py\nimitate", "rm.py\nlearn to judge", "ppo.py\nimprove"
    for x, above, script in zip((120, 370, 620, 870), reads, does):
        words(ax, x, 25, above)
        words(ax, x, 115, "train_" + script, BLUE)
        words(ax, x, 225, "out/" + script.partition(".")[0], "white")
        arrow(ax, (x, 40), (x, 78))
        arrow(ax, (x, 150), (x, 203))
    for x in (165, 415, 665):
        arrow(ax, (x, 207), (x + 150, 152))
    ax.plot([370, 370, 975, 975], [250, 285, 285, 115], "k-", linewidth=1)
    arrow(ax, (975, 115), (945, 115))
    words(ax, 620, 308, "start of the policy, and its frozen reference")
    return figure


def iteration(plt):
    """One iteration of PPO, with shapes on its arrows."""
    figure, ax = canvas(plt, 640, 545)
    parts = {
        "prompts (B, P)": "1. rollout\nmake_rollout, measure",
        "responses and mask, logprobs,\nref_logprobs, values: (B, T)": "2. score\nscore_rollout",
        "scores (B,)": "3. rewards and advantages\nshaped_rewards, gae, masked_whiten",
        "advantages, returns: (B, T)": "4. update\npolicy_loss, value_loss",
    }
    for i, (flow, box) in enumerate(parts.items()):
        words(ax, 240, 40 + 125 * i, flow, side="left")
        words(ax, 190, 102 + 125 * i, box, BLUE)
        arrow(ax, (190, 12 + 125 * i), (190, 66 + 125 * i))
    words(ax, 240, 532, "inside: new_logprobs, new_values: (b, T), in minibatches of b rows")
    return figure


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
    plt.rcParams["svg.hashsalt"] = "course"  # else equal pictures are unequal files
    k = lambda kind: lambda ratio: f.kl_estimate(ratio.log(), 0 * one, kind)
    loss = lambda A: lambda ratio: f.policy_loss(ratio.log(), 0 * one, A * one, one > 0, 0.2)[0]
    for draw in (stages, iteration):
        picture.save(draw(plt), f"{cfg.to}/{draw.__name__}.svg")
    lines = {kind: k(kind) for kind in ("k1", "k2", "k3")}
    curves(plt, f"{cfg.to}/estimates.png", "policy / reference", "nats", lines)
    lines = {"A = +1": loss(1), "A = -1": loss(-1)}
    curves(plt, f"{cfg.to}/clipped.png", "new / old", "policy_loss", lines)


if __name__ == "__main__":
    main(from_cli(Config))
