"""The questions of a Desk in the terminal."""

from nanorlhf.data.values import as_messages
from nanorlhf.human.journal import Refused

HOW = {
    "comparisons": "the better one: 1 or 2, t for a tie",
    "rankings": "the rank of each reply, 1 for the best, as in 2 1 3",
    "ratings": "stars for each reply, from 0 to 5, as in 4 2",
    "thumbs": "y (like) or n (dislike) for each reply, as in y n",
}


def ask(desk, labeler, guidelines):
    labeler = labeler or said("your name: ")
    if guidelines:
        print(guidelines)
    while labeler:
        asked, progress = desk.next(labeler)
        if asked is None:
            print("nothing is left to judge; thank you")
            return
        print(f"\n==== {progress['answered'] + 1} of {progress['total']}")
        for message in as_messages(asked.question.turns):
            print(f"{message['role']}: {message['content']}")
        for i, text in enumerate(asked.shown("responses"), 1):
            print(f"\n-- reply {i}\n{text}")
        if not judged(desk, labeler, asked):
            return


def judged(desk, labeler, asked):
    """Ask until there is an answer; False where the labeler leaves."""
    while True:
        words = said(f"\n{HOW[desk.kind]}; s skip, u undo, q leave: ")
        if words in (None, "q"):
            return False
        try:
            if words == "u":
                desk.undo(labeler)
            else:
                desk.answer(labeler, asked.id, None if words == "s" else meant(desk.kind, words))
            return True
        except Refused as error:
            print(f"({error})")
        except (ValueError, LookupError):
            print(f"({words!r} is no answer)")


def meant(kind, words):
    """What was typed -> an answer as `Desk.answer` takes it; ValueError where it is none."""
    known = {"comparisons": {"1": 0, "2": 1, "t": -1}, "thumbs": {"y": True, "n": False}}.get(kind)
    answer = [known[word] if known else float(word) for word in words.split()]
    if kind == "rankings":
        answer = [int(rank) for rank in answer]
    if kind == "comparisons":
        (answer,) = answer
    return answer


def said(question):
    """A line of the user's; None at the end of input."""
    try:
        return input(question).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
