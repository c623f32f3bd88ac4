"""What people are asked: samples become questions, and these a list of tasks for each labeler.

How a question looks to a labeler depends on (seed, question, labeler) alone, and its id on the
last two. So two tabs show the same, and a server that is started again goes on where it stopped.
"""

import hashlib
import json
import random
from dataclasses import dataclass, replace
from itertools import combinations

from nanorlhf.config import die, note
from nanorlhf.human.journal import KINDS
from nanorlhf.human.samples import read_samples

MOST = 9  # responses at once: a key for each
LATER = 10  # questions between one and its repetition, at least; of the last ones, all that follow


@dataclass(frozen=True)
class Question:
    """One prompt with the responses that are judged together. As a labeler sees it, it has an id,
    and the responses are in the order of the page."""

    prompt: str | list  # a text or messages
    responses: tuple
    models: tuple  # who wrote each: a name, or several where they wrote the same; never shown
    seed: int  # of the sampling
    kind: str = "comparisons"
    id: str = ""
    repeat_of: str = ""  # the id under which this labeler was asked the same before

    @property
    def is_tie(self):
        return len(self.responses) < 2 and KINDS[self.kind][0] == "ranks"

    @property
    def key(self):
        """The same for the same texts, wherever they stand in a file."""
        return sha256([{"prompt": self.prompt}, self.responses])


def read_questions(path, kind):
    """The questions of a file of samples. Equal texts are shown once, as the text of all models
    that wrote them. Where that leaves one text alone, there is nothing to ask: models tie."""
    questions = {}
    for sample in read_samples(path):
        for group in groups(sample["models"], kind):
            written = [(sample["responses"][i], sample["models"][i]) for i in group]
            texts = tuple(dict(written))
            if len(texts) > MOST:
                die(f"{path}: {len(texts)} responses, and {MOST} can be judged at once")
            question = Question(sample["prompt"], texts, (), sample["seed"], kind)
            question, names = questions.setdefault(question.key, (question, {}))
            names.update(dict.fromkeys(written))  # each (text, who wrote it) once
    questions = [credited(question, names) for question, names in questions.values()]
    n, n_ties = len(questions), sum(question.is_tie for question in questions)
    if n == n_ties:
        die(f"{path}: no two different responses to compare")
    if n_ties:
        note(f"{path}: {n_ties} of {n} {kind} are of equal texts: models tie, and nobody is asked")
    return questions


def credited(question, written):
    """The question with the names of all who wrote each response. written: (response, name)."""
    names = [tuple(n for text, n in written if text == mine) for mine in question.responses]
    return replace(question, models=tuple(n[0] if len(n) == 1 else n for n in names))


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
    `repeat` of them a second time, more than LATER questions later, or after all others where not
    so many follow, with the order of the responses drawn anew."""

    def rng(question, purpose):
        return random.Random(f"{purpose}/{seed}/{question.key}/{labeler}")

    def task(question, purpose, repeat_of=""):
        id = sha256([question.key, labeler, repeat_of])[:16]  # so no seed asks anything again
        written = list(zip(question.responses, question.models))
        texts, models = zip(*rng(question, purpose).sample(written, len(written)))
        return replace(question, responses=texts, models=models, id=id, repeat_of=repeat_of)

    tasks = {}  # place -> task
    shuffled = sorted(questions, key=lambda question: rng(question, "turn").random())
    for place, question in enumerate(shuffled):
        tasks[place] = task(question, "order")
        if rng(question, "repeat").random() < repeat:
            tasks[place + LATER + 0.5] = task(question, "order again", tasks[place].id)
    return {tasks[place].id: tasks[place] for place in sorted(tasks)}


def sha256(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
