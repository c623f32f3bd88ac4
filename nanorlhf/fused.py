"""The language model's loss without its logits: the same number as `functional.lm_loss`, but at no
time are there logits of all positions. At 16 x 1,024 positions and GPT-2's vocabulary these take
3.3 GB, and their gradient as much again; here a piece has at most 2^26 of them (0.27 GB). That is
what it is for: it takes about as long as the plain loss (0.9 to 1.1 times, in float32 on a CPU).

Shapes: B sequences, T positions, n = B * T or fewer of them, D width, V vocabulary entries.
"""

import torch
import torch.nn.functional as F

from nanorlhf.functional import exact
from nanorlhf.machine.compiled import compiled


def head_loss(hidden, weight, targets, mask=None):
    """`lm_loss` of the logits F.linear(hidden, weight), without ever holding all of them: hidden
    (B, T, D), weight (V, D), targets and mask (B, T). Without a mask every position counts."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    n = len(targets)
    if mask is not None:
        index = torch.arange(n, device=mask.device)[mask.flatten()]
        n, more = len(index), -len(index) % 64  # repeated shapes are fast, see GPT.blocks
        index = F.pad(index, (0, more))
        hidden, targets = hidden[index], F.pad(targets[index[:n]], (0, more), value=-1)
    return HeadLoss.apply(hidden, weight, targets) / max(n, 1)


@compiled
def loss_and_gradient(logits, targets, wants_gradient):
    """(the loss summed over some positions, its gradient with respect to their logits): logits
    (n, V), targets (n,). The gradient takes the logits' place in memory, where it has their dtype
    or must get it."""
    x, out, targets = exact(logits), (targets < 0)[:, None], targets[:, None].clamp(min=0)
    top, probs = x.amax(-1, keepdim=True), x.softmax(-1)
    # the likeliest has a probability of at least 1/V: its logarithm is never -inf
    loss = top - probs.amax(-1, keepdim=True).log() - x.gather(1, targets)
    loss = loss.masked_fill(out, 0).sum()
    if not wants_gradient:
        return loss, None
    probs.scatter_add_(1, targets, torch.full_like(top, -1)).masked_fill_(out, 0)
    return loss, probs if probs.dtype == logits.dtype else logits.copy_(probs)


class HeadLoss(torch.autograd.Function):
    """The sum of -log softmax(F.linear(hidden, weight))[target] over positions: hidden (n, D),
    weight (V, D), targets (n,); a target of -1 is left out.

    The positions are taken piece by piece. The gradient with respect to the logits, softmax minus
    the one-hot target, is computed together with the loss and takes the place of the logits.
    """

    AT_ONCE = 2**26  # the largest number of logits in a piece

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        total, size = 0.0, max(1, HeadLoss.AT_ONCE // len(weight))
        d_hidden, d_weight = torch.empty_like(hidden), None
        for h, t, d in zip(hidden.split(size), targets.split(size), d_hidden.split(size)):
            loss, grad = loss_and_gradient(F.linear(h, weight), t, ctx.needs_input_grad[0])
            total = total + loss
            if ctx.needs_input_grad[0]:
                torch.mm(grad, weight, out=d)
                if ctx.needs_input_grad[1]:  # not that of a frozen head
                    part = exact(h.mT.mm(grad).mT)
                    d_weight = part if d_weight is None else d_weight.add_(part)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total, None if d_weight is None else d_weight * d_total, None
