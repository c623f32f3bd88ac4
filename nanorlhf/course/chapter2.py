"""Chapter 2, demonstrations: which tokens are learned, and that the end is one of them.

Shapes: B responses, T tokens.
"""

import torch

from nanorlhf import sampling
from nanorlhf.course.exercises import Exercise, compare, must
from nanorlhf.tokenizer import Tokenizer, byte_tokenizer


def what_was_said(response_mask):
    """What belongs to a response.

    A sampler fills a rectangle: behind a row's end stands whatever came out. The mask is True on
    what the model said. Saying "that is all" is an action too, and a model may have several ends.

    Predict: the mask ends one token early. What does PPO then learn about stopping?

    Answer: nothing: the action of stopping is in no loss, and its reward goes to the token before.
    trlx and DeepSpeed-Chat shipped this, by making the pad id the eos id.

    Hint: `is_end(responses, ends)` says which tokens are ends; count them with cumsum.

    Hint: a token is in if no end stands before it; the token itself does not count as before.

    Run: python train_ppo.py --mistake eos_masked --out_dir out/eos_masked
    """
    responses = torch.tensor([[5, 9, 9, 4], [5, 5, 5, 5], [9, 5, 9, 9], [5, 8, 9, 5]])
    right = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]) == 1
    is_eos = sampling.is_end(responses, (8, 9))
    mistakes = {
        "the eos itself is masked out: stopping is never learned": is_eos.cumsum(1) == 0,
        "this is True on every eos, also behind the first": right | is_eos,
        "this is True up to the second eos": is_eos.cumsum(1) <= 1,
        "only the eos is left out, and what stands behind it is in": ~is_eos,
        "this is everything: what stands behind the end was not said": right | True,
        "a model may have several ends; here one alone counts": (
            sampling.response_mask(responses, (9,))
        ),
    }
    mask = response_mask(responses, (8, 9))
    is_mask = torch.is_tensor(mask) and mask.dtype == torch.bool
    must(is_mask, "the mask is to be a tensor of bool: True counts")
    compare(f"ends are 8 and 9: the mask for {responses.tolist()}", mask, right, mistakes)


def hunt_for_an_end(dialogue):
    """Hunt: it never stops.

    A model is fine-tuned with this encoding. Its loss is good, it answers well, and it does not
    stop: it goes on until the limit. Find the mistake.

    Predict: the eos is in the text that the model reads. Why is that not enough?

    Answer: reading is not learning. The loss at the position before the eos is what raises its
    probability; without it the eos keeps the probability that pretraining gave it.

    Hint: `is_loss` has one bool for each id: write both down for one short answer.

    Hint: the assistant says its words and one token more.

    Run: python train_sft.py --mistake eos_unlearned --out_dir out/eos_unlearned
    """
    tokenizer = byte_tokenizer()
    turns = [("user", "a"), ("assistant", "bc"), ("user", "d"), ("assistant", "e")]
    ids, is_loss = dialogue(tokenizer, turns)
    right_ids, right = Tokenizer.dialogue(tokenizer, turns)
    ends = [i == tokenizer.eos_id for i in right_ids]
    compare("ids", ids, right_ids, {})
    mistakes = {
        "the eos carries no loss: stopping is never learned": [
            x and not e for x, e in zip(right, ends)
        ],
        "the user's words carry loss": [True] * len(ids),
        "the role token carries loss: nobody but the template says it": (
            [x or i == tokenizer.assistant_id for x, i in zip(right, ids)]
        ),
        "only the last end carries loss": [
            x and (not e or n == len(ids) - 1) for n, (x, e) in enumerate(zip(right, ends))
        ],
    }
    compare("is_loss", is_loss, right, mistakes)
    unlearned = dialogue(tokenizer, [("user", "a"), ("unlearned", "b")])[1]
    must(not any(unlearned), "a turn that is marked unlearned carries loss")


WITH_ITS_END = r'\[role == "assistant"\] \* \(len\(words\) \+ 1\)'
EXERCISES = [
    Exercise("2.1", what_was_said, sampling.response_mask),
    Exercise(
        "2.2",
        hunt_for_an_end,
        Tokenizer.dialogue,
        WITH_ITS_END,
        '[role == "assistant"] * len(words) + [False]',
    ),
]
