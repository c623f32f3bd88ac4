"""A user's Python function as a judge: what --reward, --judge and --gold name as path.py:function.

Shapes: N responses.
"""

import inspect
import math
import os
import signal
import threading
from contextlib import contextmanager

import torch

from nanorlhf.config import Mistake, die
from nanorlhf.machine.python_file import load_function, raised

OURS = ("prompts", "responses", "completions")  # the last two are two names of one thing


def load_judge(spec, flag, prompts, timeout=0.0):
    """`path.py:name` -> judge(prompts, texts) -> (N,) by the user's function, whose parameters are
    filled as `sources_of` says; nan where it returns None, which leaves the response out.
    `prompts`: all that it may be asked to judge. Exits 2 where it is unclear what a parameter is,
    and where the function has not returned after `timeout` seconds; 0: it may take for ever."""
    function = load_function(spec, flag)
    ours, columns, by_place = sources_of(function, f"{flag} {spec}", prompts)

    def called(prompts, texts):
        values = {"prompts": [p.text for p in prompts], "responses": list(texts)}
        given = {name: values[source] for name, source in ours.items()}
        given |= {name: [p.columns.get(name) for p in prompts] for name in columns}
        args = [given.pop(p.name, p.default) for p in by_place]
        return list(function(*args, **given))

    def judge(prompts, texts):
        late = f"{flag} {spec} has not returned after {timeout:g} seconds (--reward_timeout)"
        try:
            with limited(timeout, late):
                returned = called(prompts, texts)
            absent = torch.tensor([score is None for score in returned], dtype=torch.bool)
            scores = torch.tensor([math.nan if s is None else float(s) for s in returned])
        except Mistake:
            raise
        except (Exception, SystemExit) as error:
            die(f"{flag} {spec} must return a list of floats; {raised(error)}")
        wrong = ~scores.isfinite() & ~absent
        if len(scores) != len(texts) or wrong.any():
            n = f"{len(scores)} scores for {len(texts)} responses, {int(wrong.sum())} of them"
            die(f"{flag} {spec} returned {n} not finite; None leaves a response out")
        return scores

    return judge


def sources_of(function, where, prompts):
    """What fills the parameters of a user's function: ({parameter: "prompts" or "responses"}, the
    names of columns, the parameters that have a place and no name).

    Parameters go by name: `prompts`, `responses` or, as in TRL, `completions`, and columns; what
    has a default may be none of these, and **kwargs gets what no other parameter has. Other names
    are understood where they can be nothing else: the first two as prompts and responses, if
    neither is a column and no parameter is one of ours; the first as prompts, if the responses come
    next. What is unclear is refused, and so is a function that reads no response."""
    known = dict.fromkeys(name for p in prompts for name in p.columns)
    names = ", ".join(map(repr, known)) or "none"
    there = f"prompts, responses (or completions), and columns: {names}"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # it is not written in Python
        die(f"{where} does not say what its parameters are; there are {there}")
    own = {p.name: p for p in parameters if p.kind != p.VAR_KEYWORD}
    takes_rest = len(own) < len(parameters)
    needed = [name for name, p in own.items() if p.default is p.empty]
    response = "responses" if "responses" in own else "completions"  # which may be a column's name
    fills = {"prompts": "prompts", response: "responses"}
    ours = {name: source for name, source in fills.items() if name in own}
    first = [name for name in needed if own[name].kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
    strange = [name for name in first[:2] if name not in {*known, *OURS}]
    if not ours and len(strange) == 2:
        ours = dict(zip(strange, OURS))
    elif len(strange) == 1 == len(ours) and first[:2] == [*strange, *ours]:  # (texts, responses)
        ours[strange[0]] = "prompts"
    if takes_rest:
        both, given = dict(zip(OURS, (*OURS[:2], "responses"))), {*ours.values()}
        ours |= {name: source for name, source in both.items() if source not in given}
    columns = [name for name in own if name not in ours and name in (*known, *needed)]
    for name in columns:
        lacking = [p for p in prompts if name in needed and name not in p.columns]
        if lacking or own[name].kind == inspect.Parameter.VAR_POSITIONAL:
            source = lacking[0].source if lacking else "the data"
            die(f"{where} asks for a column {name!r}; of {source} there are {there}")
    if "responses" not in ours.values():
        die(f"{where} reads no response; there are {there}")
    columns += [name for name in known if takes_rest and name not in {*own, *ours}]
    return ours, columns, [p for p in parameters if p.kind == p.POSITIONAL_ONLY]


@contextmanager
def limited(seconds, message):
    """End the program with the message where what is done inside takes longer. By a signal, which
    Windows and all threads but the main one lack; a function with alarms of its own takes it."""
    has_alarms = threading.current_thread() == threading.main_thread() and os.name == "posix"
    if not seconds or not has_alarms:
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: die(message))
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second: `except:` stops one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
