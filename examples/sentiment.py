"""Judge models that learned to go on with film reviews so that they sound positive.

    python examples/make_data.py data --only sentiment
    export LEXICON=data/sentiment/vader_lexicon.txt
    python examples/sentiment.py --data data/sentiment/rt_polarity.jsonl.gz \
        --models out_films/sft out_films/ppo_0.3 --reward out_films/rm --judge out_films/judge
    python train_ppo.py --gold examples/sentiment.py:lexicon ...   # to watch it during training

The task of arXiv:1909.08593: one sample at temperature 1 from the opening of every held-out review.
Sentiment is counted in the continuation alone, by VADER's lexicon, which people rated and no stage
has seen. KL is to the first model; --judge is a language model that no stage was trained against.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass

import torch

from nanorlhf import functional as f
from nanorlhf.config import arg, from_cli
from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import load_feedback, split_held_out
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import score_responses
from nanorlhf.tools.evaluate import interval, mean_kl

NEGATIONS = set("no not never none nothing nor neither without hardly cannot".split())


@dataclass
class Config:
    """A table of sentiment, KL, text quality and repetition on held-out reviews."""

    data: list[str] = arg([], "reviews with labels, as train_rm.py reads them")
    models: list[str] = arg(["out/sft", "out/ppo"], "checkpoints; the first is KL's reference")
    reward: str = arg("out/rm", "reward model, for the column RM")
    judge: str = arg("out/judge", "language model of reviews, for the column LM loss")
    max_new_tokens: int = arg(48, "length limit of a continuation")
    seed: int = arg(1, "of sampling")


def main(cfg):
    reward_model, found = checkpoint.load_reward_model(cfg.reward)
    tokenizer, judge = found.tokenizer, checkpoint.load_gpt(cfg.judge)[0].eval()
    train, reviews = split_held_out(load_feedback(cfg.data)[1], [])
    is_liked = [e.target[0] == 1 for e in reviews]
    prompts = [dialogue.encode_prompt(tokenizer, e.messages) for e in reviews]
    answers = {"people": [[*tokenizer.encode(e.completions[0]), tokenizer.eos_id] for e in reviews]}
    models = {name: checkpoint.load_gpt(name)[0].eval() for name in cfg.models}
    for name, gpt in models.items():
        answers[name] = sample_responses(gpt, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    score = lambda ids: score_responses(reward_model.eval(), tokenizer, prompts, ids)
    scores = {name: score(ids) for name, ids in answers.items()}

    guesses = {  # above 0: liked
        "lexicon": lexicon(None, [e.completions[0] for e in reviews]),
        "reward model": scores["people"] * reward_model.score_sd + reward_model.score_mean,
        "naive Bayes": naive_bayes(train, reviews),
    }
    for name, guess in guesses.items():  # 0, no opinion, is right half the time
        right = [0.5 if g == 0 else float((g > 0) == liked) for g, liked in zip(guess, is_liked)]
        print(f"{name:12} agrees with people on {shown(right)} of {len(reviews)} held-out reviews")

    columns = "RM     KL LM loss bigrams starts   ends length"
    print(f"\n{'':18} {'positive':^20} {'compound':^20}  {columns}")
    everything = range(len(reviews))
    rows = [(name, name, everything) for name in answers]
    rows += [
        ("people, liked", "people", [i for i in everything if is_liked[i]]),
        ("people, disliked", "people", [i for i in everything if not is_liked[i]]),
    ]
    for title, name, chosen in rows:
        asked, ids = [prompts[i] for i in chosen], [answers[name][i] for i in chosen]
        kl = 0.0
        if name in models:
            kl = mean_kl(models[name], models[cfg.models[0]], tokenizer, asked, ids)
        texts = [tokenizer.decode(row) for row in ids]
        compound = lexicon(None, texts)
        print(
            f"{title:18} {shown([float(c > 0) for c in compound])} {shown(compound)} "
            f"{scores[name][list(chosen)].mean():5.2f} {kl:6.1f} "
            f"{loss(judge, tokenizer, asked, ids):7.2f} "
            f"{different_bigrams(texts):7.3f} "
            f"{len({tuple(text.split()[:4]) for text in texts}) / len(texts):6.3f} "
            f"{sum(tokenizer.eos_id in row for row in ids) / len(ids):6.3f} "
            f"{sum(map(len, ids)) / len(ids):6.1f}"
        )
    for i in range(3):
        print(f"\n{reviews[i].first_turn} ...")
        for name, ids in answers.items():
            print(f"{name:>18} |{tokenizer.decode(ids[i])}")


def different_bigrams(texts):
    """The share of a text's pairs of words that are different ones, averaged over the
    texts of two words or more."""
    words = [text.split() for text in texts]
    bigrams = [list(zip(w, w[1:])) for w in words]
    return sum(len(set(b)) / max(len(b), 1) for b in bigrams) / sum(map(bool, bigrams))


def shown(values):
    mean, (low, high) = interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


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


@torch.no_grad()
def loss(judge, tokenizer, prompts, responses):
    """Nats per token of the responses, their ends included, under a language model."""
    rows = [(p + r, [False] * len(p) + [True] * len(r), "") for p, r in zip(prompts, responses)]
    total = 0.0
    for batch in batches.batches(rows, 128, batches.dialogue_batch, tokenizer.pad_id):
        tokens, weight = batch["tokens"], float(batch["weight"].sum())
        mean = f.lm_loss(judge(tokens[:, :-1]), tokens[:, 1:], batch["mask"][:, 1:])
        total += mean.item() * weight
    return total / sum(map(len, responses))


def naive_bayes(train, reviews):
    """Log-odds of liking from the words of opening and continuation, counted once per review."""

    def words(review):
        return set((review.first_turn + review.completions[0]).split())

    disliked, liked = Counter(), Counter()
    for review in train:
        (liked if review.target[0] == 1 else disliked).update(words(review))
    n_words = len(disliked | liked)
    n_disliked, n_liked = disliked.total() + n_words, liked.total() + n_words

    def log_odds(word):  # with one added to every count
        return math.log((liked[word] + 1) / n_liked * n_disliked / (disliked[word] + 1))

    return [sum(map(log_odds, words(review))) for review in reviews]


if __name__ == "__main__":
    main(from_cli(Config))
