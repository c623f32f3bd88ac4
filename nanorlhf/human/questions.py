"""What people are asked: sampled responses -> questions, in an order of each labeler's own.

A file of samples has one object a line, {"prompt" or "messages", "responses": [texts], "models":
[who wrote each], "seed"}. How a question looks to a labeler depends on (seed, question, labeler)
alone. So two tabs show the same, and a server that is started again goes on where it stopped.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from itertools import combinations

from nanorlhf.config import die
from nanorlhf.data.files import read_records
from nanorlhf.data.values import Misfit, prompt

KINDS = ("comparisons", "rankings", "ratings", "thumbs")
MOST = 9  # responses at once: ranks are typed, one digit each
LATER = 10  # questions between one and its repetition, at least


@dataclass(frozen=True)
class Question:
    """One prompt with the responses that are judged together."""

    asked: dict  # {"prompt": text} or {"messages": [...]}
    responses: tuple
    models: tuple  # who wrote each; never shown
    seed: int  # of the sampling

    @property
    def prompt(self):
        """What was asked, as a feedback file has it: a text or messages."""
        return next(iter(self.asked.values()))

    @property
    def turns(self):
        return prompt({"prompt": self.prompt})

    @property
    def key(self):
        """The same for the same texts, wherever they stand in a file."""
        return hashlib.sha256(json.dumps([self.asked, self.responses]).encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """A question as one labeler sees it."""

    id: str
    question: Question
    order: tuple  # the responses in the order of display, as indices
    repeat_of: str  # "", or the id under which this labeler was asked before

    def shown(self, what):
        """The question's `responses` or `models` in the order of display."""
        values = getattr(self.question, what)
        return [values[i] for i in self.order]


def read_questions(path, kind):
    """The questions of a file of samples, none of which asks about equal texts."""
    found = {}
    for source, record in read_records([path]):
        asked, responses, models = sample(source, record)
        for group in groups(models, kind):
            together = {}  # equal texts once, as the first one's
            for i in group:
                together.setdefault(responses[i], models[i])
            if len(together) < 2 and kind in ("comparisons", "rankings"):
                continue
            if len(together) > MOST:
                die(f"{source}: {len(together)} responses, and {MOST} can be judged at once")
            wrote = tuple(together.values())
            question = Question(asked, tuple(together), wrote, record.get("seed", 0))
            found[question.key] = question
    return list(found.values()) or die(f"{path}: no two different responses to compare")


def sample(source, record):
    """(what is asked, responses, models) of one record; exits 2 where it is none."""
    key = "messages" if "messages" in record else "prompt"
    responses = record.get("responses")
    try:
        prompt(record, key)
    except Misfit as misfit:
        die(f"{source}: {misfit}")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        die(f"{source}: 'responses' must be a list of texts, as `sample` writes them")
    models = record.get("models", [""] * len(responses))
    if not isinstance(models, list) or len(models) != len(responses):
        die(f"{source}: 'models' must name who wrote each of the {len(responses)} responses")
    return {key: record[key]}, responses, list(map(str, models))


def groups(models, kind):
    """Indices of the responses that are judged together. Comparisons of one model's responses are
    of neighbours, each response once; of several models', of any two models' first responses, their
    second ones, and so on."""
    if kind != "comparisons":
        return [range(len(models))]
    of = [[i for i, m in enumerate(models) if m == name] for name in dict.fromkeys(models)]
    if len(of) == 1:
        return list(zip(of[0][::2], of[0][1::2]))
    return [pair for a, b in combinations(of, 2) for pair in zip(a, b)]


def in_order(questions, labeler, seed, repeat):
    """All that a labeler is asked: every question once, and a share `repeat` of them a second time,
    more than LATER questions later, with the order of the responses drawn anew."""
    placed = []
    draw = lambda q, about: random.Random(f"{about}/{seed}/{q.key}/{labeler}")
    for place, q in enumerate(sorted(questions, key=lambda q: draw(q, "turn").random())):
        first = asked(q, labeler, seed, draw(q, "order"), "")
        placed.append((place, first))
        if draw(q, "repeat").random() < repeat and place + LATER < len(questions):
            again = asked(q, labeler, seed, draw(q, "order again"), first.id)
            placed.append((place + LATER + 0.5, again))
    return [question for _, question in sorted(placed, key=lambda pair: pair[0])]


def asked(question, labeler, seed, rng, repeat_of):
    name = json.dumps([seed, question.key, labeler, repeat_of])
    n = len(question.responses)
    id = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Asked(id, question, tuple(rng.sample(range(n), n)), repeat_of)
