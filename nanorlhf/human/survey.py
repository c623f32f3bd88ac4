"""Which question a labeler is asked next, and what becomes of the answer."""

import time
from functools import lru_cache

from nanorlhf.human.journal import Refused, in_words, records_of
from nanorlhf.human.questions import tasks_of


class Survey:
    """The questions of one kind, and each labeler's answers to them, once each."""

    def __init__(self, questions, journal, kind, seed=1, repeat=0.0):
        self.journal, self.kind = journal, kind
        asked = [question for question in questions if not question.is_tie]
        self.tasks = lru_cache(32)(lambda labeler: tasks_of(asked, labeler, seed, repeat))
        # equal texts of one model tell nothing
        self.ties = [q for q in questions if q.is_tie and tuple in map(type, q.models)]
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
            self.keep_ties(labeler)
            self.journal.write(labeler, id, [record | notes for record in records])

    def keep_ties(self, labeler):
        """Write the ties that nobody is asked about, as large a share of them as the labeler will
        have answered of the tasks: so win rates are right, too, where somebody ends early."""
        n_tasks = len(self.tasks(labeler))
        n_answered = n_tasks - len(self.todo(labeler)) + 1  # with the one that is being kept
        for tie in self.ties[: len(self.ties) * n_answered // n_tasks]:
            id, (models,) = f"tie-{tie.key[:16]}", tie.models
            if id not in self.journal.ids[labeler]:
                texts, ranks = tie.responses * len(models), [1] * len(models)
                record = {"prompt": tie.prompt, "completions": texts, "ranks": ranks}
                record |= {"models": models, "seed": tie.seed, "skipped": True}
                self.journal.write(labeler, id, [record])

    def undo(self, labeler):
        """Take back a labeler's latest answer; returns its id and what it said, in words."""
        with self.journal.lock:
            # an answer to what is not asked any more stands
            ids = [id for id in self.journal.ids[labeler] if id in self.tasks(labeler)]
            if not ids:
                raise Refused(409, "nothing to take back")
            words = in_words(self.journal.ids[labeler][ids[-1]])
            self.journal.write(labeler, ids[-1], [{"undone": True}])
            return ids[-1], words
