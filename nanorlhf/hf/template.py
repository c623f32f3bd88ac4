"""Other people's chat templates. They are programs, in Jinja: they are run, and not recognised.

A template is rendered once for each sequence of roles, with a mark in place of what each turn says.
What then stands between the marks is what the template writes, whatever it does: a date, a default
system text, an empty block of thoughts. Some templates also look into what is said, to trim it or
to leave thoughts out. So what begins or ends in white space, or holds a string that the template
itself holds, is rendered as it is, and with marks beside its words, which tell where these went.
"""

import json
import re
from datetime import datetime
from functools import cache
from os.path import commonprefix
from pathlib import Path

from nanorlhf.config import die, reason

OPEN, SHUT = "\U0010fffe", "\U0010ffff"  # noncharacters, which stand in no text: see `clean`
SIDES = [(a, b) for b in ("outside", "inside") for a in ("outside", "inside", "")]
MARK = re.compile(f"{OPEN}(\\d+)([<>]){SHUT}")
OURS = (
    "{%- set ns = namespace(system='') -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- if message['content'] -%}{%- set ns.system = ns.system + message['content'] + '\\n\\n' -%}"
    "{%- endif -%}{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.system + message['content'] -}}{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('roles are system, user and assistant') -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
BUILT_IN = {"nanorlhf": OURS, "chatml": CHATML}


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
            self.template, self.literals = compiled(source, date)
        except Exception as error:
            die(f"{where}: its chat template is no Jinja ({reason(error)})")
        self.variables = names | {"tools": None, "documents": None, "enable_thinking": False}

    def render(self, roles, contents, answer):
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=answer, **self.variables
            )
        except Exception as error:  # a template is a program, and may fail in any way
            die(f"{self.where}: its chat template refuses the turns {', '.join(roles)}: {error}")

    def _frame(self, roles, answer):
        """(literals, order): what the template writes around the turns of these roles, and the turn
        that stands behind each literal but the last."""
        # with white space, as the words of a text have it: a template may split them there
        marks = [mark(i, "<") + " \n " + mark(i, ">") for i in range(len(roles))]
        text = self.render(roles, marks, answer)
        literals = re.split("|".join(map(re.escape, marks)), text)
        order = [int(i) for i, side in MARK.findall(text) if side == "<"]
        lost = [role for i, role in enumerate(roles) if order.count(i) != 1]
        if lost or len(literals) != len(roles) + 1:
            what = f"once what the turn of the {lost[0] if lost else roles[0]} says"
            die(f"{self.where}: its chat template does not write {what} in {', '.join(roles)}")
        return literals, order

    def write(self, dialogue, answer=False):
        """A dialogue as pieces of text: [(None, what the template writes), (i, what turn i says),
        ...]. `answer`: up to where the assistant answers."""
        roles, contents = zip(*dialogue)
        literals, order = self.frame(roles, answer)
        if all(map(self.is_plain, contents)):
            said = ((i, contents[i]) for i in order)
            pieces = [piece for pair in zip(literals, said) for piece in pair]
            return [p if isinstance(p, tuple) else (None, p) for p in (*pieces, literals[-1])]
        text = self.render(roles, contents, answer)
        find = lambda turns: self.places(dialogue, answer, text, turns)
        place, end, pieces = find(range(len(dialogue))), 0, []
        if place is None:  # no one way suits all turns
            place = {}
            for i, (role, words) in enumerate(dialogue):
                if (own := find([i])) is None and words.strip():
                    die(f"{self.where}: its chat template changes what the {role} says: {words!r}")
                place |= own or {}
        for literal, i in zip(literals, order):
            start = max(end, place.get((i, "<"), behind_literal(literal, text, end)))
            stop = max(start, place.get((i, ">"), start))
            pieces += [(None, text[end:start]), (i, text[start:stop])]
            end = stop
        return [*pieces, (None, text[end:])]

    def places(self, dialogue, answer, text, turns):
        """{(i, side): where in the text turn i begins ("<") and ends (">")}, if it is written at
        all. None where every way to put marks beside what these turns say changes the text."""
        roles, contents = zip(*dialogue)
        for sides in SIDES:
            marked = [beside(i, x, *sides) if i in turns else x for i, x in enumerate(contents)]
            marked = self.render(roles, marked, answer)
            if MARK.sub("", marked) == text:  # else the template has looked at the marks
                ends = ((m[1], m[2], marked[: m.start()]) for m in MARK.finditer(marked))
                return {(int(i), side): len(MARK.sub("", before)) for i, side, before in ends}
        return None

    def is_plain(self, words):
        """Whether no template can do anything to what is said but to write it."""
        return words != "" and words == words.strip() and not any(x in words for x in self.literals)


def mark(i, side):
    return f"{OPEN}{i}{side}{SHUT}"


def beside(i, words, first, last):
    """The words of turn i with a mark before and one behind them: each "outside" of the white space
    around them, or "inside", so that trimming finds it as before. `first` may be ""."""
    core = words.strip()
    before = words[: len(words) - len(words.lstrip())]
    behind = words[len(before) + len(core) :]
    if not core and (first, last) != ("outside", "outside"):
        return words
    left = {"outside": mark(i, "<") + before, "inside": before + mark(i, "<"), "": before}[first]
    right = {"outside": behind + mark(i, ">"), "inside": mark(i, ">") + behind}[last]
    return left + core + right


def behind_literal(literal, text, start):
    """Where as much of a literal ends as stands at text[start:], or behind white space there, which
    is of the turn before."""
    space = len(text) - len(text[start:].lstrip())
    shared = [len(commonprefix([literal, text[at:]])) for at in (start, space)]
    return start + shared[0] if shared[0] >= shared[1] else space + shared[1]


def compiled(source, date):
    """(the template, the strings in it that a text may hold) in the environment that transformers
    gives a template."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}, which marks an assistant's words."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise ValueError(message)

    def to_json(x, ensure_ascii=False, **options):
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    jinja.filters["tojson"] = to_json
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = datetime.fromisoformat(date).strftime
    tree = jinja.parse(source)
    strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return jinja.from_string(source), {s for s in strings if s.strip()}
