"""Other people's chat templates. They are programs, in Jinja: they are run, and not recognised.

A template is rendered once for each sequence of roles, with a mark in place of what each turn says.
What then stands between the marks is what the template writes, whatever it does: a date, a default
system text, an empty block of thoughts. Some templates also look into what is said, to trim it or
to leave thoughts out. So what begins or ends in white space, or holds a string that the template
holds, is rendered as it is; where that differs, marks beside the words tell where these went.
"""

import json
import re
from datetime import datetime
from functools import cache, partial
from os.path import commonprefix
from pathlib import Path

from nanorlhf.config import die, reason

OPEN, SHUT = "\U0010fffe", "\U0010ffff"  # noncharacters, which stand in no text: see `clean`
WORDS = " \n aB\r\n\n\n\tÉ  <&> " + 2000 * "a " + "b"  # white space, cases, HTML, a long text
BUILT_IN = {  # the lines of a file are one
    name: "".join(Path(__file__).with_name(f"{name}.jinja").read_text("utf-8").splitlines())
    for name in ("nanorlhf", "chatml")
}
OURS = BUILT_IN["nanorlhf"]


def jinja_of(template):
    """What --template stands for; "" is a folder's own."""
    if template in ("", *BUILT_IN):
        return BUILT_IN.get(template, "")
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        known = ", ".join(BUILT_IN)
        die(f"--template {template}: choose from {known}, or a file in Jinja ({reason(error)})")


def clean(text):
    """Text without what would not be text: lone surrogates and our marks become U+FFFD."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub("[\U000ffffe\U000fffff\U0010fffe\U0010ffff]", "\ufffd", text)


class ChatTemplate:
    """A chat template, compiled."""

    def __init__(self, source, names, date, where):
        """source: in Jinja. names: {"eos_token": its name, ...}, for the template. date: what it
        takes for now, in ISO's form. where: the model, for messages."""
        self.where, self.frame = where, cache(self._frame)
        try:
            self.template, self.strings = compiled(source, date)
        except Exception as error:
            die(f"{where}: its chat template is no Jinja ({reason(error)})")
        self.names = names | {"tools": None, "documents": None, "enable_thinking": False}

    def render(self, roles, contents, answer):
        turns = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        try:
            return self.template.render(messages=turns, add_generation_prompt=answer, **self.names)
        except Exception as error:  # a template is a program, and may fail in any way
            die(f"{self.where}: its chat template refuses the turns {', '.join(roles)}: {error}")

    def _frame(self, roles, answer):
        """(literals, order): what the template writes around the turns of these roles, and the turn
        that stands behind each literal but the last."""
        # with words as a text has them: a template that changes any of these is refused here
        marks = [f"{OPEN}{i}{WORDS}{SHUT}" for i in range(len(roles))]
        pieces = re.split(f"{OPEN}(\\d+){WORDS}{SHUT}", self.render(roles, marks, answer))
        literals, order = pieces[::2], [int(i) for i in pieces[1::2]]
        lost = [role for i, role in enumerate(roles) if order.count(i) != 1]
        if lost or OPEN in "".join(literals):
            what = f"once what the turn of the {lost[0] if lost else roles[0]} says"
            die(f"{self.where}: its chat template does not write {what} in {', '.join(roles)}")
        return literals, order

    def write(self, dialogue, answer=False):
        """A dialogue as pieces of text: [(None, what the template writes), (i, what turn i says),
        ...]. `answer`: up to where the assistant answers."""
        roles, contents = zip(*dialogue)
        literals, order = self.frame(roles, answer)
        pieces = [(None, literals[0])]
        for i, literal in zip(order, literals[1:]):
            pieces += [(i, contents[i]), (None, literal)]
        if all(map(self.is_plain, contents)):
            return pieces
        text = self.render(roles, contents, answer)
        if "".join(piece for _, piece in pieces) == text:
            return pieces
        pieces, end = [], 0  # the template has looked into what is said
        for literal, i in zip(literals, order):
            words = contents[i]
            find = lambda *cuts: self.place(roles, contents, answer, text, i, cuts)
            start = find(0, len(words) - len(words.lstrip()))
            stop = find(len(words), len(words.rstrip()))
            if stop is None and words.strip():
                die(f"{self.where}: its chat template changes what the {roles[i]} says: {words!r}")
            start = behind_literal(literal, text, end) if start in (None, -1) else start
            start = max(start, end)
            stop = max(stop or 0, start)
            pieces += [(None, text[end:start]), (i, text[start:stop])]
            end = stop
        return [*pieces, (None, text[end:])]

    def is_plain(self, words):
        """Whether all that a template can do to what is said is to write it."""
        return words != "" and words == words.strip() and not any(x in words for x in self.strings)

    def place(self, roles, contents, answer, text, i, cuts):
        """Where in the text a mark stands that is put into the words of turn i, at the first of the
        `cuts` where it does not change the text; -1 if it is left out, None if it always does."""
        for cut in cuts:
            marked = list(contents)
            marked[i] = marked[i][:cut] + OPEN + marked[i][cut:]
            marked = self.render(roles, marked, answer)
            if marked.replace(OPEN, "") == text:
                return marked.find(OPEN)
        return None


def behind_literal(literal, text, start):
    """Where as much of a literal ends as stands at text[start:], or behind white space there, which
    is of the turn before."""
    space = len(text) - len(text[start:].lstrip())
    shared = [len(commonprefix([literal, text[at:]])) for at in (start, space)]
    return start + shared[0] if shared[0] >= shared[1] else space + shared[1]


def compiled(source, date):
    """(the template, the strings in it) in the environment that transformers gives a template."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"], **blocks)
    jinja.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = datetime.fromisoformat(date).strftime
    # {% generation %} ... {% endgeneration %} mark an assistant's words, which we find ourselves
    source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", source)
    source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
    strings = {x.value for x in jinja.parse(source).find_all(nodes.Const) if type(x.value) is str}
    return jinja.from_string(source), {x for x in strings if x.strip()}
