"""The questions of a Survey in the terminal."""

from nanorlhf.config import note
from nanorlhf.human.journal import Refused

KINDS = {  # kind -> (what to type, the value of a word)
    "comparisons": ("the better one: 1 or 2, t for a tie", {"1": 0, "2": 1, "t": -1}.__getitem__),
    "rankings": ("the rank of each reply, 1 for the best, as in 2 1 3", int),
    "ratings": ("stars for each reply, from 0 to 5, as in 4 2", float),
    "thumbs": ("y (like) or n (dislike) for each, as in y n", {"y": True, "n": False}.__getitem__),
}


def ask(survey, labeler, guidelines):
    """Ask until nothing is left, or until the labeler leaves; EOFError at the end of input."""
    labeler, words = labeler or input("your name: ").strip(), ""
    note(guidelines)
    while labeler and words != "q":
        task, progress = survey.next(labeler)
        if task is None:
            return print("nothing is left to judge; thank you")
        show(task, progress)
        words = input(f"\n{KINDS[survey.kind][0]}; s skip, u undo, q leave: ").strip()
        try:
            if words == "u":
                note(f"(taken back: {survey.undo(labeler)[1]})")
            elif words != "q":
                survey.answer(labeler, task.id, answer(survey.kind, words))
        except Refused as error:
            print(f"({error})")
        except (ValueError, LookupError):
            print(f"({words!r} is no answer)")


def answer(kind, words):
    """What was typed, as `Survey.answer` takes it; ValueError or LookupError where it is none."""
    _, value = KINDS[kind]
    if words == "s":
        return None
    return value(words) if kind == "comparisons" else [value(word) for word in words.split()]


def show(task, progress):
    print(f"\n==== {progress['answered'] + 1} of {progress['total']}")
    prompt = task.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        note(f"{message['role']}: {message['content']}")
    for i, text in enumerate(task.responses, 1):
        note(f"\n-- reply {i}\n{text}")
