"""Our own records: what shapes they have, and how a text, a reply or the turns of a dialogue are
taken out of one. What is none of these raises Misfit.

A turn is (role, content). Roles are "user", "assistant", "system" and "unlearned": an assistant's
turn that carries no loss, since it is empty or its record gives it weight 0.

A record of any shape is read as one with those of these keys that it can fill:

    messages       a dialogue, as turns; of a prompt and replies, with the best of these
    text           plain text
    prompt         turns, up to the one that the completions answer
    completions    replies: text, or turns where one goes on over several
    kind, target   what a person said of them: "rankings" and a rank for each, 1 is the best, equal
                   ranks are a tie; or of one completion "ratings" and 0..5, "thumbs" and like or
                   dislike. A comparison is a ranking of two
    labeler        who judged
"""

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
ASKING = ("user", "system")  # roles that an assistant answers
NUMBERS = {"rating", "better", "score_0", "score_1", "overall_preference"}  # our names
HH_MARKS = r"(?:^|\n\n)(Human|Assistant):"


class Misfit(Exception):
    """A record that is not what its columns promise; the message says what is wrong."""


class LeftOut(Exception):
    """A record that is passed over, and counted under what the message says."""


def unique(pairs):
    """A dict of (name, value) pairs; ValueError where a name is there twice."""
    if len(record := dict(pairs)) < len(pairs):
        raise ValueError(f"{max(record, key=[n for n, _ in pairs].count)!r} twice in {pairs!s:.80}")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=unique)

# ---- turns -------------------------------------------------------------------------------------


def text(record, key):
    value = record.get(key)
    if not isinstance(value, str):
        raise Misfit(f"needs a string {key!r}; found keys {', '.join(map(repr, record))}")
    return value


def turns(messages, key="messages"):
    """[{"role", "content"}] or ShareGPT's [{"from", "value"}] -> turns."""
    if not isinstance(messages, list) or not messages:
        raise Misfit(f"{key!r} must be a list of messages that is not empty")
    if isinstance(messages[0], tuple):  # a shape's rule has made turns of them
        return messages
    dialogue = [turn(message, key) for message in messages]
    if all(role == "system" for role, _ in dialogue):
        raise Misfit(f"{key!r} holds nothing but system turns")
    return [turn for turn in dialogue if turn != ("system", "")]


def turn(message, key):
    if not isinstance(message, dict):
        raise Misfit(f"{key!r} holds {message!r} where a message with 'role' and 'content' belongs")
    name = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts; what is no text, such as an image, has no place here
        content = "\n".join(p if isinstance(p, str) else text(p, "text") for p in content)
    if message.get("tool_calls") or message.get("function_call"):
        name = "a call of a tool"
    if name not in ROLES:
        raise Misfit(f"role {name!r} in {key!r}; known are {', '.join(ROLES)}")
    weights = [w for w in map(message.get, ("weight", "train")) if w is not None] or [1]
    if not isinstance(content, str) or weights[0] not in (0, 1):
        raise Misfit(f"a message in {key!r} needs a string 'content', and its weight is 0 or 1")
    return learned(ROLES[name], content, weights[0])


def learned(role, content, weight=1):
    is_silent = role == "assistant" and (weight == 0 or not content.strip())
    return "unlearned" if is_silent else role, content


def as_messages(dialogue):
    """Turns -> messages of a file that is read as these turns again."""
    fields = {"unlearned": {"role": "assistant", "weight": 0}}  # of the others: the role alone
    return [fields.get(role, {"role": role}) | {"content": words} for role, words in dialogue]


def system_as(speaker, dialogue):
    """The dialogue with each system turn as one of the `speaker`, joined with what this one says
    next. As "user" it is for templates without a system role."""
    joined = []
    for (before, _), (role, content) in zip([("", ""), *dialogue], dialogue):
        if before == "system" and role in ("system", speaker):
            content = f"{joined.pop()[1]}\n\n{content}"
        joined.append((speaker if role == "system" else role, content))
    return joined


def all_said(dialogue):
    """A dialogue as plain text, a line per turn."""
    return "\n".join(content for _, content in system_as("user", dialogue))


def marked_turns(words, marks=HH_MARKS):
    """A dialogue written as one text -> turns. `marks` is a regex with one group, the speaker. What
    stands before the first mark is the system's."""
    preamble, *pieces = re.split(marks, words)  # ..., a speaker, what was said, the next speaker
    said = zip(pieces[::2], pieces[1::2])
    dialogue = [learned(ROLES[speaker.lower()], words.strip()) for speaker, words in said]
    return [("system", preamble.strip()), *dialogue] if preamble.strip() else dialogue


def prompt(record, key="prompt"):
    """A string, which may hold HH-RLHF's marks of turns, or a list of messages that ends with the
    user's -> turns."""
    if isinstance(record.get(key), list):
        dialogue = turns(record[key], key)
    else:
        words = text(record, key)
        asked = re.sub(r"\n\nAssistant:\s*$", "", words)
        is_marked = re.match(r"\s*Human:", words) or asked != words and re.search(HH_MARKS, asked)
        dialogue = marked_turns(asked) if is_marked else [("user", words)]
    if dialogue[-1][0] not in ASKING:
        raise Misfit("a prompt must end in a user turn")
    return dialogue


def reply(value, key):
    """A string, or a list of messages -> the words of a reply; its turns, where there are more."""
    if not isinstance(value, list):
        return text({key: value}, key)
    dialogue = turns(value, key)
    role, words = dialogue[0]
    if role in ASKING:
        raise Misfit(f"{key!r} begins with a user turn")
    return words if len(dialogue) == 1 and (role == "assistant" or not words.strip()) else dialogue


def as_turns(reply):
    """The turns of a `reply`."""
    return [("assistant", reply)] if isinstance(reply, str) else reply


# ---- records -----------------------------------------------------------------------------------


def number(x):
    """The number that a text holds, as in CSV; anything else as it is."""
    with suppress(ValueError):
        return float(x) if isinstance(x, str) else x
    return x


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < math.inf


def standard(r):
    """A record with our columns -> one with the keys that stand at the top."""
    if r.get("messages") == [] or r.get("completions") == []:
        raise LeftOut("records with nothing in them")
    record = {"labeler": str(r.get("labeler", ""))}
    if "text" in r:
        record["text"] = text(r, "text")
        if record["text"].startswith("### Human:"):  # as openassistant-guanaco writes dialogues
            speaker = r"(?<!\s)\s*### (Human|Assistant):"
            record["messages"] = marked_turns(record["text"], speaker)
    if "prompt" in r:
        record |= {"prompt": prompt(r)} | replies(r)
    if "messages" in r:
        record["messages"] = turns(r["messages"])
    elif "completions" in record:
        ranks = record["target"] if record.get("kind") == "rankings" else [1]
        best = record["completions"][ranks.index(min(ranks))]
        record["messages"] = [*record["prompt"], *as_turns(best)]
    return record


def replies(r):
    """What was said to the prompt of a record, and perhaps a judgement of that."""
    if "ranks" in r:
        return ranking(r["completions"], r["ranks"])
    if "rejected" in r:
        return ranking([reply(r[key], key) for key in ("chosen", "rejected")], [1, 2])
    if "completion" not in r:
        return {}
    record = {"completions": [reply(r["completion"], "completion")]}
    for key, kind in (("rating", "ratings"), ("label", "thumbs")):
        if key in r:
            return record | {"kind": kind, "target": [r[key]]}
    return record


def ranking(completions, ranks):
    are_ranks = isinstance(ranks, list) and all(is_number(x) and x == int(x) > 0 for x in ranks)
    if not are_ranks or not isinstance(completions, list) or len(completions) != len(ranks):
        raise Misfit("'completions' must be a list and 'ranks' a whole number for each, 1 the best")
    completions = [reply(completion, "completions") for completion in completions]
    ranks = [min(int(rank), 2**31) for rank in ranks]
    return {"completions": completions, "kind": "rankings", "target": ranks}


def in_context(record, published):
    """The record with what the published one says beside its dialogue in front of this: a system
    text, and earlier rounds of question and answer in a list `history`."""
    columns = filter(published.get, ("system", "system_prompt"))
    before = [("system", text(published, column)) for column in columns]
    said = record.get("prompt") or record.get("messages") or []
    before = [turn for turn in before if turn not in said[:1]]  # some say it twice
    history = published.get("history")
    for question_and_answer in history if isinstance(history, list) else []:  # SHP's is its prompt
        roles = zip(("user", "assistant"), question_and_answer, strict=True)
        before += turns([{"role": role, "content": words} for role, words in roles], "history")
    return record | {key: before + record[key] for key in ("prompt", "messages") if key in record}


@dataclass(frozen=True)
class Shape:
    """Columns that a record must have, and how it is read."""

    name: str
    keys: str  # our names, or ours=theirs; columns in [] hold lists
    rule: Callable | None = None  # the record, also under our names -> a record of ours

    @cached_property
    def columns(self):
        """Our name of each column -> the published one."""
        pairs = [key.strip("[]").partition("=") for key in self.keys.split()]
        return {ours: theirs.strip("[]") or ours for ours, _, theirs in pairs}

    def fits(self, record):
        lists = re.findall(r"\[(\w+)\]", self.keys)
        are_lists = all(isinstance(record.get(name), list) for name in lists)
        return are_lists and set(self.columns.values()) <= record.keys()

    def read(self, published):
        """A record in the keys at the top of this file."""
        record = {ours: published[theirs] for ours, theirs in self.columns.items()}
        record |= {key: number(record[key]) for key in NUMBERS & record.keys()}
        if self.rule:
            record = self.rule(published | record)
        return in_context(standard({"labeler": published.get("labeler", "")} | record), published)


OURS = (
    Shape("rankings", "prompt completions ranks"),
    Shape("comparisons", "prompt chosen rejected"),
    Shape("ratings", "prompt completion rating"),
    Shape("likes and dislikes", "prompt completion label"),
    Shape("messages", "messages"),
    Shape("prompt, completion", "prompt completion"),
    Shape("prompts", "prompt"),
    Shape("text", "text"),
)
# by their columns; without comparisons, whose replies are whole dialogues in other people's files
OF_COLUMNS = {frozenset(s.columns): s for s in OURS if s.name != "comparisons"}
