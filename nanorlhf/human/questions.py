"""What people are asked: samples become questions, and these a list of tasks for each labeler.

How a question looks to a labeler depends on (seed, question, labeler) alone. So two tabs show the
same, and a server that is started again goes on where it stopped.
"""

import hashlib
import json
import random
from dataclasses import dataclass, replace
from itertools import combinations

from nanorlhf.config import die
from nanorlhf.human.samples import read_samples

MOST = 9  # responses at once: a key for each
LATER = 10  # questions between one and its repetition, at least


@dataclass(frozen=True)
class Question:
    """One prompt with the responses that are judged together. As a labeler sees it, it has an id,
    and the responses are in the order of the page."""

    prompt: str | list  # a text or messages
    responses: tuple
    models: tuple  # who wrote each; never shown
    seed: int  # of the sampling
    id: str = ""
    repeat_of: str = ""  # the id under which this labeler was asked the same before

    @property
    def key(self):
        """The same for the same texts, wherever they stand in a file."""
        return sha256([{"prompt": self.prompt}, self.responses])


def read_questions(path, kind):
    """The questions of a file of samples. Equal texts are not compared: the first one counts."""
    questions = {}
    for sample in read_samples(path):
        for group in groups(sample["models"], kind):
            model_of = {}  # response -> who wrote it
            for i in group:
                model_of.setdefault(sample["responses"][i], sample["models"][i])
            if len(model_of) > MOST:
                die(f"{path}: {len(model_of)} responses, and {MOST} can be judged at once")
            if len(model_of) > 1 or kind in ("ratings", "thumbs"):
                texts, models = tuple(model_of), tuple(model_of.values())
                question = Question(sample["prompt"], texts, models, sample["seed"])
                questions[question.key] = question
    return list(questions.values()) or die(f"{path}: no two different responses to compare")


def groups(models, kind):
    """Indices of the responses that are judged together. Comparisons of one model's responses are
    of neighbours, each response once; of several models', of any two models' first responses, their
    second ones, and so on."""
    if kind != "comparisons":
        return [range(len(models))]
    by_model = [[i for i, m in enumerate(models) if m == name] for name in dict.fromkeys(models)]
    if len(by_model) == 1:
        return list(zip(by_model[0][::2], by_model[0][1::2]))
    return [pair for a, b in combinations(by_model, 2) for pair in zip(a, b)]


def tasks_of(questions, labeler, seed, repeat):
    """{id: Question}, in order, of all that a labeler is asked: every question once, and a share
    `repeat` of them a second time, more than LATER questions later, with the order of the responses
    drawn anew."""

    def rng(question, purpose):
        return random.Random(f"{purpose}/{seed}/{question.key}/{labeler}")

    def task(question, purpose, repeat_of=""):
        id = sha256([seed, question.key, labeler, repeat_of])[:16]
        written = list(zip(question.responses, question.models))
        texts, models = zip(*rng(question, purpose).sample(written, len(written)))
        return replace(question, responses=texts, models=models, id=id, repeat_of=repeat_of)

    tasks = {}  # place -> task
    shuffled = sorted(questions, key=lambda question: rng(question, "turn").random())
    for place, question in enumerate(shuffled):
        tasks[place] = task(question, "order")
        if rng(question, "repeat").random() < repeat and place + LATER < len(questions):
            tasks[place + LATER + 0.5] = task(question, "order again", tasks[place].id)
    return {tasks[place].id: tasks[place] for place in sorted(tasks)}


def sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
