"""Whether the continuation of a film review sounds positive, by words that people rated.

    python examples/make_data.py data --only sentiment
    export LEXICON=data/sentiment/vader_lexicon.txt
    python train_ppo.py --gold examples/sentiment.py:lexicon ...    # to watch it during training
    python -m nanorlhf evaluate --judge examples/sentiment.py:positive ...    # to judge by it
    python examples/sentiment.py --data data/sentiment/rt_polarity.jsonl.gz --reward out_films/rm

The last command asks how far such a judge can be trusted: how often it agrees with people on
held-out reviews, beside the reward model and naive Bayes. The task is that of arXiv:1909.08593. No
stage has seen the lexicon.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass

from nanorlhf.config import arg, from_cli
from nanorlhf.data import dialogue, examples, split
from nanorlhf.judging import interval, reply_ids
from nanorlhf.run import checkpoint
from nanorlhf.scoring import score_responses

NEGATIONS = set("no not never none nothing nor neither without hardly cannot".split())


@dataclass
class Config:
    """How often the lexicon, a reward model and naive Bayes agree with people."""

    data: list[str] = arg([], "reviews with labels, as train_rm.py reads them")
    reward: str = arg("out/rm", "reward model")


def main(cfg):
    model, reward = checkpoint.load_model(cfg.reward, "reward")
    tokenizer = reward.tokenizer
    train, reviews = split.split_held_out(examples.load_feedback(cfg.data)[1], [])
    prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in reviews]
    replies = [reply_ids(tokenizer, e.messages, e.completions[0]) for e in reviews]
    scores = score_responses(model.eval(), tokenizer, prompts, replies)
    guesses = {  # above 0: liked
        "lexicon": lexicon(None, [e.completions[0] for e in reviews]),
        "reward model": (scores * model.score_sd + model.score_mean).tolist(),
        "naive Bayes": naive_bayes(train, reviews),
    }
    for name, guess in guesses.items():  # 0, no opinion, is right half the time
        right = [0.5 if g == 0 else float((g > 0) == e.target[0]) for g, e in zip(guess, reviews)]
        mean, (low, high) = interval(right)
        print(f"{name:12} {mean:.3f} [{low:.3f}, {high:.3f}] of {len(reviews)} held-out reviews")


def lexicon(prompts, responses):
    """VADER's compound in -1..1: s / sqrt(s^2 + 15), where s is the sum of the words' valences. Of
    its rules only negation is kept, which multiplies the valence of the next three words by -0.74.
    Those for emphasis, capitals and "but" are left out."""
    with open(os.environ.get("LEXICON", "vader_lexicon.txt"), encoding="utf-8") as file:
        valence = {word: float(v) for word, v, *_ in (line.split("\t") for line in file)}
    compounds = []
    for words in (text.lower().split() for text in responses):
        negates = [w in NEGATIONS or w.endswith("n't") for w in words]
        signs = [-0.74 if any(negates[max(0, i - 3) : i]) else 1.0 for i in range(len(words))]
        total = sum(sign * valence.get(word, 0.0) for sign, word in zip(signs, words))
        compounds.append(total / math.sqrt(total**2 + 15))
    return compounds


def positive(prompts, responses):
    return [float(compound > 0) for compound in lexicon(prompts, responses)]


def naive_bayes(train, reviews):
    """Log-odds of liking from the words of opening and continuation, counted once per review."""
    words = lambda review: set((review.first_turn + review.completions[0]).split())
    disliked, liked = Counter(), Counter()
    for review in train:
        (liked if review.target[0] == 1 else disliked).update(words(review))
    n_words = len(disliked | liked)
    n_disliked, n_liked = disliked.total() + n_words, liked.total() + n_words
    # with one added to every count
    odds = lambda word: (liked[word] + 1) / n_liked * n_disliked / (disliked[word] + 1)
    log_odds = lambda word: math.log(odds(word))
    return [sum(map(log_odds, words(review))) for review in reviews]


if __name__ == "__main__":
    main(from_cli(Config))
