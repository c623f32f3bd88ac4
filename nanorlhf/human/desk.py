"""Between the questions and the journal: who is asked what next, and whether an answer is one."""

import time
from collections import OrderedDict
from functools import lru_cache
from threading import Event

from nanorlhf.human.journal import Refused
from nanorlhf.human.questions import in_order

LABELERS = 1000  # whose time is taken at once


class Desk:
    """Asks the questions of one kind, and keeps each labeler's answer to each of them once."""

    def __init__(self, questions, journal, kind, seed=1, repeat=0.0):
        self.journal, self.kind = journal, kind
        self.since = OrderedDict()  # labeler -> (id, when it was first shown)
        self.is_done = Event()  # somebody has answered everything

        @lru_cache(maxsize=32)
        def asked(labeler):
            return {a.id: a for a in in_order(questions, labeler, seed, repeat)}

        self.asked = asked

    def next(self, labeler):
        """The first question that a labeler has not answered, and how far this one is; the question
        is None where nothing is left."""
        asked, given = self.asked(labeler), set(self.journal.given(labeler))
        found = next((a for a in asked.values() if a.id not in given), None)
        if not found:
            self.is_done.set()
        elif self.since.get(labeler, [None])[0] != found.id:
            self.since[labeler] = found.id, time.monotonic()
            if len(self.since) > LABELERS:
                self.since.popitem(last=False)
        return found, {"answered": len(given & asked.keys()), "total": len(asked)}

    def answer(self, labeler, id, answer):
        """Keep an answer; Refused where it is none, or where there is one already."""
        asked = self.asked(labeler).get(id)
        if asked is None:
            raise Refused(400, f"{labeler} was asked nothing with the id {id}")
        records = self.records(asked, answer)
        with self.journal.lock:
            if id in self.journal.given(labeler):
                raise Refused(409, "answered before; undo takes that answer back")
            shown_id, since = self.since.get(labeler, (None, 0))
            seconds = round(time.monotonic() - since, 1) if shown_id == id else None
            about = {"seed": asked.question.seed, "seconds": seconds}
            about |= {"repeat_of": asked.repeat_of} if asked.repeat_of else {}
            self.journal.write(labeler, id, [record | about for record in records])

    def undo(self, labeler):
        """Take back a labeler's latest answer; returns its id."""
        with self.journal.lock:
            asked = self.asked(labeler)  # only what can be asked again is taken back
            given = [id for id in self.journal.given(labeler) if id in asked]
            if not given:
                raise Refused(409, "nothing to take back")
            self.journal.write(labeler, given[-1], [{"undone": True}])
            return given[-1]

    def records(self, asked, answer):
        """An answer -> the records that say so."""
        n, texts, models = len(asked.order), asked.shown("responses"), asked.shown("models")
        prompt = {"prompt": asked.question.prompt}
        if answer is None:
            return [prompt | {"skipped": True}]
        if self.kind in ("comparisons", "rankings"):
            ranks = ranks_of(answer, n) if self.kind == "rankings" else preferred(answer)
            return [prompt | {"completions": texts, "ranks": ranks, "models": models}]
        check = stars if self.kind == "ratings" else thumb
        if not isinstance(answer, list) or len(answer) != n or not all(map(check, answer)):
            what = "numbers from 0 to 5" if self.kind == "ratings" else "true or false"
            raise Refused(400, f"the answer must be a list of {n}, each {what}")
        key = "rating" if self.kind == "ratings" else "label"
        return [
            prompt | {"completion": text, key: value, "models": [model]}
            for text, value, model in zip(texts, answer, models)
        ]


def preferred(answer):
    """Which of two is better, or -1 for a tie -> their ranks."""
    if type(answer) is not int or answer not in (-1, 0, 1):
        raise Refused(400, "the answer must be 0 or 1, the better response, or -1 for a tie")
    return {-1: [1, 1], 0: [1, 2], 1: [2, 1]}[answer]


def ranks_of(answer, n):
    is_list = isinstance(answer, list) and len(answer) == n
    if not is_list or not all(type(rank) is int and 1 <= rank <= n for rank in answer):
        raise Refused(400, f"the answer must be a list of {n} ranks, 1 for the best, up to {n}")
    return answer


def stars(value):
    return type(value) in (int, float) and 0 <= value <= 5


def thumb(value):
    return isinstance(value, bool)
