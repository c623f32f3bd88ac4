"""Chapter 1, text to GPT: the next-token loss, and the cache that must not change it.

Shapes: B rows, T positions, V vocabulary entries.
"""

import torch

from nanorlhf import functional as f
from nanorlhf.course.exercises import Exercise, compare, must, near
from nanorlhf.data.batches import pad
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.sampling import KVCache


def loss_where_it_counts(lm_loss):
    """The loss, where it counts.

    The next-token loss is the mean of -log pi(target) over the positions whose mask is True. Rows
    have different lengths, and a logit outside the mask may be anything, even nan. A batch
    without a position that counts costs 0.

    Predict: 90 of 100 positions are padding and count as 0. By what factor is the loss too small,
    and what becomes of it in a batch of longer texts?

    Answer: 10. It rises with the length of the texts, though the model is the same: two batches
    cannot be compared, and the step of a batch of short texts is too small.

    Hint: pick the positions first, with `logits[mask]`: what is left out cannot do harm.

    Hint: `F.cross_entropy(..., reduction="sum")`, divided by the number of positions, 1 at least.

    Run: python train_sft.py --mistake prompts_in_the_loss --out_dir out/prompts
    """
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [0, 4, 0, 0]])
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    losses = -f.logprobs_from_logits(logits, targets)
    right, rows = losses[mask].mean(), (losses * mask).sum(1) / mask.sum(1)
    mistakes = {
        "padding is in the mean": losses.mean(),
        "padding costs nothing and is counted all the same": (losses * mask).mean(),
        "this is the mean of each row's mean: a token of a short row weighs more": rows.mean(),
        "this is a sum: a long batch makes a large step": losses[mask].sum(),
        "the sign: it is to be minimised": -right,
    }
    compare("the loss", lm_loss(logits, targets, mask), right, mistakes)
    spoilt = logits.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    loss = lm_loss(spoilt, targets, mask)
    loss.backward()
    clean = loss.isfinite() and spoilt.grad[mask].isfinite().all()
    must(
        clean, "nan outside the mask reaches the loss: nan * 0 is nan, so pick and do not multiply"
    )
    must(near(lm_loss(logits, targets, mask & False), 0.0), "an empty mask: the loss is 0, not nan")


def place_of_the_next_token(hidden):
    """Which position does the next token get?

    With a cache, a row is read piece by piece, and short rows have pads on their left. Position
    embeddings must be those that the row gets when it is read alone, at once, without pads. Fill in
    `positions` (B, T), from `slots` (T,), the places in the cache, and `pads` (B, 1).

    Predict: the positions of padded rows are too high by the number of pads. What do you see?

    Answer: no crash and no nan. Samples of short prompts get a little worse, and log-probs of the
    sampler and of the update differ, so that the first ratio is not 1.

    Hint: a pad in front of a row must not make its first token the second.

    Hint: subtract the pads; a pad's own position would be negative, so clamp it.

    Run: python -m pytest tests/test_sampling.py tests/test_model.py -k cache
    """
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(9, block_size=16, n_layer=1, n_head=1, d_model=8)).eval()
    tokens, mask = pad([[1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 4]], pad_id=0, left=True)
    cache = KVCache(gpt.config, (~mask).sum(1), 8, gpt.dtype)
    parts = [gpt.head(hidden(gpt, part, cache)) for part in tokens.split([6, 1, 1], dim=1)]
    cached, alone = (
        torch.cat(parts, 1),
        [gpt(tokens[i : i + 1, -n:])[0] for i, n in enumerate((8, 3))],
    )
    must(near(cached[0, :6], alone[0][:6]), "a row without pads is read wrongly from its start")
    must(
        near(cached[0], alone[0]), "the next token starts again at 0: it goes on where the row ends"
    )
    must(near(cached[1, -3:], alone[1]), "positions count the pads on the left")


EXERCISES = [
    Exercise("1.1", loss_where_it_counts, f.lm_loss),
    Exercise("1.2", place_of_the_next_token, GPT.hidden, r"positions = .*?(?=\n)"),
]
