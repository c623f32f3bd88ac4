"""The questions of a Survey in the terminal."""

from nanorlhf.human.journal import Refused

HELP = {
    "comparisons": "the better one: 1 or 2, t for a tie",
    "rankings": "the rank of each reply, 1 for the best, as in 2 1 3",
    "ratings": "stars for each reply, from 0 to 5, as in 4 2",
    "thumbs": "y (like) or n (dislike) for each reply, as in y n",
}


def ask(survey, labeler, guidelines):
    """Ask until nothing is left, or until the labeler leaves."""
    labeler = labeler or read_line("your name: ")
    if guidelines:
        print(guidelines)
    while labeler:
        task, progress = survey.next(labeler)
        if task is None:
            print("nothing is left to judge; thank you")
            return
        print(f"\n==== {progress['answered'] + 1} of {progress['total']}")
        prompt = task.question.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for message in messages:
            print(f"{message['role']}: {message['content']}")
        for i, text in enumerate(task.responses, 1):
            print(f"\n-- reply {i}\n{text}")
        if not answer(survey, labeler, task):
            return


def answer(survey, labeler, task):
    """Ask until there is an answer; False where the labeler leaves."""
    while True:
        words = read_line(f"\n{HELP[survey.kind]}; s skip, u undo, q leave: ")
        if words in (None, "q"):
            return False
        try:
            if words == "u":
                survey.undo(labeler)
            else:
                survey.answer(labeler, task.id, None if words == "s" else parse(survey.kind, words))
            return True
        except Refused as error:
            print(f"({error})")
        except (ValueError, LookupError):
            print(f"({words!r} is no answer)")


def parse(kind, words):
    """What was typed -> an answer as `Survey.answer` takes it; ValueError or LookupError where it
    is none."""
    if kind == "comparisons":
        return {"1": 0, "2": 1, "t": -1}[words]
    value = {"rankings": int, "ratings": float, "thumbs": {"y": True, "n": False}.__getitem__}[kind]
    return [value(word) for word in words.split()]


def read_line(question):
    """A line of the user's; None at the end of input."""
    try:
        return input(question).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
