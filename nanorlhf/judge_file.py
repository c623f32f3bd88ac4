"""A user's Python function as a judge: what --reward and --gold name as path.py:function.

Shapes: N responses.
"""

import inspect

import torch

from nanorlhf.config import die
from nanorlhf.machine.python_file import load_function, raised


def load_judge(spec, flag, prompts):
    """`path.py:name` -> judge(prompts, texts) -> (N,), by the user's function(prompts, responses).
    Further parameters are filled from the data's columns of the same name, one value for each
    response; **kwargs gets every column. `prompts`: all that it may be asked to judge. Exits 2 if
    one of them lacks a column that has no default."""
    function = load_function(spec, flag)
    names = columns_of(function, f"{flag} {spec}", prompts)

    def judge(prompts, texts):
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        try:
            returned = function([p.text for p in prompts], list(texts), **columns)
            scores = torch.tensor([float(score) for score in returned])
        except (Exception, SystemExit) as error:
            die(f"{flag} {spec} must return a list of floats; {raised(error)}")
        if len(scores) != len(texts) or not scores.isfinite().all():
            die(
                f"{flag} {spec} returned {len(scores)} scores for {len(texts)} responses, "
                f"{int((~scores.isfinite()).sum())} of them not finite"
            )
        return scores

    return judge


def columns_of(function, where, prompts):
    """The names of the data's columns that a function is handed: those of its parameters behind the
    first two, but where a column is missing and has a default; all others where it has **kwargs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # it is not written in Python
        return []
    first = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD][:2]
    further = [p for p in parameters if p.name not in first and p.kind != p.VAR_POSITIONAL]
    known, names = dict.fromkeys(name for p in prompts for name in p.columns), []
    for parameter in further:
        name, is_needed = parameter.name, parameter.default is parameter.empty
        if parameter.kind == parameter.VAR_KEYWORD:
            return [*names, *(column for column in known if column not in (*first, *names))]
        names += [name] if is_needed or name in known else []
        lacking = [p for p in prompts if is_needed and name not in p.columns]
        if lacking:
            columns = ", ".join(map(repr, lacking[0].columns)) or "none"
            die(f"{where} asks for a column {name!r}; those of {lacking[0].source}: {columns}")
    return names
