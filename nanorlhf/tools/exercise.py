"""Exercises that check themselves. The answers are yours: each is a file under --folder.

python -m nanorlhf exercise                # which there are
python -m nanorlhf exercise 5.2            # writes a function with a hole; then checks yours
python -m nanorlhf exercise 5.2 --hint 1
"""

from dataclasses import dataclass
from pathlib import Path

from nanorlhf.config import arg, die, note
from nanorlhf.course import chapter1, chapter2, chapter3, chapter4, chapter5, chapter6, chapter7
from nanorlhf.course.exercises import judge
from nanorlhf.machine import durable

CHAPTERS = chapter1, chapter2, chapter3, chapter4, chapter5, chapter6, chapter7
EXERCISES = [exercise for chapter in CHAPTERS for exercise in chapter.EXERCISES]


@dataclass
class Config:
    """List the course's exercises; write the file of one; check what you filled in."""

    IDLE = "solution: hint"
    number: str = arg("", "such as 5.2; default: list them", positional=True)
    folder: str = arg("out/course", "folder of your answers")
    hint: int = arg(0, "show the first hint, or the second", high=2)
    solution: bool = arg(False, "show the function as it is in the source, after an attempt")


def main(cfg):
    if not (cfg.number or cfg.hint or cfg.solution):
        for exercise in EXERCISES:
            path = Path(cfg.folder, f"{exercise.number}.py")
            state = "✓" if path.with_suffix(".solved").exists() else "…" if path.exists() else " "
            print(f"{state} {exercise.number}  {exercise.title}")
        return
    known = {exercise.number: exercise for exercise in EXERCISES}
    exercise = known.get(cfg.number) or die(f"no exercise {cfg.number!r} among {', '.join(known)}")
    path = Path(cfg.folder, f"{exercise.number}.py")
    if cfg.hint:
        print(exercise.parts("Hint")[cfg.hint - 1])
    elif exercise.function is None:
        print(exercise.parts("Answer")[0] if cfg.solution else exercise.question())
    elif cfg.solution:
        if not path.is_file() or path.read_text("utf-8", "replace") == exercise.file():
            die(f"{path}: an attempt first; the solution comes after it")
        note(f"{exercise.imports()}\n\n\n{exercise.source()}")
    elif not path.exists():
        durable.write_text(path, exercise.file())
        print(f"wrote {path}: predict, fill it in, and run this command again")
    else:
        judge(exercise, path)
