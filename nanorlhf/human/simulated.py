"""A labeler of the embedded world who answers a Survey."""

import random

from nanorlhf.config import die
from nanorlhf.data import world
from nanorlhf.human.journal import Refused


def answer_all(survey, labeler, seed):
    """Answer until nothing is left to ask. `labeler`: one of world.PANEL."""
    rng = random.Random(f"{labeler}/{seed}")
    while task := survey.next(labeler)[0]:
        if not isinstance(task.prompt, str):
            die("a simulated labeler judges answers to single prompts, and not in dialogues")
        answer = judge(rng, labeler, survey.kind, task.prompt, task.responses)
        try:
            survey.answer(labeler, task.id, answer)
        except Refused as error:
            die(f"{survey.journal.path}: {error}")


def judge(rng, labeler, kind, prompt, responses):
    if kind in ("comparisons", "rankings"):
        ranks = world.rank(rng, labeler, prompt, responses)
        return ranks.index(1) if kind == "comparisons" else ranks
    value = world.rate if kind == "ratings" else world.likes
    return [value(rng, labeler, prompt, text) for text in responses]
