"""Which question a labeler is asked next, and what becomes of the answer."""

import time
from functools import lru_cache

from nanorlhf.human.journal import Refused, records_of
from nanorlhf.human.questions import tasks_of


class Survey:
    """The questions of one kind, and each labeler's answers to them, once each."""

    def __init__(self, questions, journal, kind, seed=1, repeat=0.0):
        self.journal, self.kind = journal, kind
        self.tasks = lru_cache(32)(lambda labeler: tasks_of(questions, labeler, seed, repeat))
        self.shown_at = {}  # (labeler, id) -> when a task was first shown

    def todo(self, labeler):
        """The tasks that a labeler has not answered, in order."""
        answered = self.journal.ids[labeler]
        return [task for id, task in self.tasks(labeler).items() if id not in answered]

    def next(self, labeler):
        """The first task that a labeler has not answered, None where nothing is left; and how far
        this labeler is."""
        todo, total = self.todo(labeler), len(self.tasks(labeler))
        for task in todo[:1]:
            self.shown_at.setdefault((labeler, task.id), time.monotonic())
        return next(iter(todo), None), {"answered": total - len(todo), "total": total}

    def answer(self, labeler, id, answer):
        """Keep an answer, of which None skips the task. Refused where it is none, or where there is
        one already."""
        task = self.tasks(labeler).get(id)
        if task is None:
            raise Refused(400, f"{labeler} was asked nothing with the id {id}")
        records = records_of(self.kind, task.prompt, task.responses, task.models, answer)
        with self.journal.lock:
            if id in self.journal.ids[labeler]:
                raise Refused(409, "answered before; undo takes that answer back")
            since = self.shown_at.pop((labeler, id), None)
            seconds = since and round(time.monotonic() - since, 1)
            notes = {"seed": task.seed, "seconds": seconds}
            notes |= {"repeat_of": task.repeat_of} if task.repeat_of else {}
            self.journal.write(labeler, id, [record | notes for record in records])

    def undo(self, labeler):
        """Take back a labeler's latest answer; returns its id."""
        with self.journal.lock:
            # an answer to what is not asked any more stands
            ids = [id for id in self.journal.ids[labeler] if id in self.tasks(labeler)]
            if not ids:
                raise Refused(409, "nothing to take back")
            self.journal.write(labeler, ids[-1], [{"undone": True}])
            return ids[-1]
