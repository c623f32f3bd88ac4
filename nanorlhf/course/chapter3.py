"""Chapter 3, preferences: a reward model learns from who was preferred to whom.

Shapes: B prompts, K responses to one prompt.
"""

import torch
import torch.nn.functional as F

from nanorlhf import functional as f
from nanorlhf.course.exercises import Exercise, compare, must, near
from nanorlhf.data import split
from nanorlhf.data.examples import Example

RANKS = torch.tensor([[2, 1, 1, 3], [1, 2, 0, 0], [1, 1, 1, 1]])  # ties, absent ones, all tied


def who_beats_whom(ordered_pairs):
    """Who beats whom.

    Ranks 1, 2, 3, ... say which of K responses is better, 1 being the best. Equal ranks are a tie,
    and 0 is a response that is absent. Mark every pair (i, j) in which i is strictly better.

    Predict: how many ordered pairs do four responses with the ranks 2, 1, 1, 3 have?

    Answer: five: of the six pairs one is a tie. A tie says nothing about which to prefer.

    Hint: compare `ranks[:, :, None]` with `ranks[:, None, :]`, a table (B, K, K).

    Hint: 0 is smaller than every rank, so an absent response seems to win: it has to be left out.

    Run: python train_rm.py --mistake labels_swapped --out_dir out/swapped
    """
    better = RANKS[:, :, None] < RANKS[:, None, :]
    right = f.ordered_pairs(RANKS)
    mistakes = {
        "an absent response, rank 0, beats all others": better,
        "the better one has the smaller rank: this is the other way round": right.mT,
        "the better one has the smaller rank; and 0, the absent one, is in": better.mT,
        "a tie is in: neither of the two is better": (
            (RANKS[:, :, None] <= RANKS[:, None, :]) & (RANKS > 0)[:, :, None]
        ),
    }
    compare(
        f"the table of pairs for the ranks {RANKS.tolist()}", ordered_pairs(RANKS), right, mistakes
    )


def one_prompt_one_vote(ranking_loss):
    """One prompt, one vote.

    InstructGPT shows K = 4 to 9 responses to a labeler and learns from all pairs of a prompt at
    once: their mean loss is one element of the batch. Write the loss for scores and ranks (B, K).

    Predict: what is the loss of a reward model that gives every response the same score?

    Answer: log 2 = 0.693: -log sigmoid(0). A loss above that is worse than knowing nothing.

    Hint: `-F.logsigmoid(scores[:, :, None] - scores[:, None, :])` has all pairs, (B, K, K).

    Hint: divide by each prompt's own number of pairs, then by the number of prompts with a pair.

    Run: python train_rm.py --feedback comparisons --out_dir out/pairs    (K = 2, for comparison)
    """
    torch.manual_seed(0)
    scores, pairs = torch.randn(3, 4), f.ordered_pairs(RANKS)
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]).masked_fill(~pairs, 0)
    right = f.ranking_loss(scores, RANKS)
    mistakes = {
        "this is the mean over all pairs: a prompt with many responses outvotes the others": (
            losses.sum() / pairs.sum()
        ),
        "the sign of the difference is turned round: it learns to prefer the worse": (
            f.ranking_loss(-scores, RANKS)
        ),
        "a prompt without an ordered pair counts as one: it says nothing, and is skipped": (
            right * 2 / 3
        ),
        "a sum over the pairs of a prompt, no mean": losses.sum() / 2,
    }
    compare("the loss", ranking_loss(scores, RANKS), right, mistakes)
    must(near(ranking_loss(scores, RANKS[2:]), 0.0), "no ordered pair at all: 0, and not 0 / 0")
    absent = scores.masked_fill(RANKS == 0, torch.nan).requires_grad_()
    ranking_loss(absent, RANKS).backward()
    must(
        absent.grad[RANKS > 0].isfinite().all(),
        "the score of an absent response spoils the gradient",
    )


def split_by_prompt(split_held_out):
    """A split that does not leak.

    Several judgements are about one prompt. Split examples into those to train on and those to hold
    out. `held_out_prompts(examples)` is at hand: the first turns that are to be held out.

    Predict: pairs are split at random, and each prompt has four. How honest is the accuracy?

    Answer: nearly every held-out prompt was trained on: the model may know by heart what people
    liked there. The accuracy is too high, and nothing in the run says so.

    Hint: an example's `first_turn` decides on which side it is, never its place in the file.

    Hint: with `val_examples` there is nothing to split: they are the second side as they are.

    Run: python -m pytest tests/test_famous_mistakes.py -k on_both_sides
    """
    examples = [Example([("user", str(i % 50))], f"file:{i}") for i in range(200)]
    train, val = split_held_out(examples, [])
    sides = [{e.first_turn for e in side} for side in (train, val)]
    must(not sides[0] & sides[1], "a prompt is on both sides: split by prompt, and not by row")
    must(len(train) + len(val) == len(examples), "some examples are on no side")
    must(len(val) < len(train), "a tenth is held out, and the rest is trained on: sides swapped?")
    must(sides[1] == split.held_out_prompts(examples), "other prompts are held out than asked for")
    must(sides[1] == {e.first_turn for e in split_held_out(examples[::-1], [])[1]}, "order matters")
    given = split_held_out(examples[:2], examples[2:3])
    must(given == (examples[:2], examples[2:3]), "--val_data: what is given is not to be split")


def fifty_pairs(answer):
    """Judge 50 pairs yourself.

    There is nothing to fill in. `python -m nanorlhf label` samples pairs of answers and asks you on
    a page; with --repeat 0.5 it asks half of the questions twice. Judge 50, then count.

    Predict: how often will you agree with yourself? And with somebody else?

    Answer: InstructGPT's labelers agreed with each other on 72.6 % of pairs; nobody's reward model
    can be much righter about people than people are. `python -m nanorlhf agreement` counts.

    Hint: the ties are where you learn most: what would have decided them?

    Hint: look at the longer answer of each pair: how often did you take it?

    Run: python -m nanorlhf label --repeat 0.5
    """


EXERCISES = [
    Exercise("3.1", who_beats_whom, f.ordered_pairs),
    Exercise("3.2", one_prompt_one_vote, f.ranking_loss),
    Exercise("3.3", split_by_prompt, split.split_held_out),
    Exercise("3.4", fifty_pairs),
]
