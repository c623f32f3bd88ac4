"""Which question a labeler is asked next, and what becomes of the answer."""

import time
from functools import lru_cache, partial
from threading import Event

from nanorlhf.human.journal import Refused
from nanorlhf.human.questions import tasks_of

ANSWERS = {  # kind -> (types of the value for a response, lowest, highest, what an answer must be)
    "comparisons": ([int], 1, 2, "0 or 1, the better response, or -1 for a tie"),
    "rankings": ([int], 1, None, "a list of ranks, 1 for the best"),  # up to how many they are
    "ratings": ([int, float], 0, 5, "a list of numbers from 0 to 5"),
    "thumbs": ([bool], 0, 1, "a list of true and false"),
}
RANKS_OF_TWO = {0: [1, 2], 1: [2, 1], -1: [1, 1]}  # by the better one


class Survey:
    """The questions of one kind, and each labeler's answers to them, once each."""

    def __init__(self, questions, journal, kind, seed=1, repeat=0.0):
        self.journal, self.kind = journal, kind
        tasks_by_id = partial(tasks_of, questions, seed=seed, repeat=repeat)
        self.tasks = lru_cache(maxsize=32)(tasks_by_id)  # of a labeler
        self.shown_at = {}  # (labeler, id) -> when a task was first shown
        self.is_done = Event()  # somebody has answered everything

    def next(self, labeler):
        """The first task that a labeler has not answered, None where nothing is left; and how far
        this labeler is."""
        tasks, answered = self.tasks(labeler), set(self.journal.answered_by(labeler))
        task = next((task for task in tasks.values() if task.id not in answered), None)
        if task:
            self.shown_at.setdefault((labeler, task.id), time.monotonic())
        else:
            self.is_done.set()
        return task, {"answered": len(answered & tasks.keys()), "total": len(tasks)}

    def answer(self, labeler, id, answer):
        """Keep an answer, of which None skips the task. Refused where it is none, or where there is
        one already."""
        task = self.tasks(labeler).get(id)
        if task is None:
            raise Refused(400, f"{labeler} was asked nothing with the id {id}")
        prompt = task.question.prompt
        if answer is None:
            records = [{"prompt": prompt, "skipped": True}]
        else:
            records = records_of(self.kind, prompt, task.responses, task.models, answer)
        with self.journal.lock:
            if id in self.journal.answered_by(labeler):
                raise Refused(409, "answered before; undo takes that answer back")
            since = self.shown_at.pop((labeler, id), None)
            seconds = since and round(time.monotonic() - since, 1)
            notes = {"seed": task.question.seed, "seconds": seconds}
            notes |= {"repeat_of": task.repeat_of} if task.repeat_of else {}
            self.journal.write(labeler, id, [record | notes for record in records])

    def undo(self, labeler):
        """Take back a labeler's latest answer; returns its id."""
        with self.journal.lock:
            tasks = self.tasks(labeler)  # an answer to what is not asked any more stands
            ids = [id for id in self.journal.answered_by(labeler) if id in tasks]
            if not ids:
                raise Refused(409, "nothing to take back")
            self.journal.write(labeler, ids[-1], [{"undone": True}])
            return ids[-1]


def records_of(kind, prompt, responses, models, answer):
    """The feedback records of an answer to responses; Refused where it is no answer."""
    types, low, high, words = ANSWERS[kind]
    values, n = answer, len(responses)
    if kind == "comparisons":
        values = RANKS_OF_TWO.get(answer) if type(answer) is int else None
    is_list = isinstance(values, list) and len(values) == n
    if not is_list or not all(type(x) in types and low <= x <= (high or n) for x in values):
        raise Refused(400, f"the answer must be {words}")
    if kind in ("comparisons", "rankings"):
        return [{"prompt": prompt, "completions": responses, "ranks": values, "models": models}]
    key = "rating" if kind == "ratings" else "label"
    return [
        {"prompt": prompt, "completion": text, key: value, "models": [model]}
        for text, value, model in zip(responses, values, models)
    ]
