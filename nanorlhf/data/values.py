"""Our own records: what shapes they have, and how a text, a reply or the turns of a dialogue are
taken out of one. What is none of these raises Misfit.

A turn is (role, content). Roles are "user", "assistant", "system" and "unlearned": an assistant's
turn that carries no loss, since it is empty or its record gives it weight 0.

A record of any shape is read as one with those of these keys that it can fill:

    messages       a dialogue, as turns
    text           plain text
    prompt         turns, up to the one that the completions answer
    completions    replies: text, or turns where one goes on over several
    kind, target   what a person said of them: "rankings" and a rank for each, 1 is the best, equal
                   ranks are a tie; or of one completion "ratings" and 0..5, "thumbs" and like or
                   dislike. A comparison is a ranking of two
    labeler        who judged
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
ASKING = ("user", "system")  # roles that an assistant answers
HH_MARKS = r"(?:^|\n\n)(Human|Assistant):"


class Misfit(Exception):
    """A record that is not what its columns promise; the message says what is wrong."""


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
    dialogue = [turn(m if isinstance(m, dict) else {}, key) for m in messages]
    if all(role == "system" for role, _ in dialogue):
        raise Misfit(f"{key!r} holds nothing but system turns")
    return [turn for turn in dialogue if turn != ("system", "")]


def turn(message, key):
    name = message.get("role", message.get("from"))
    if name in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise Misfit(f"a message in {key!r} calls a tool or answers for one: there is no such role")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "\n".join(map(text_of_part, content))
    if not isinstance(content, str):
        raise Misfit(f"a message in {key!r} needs a string 'content'")
    if name not in ROLES:
        raise Misfit(f"role {name!r} in {key!r}; known are {', '.join(ROLES)}")
    weight = message.get("weight", message.get("train", 1))
    if weight not in (0, 1):
        raise Misfit(f"the weight of a message in {key!r} must be 0 or 1, found {weight!r}")
    return learned(ROLES[name], content, weight)


def text_of_part(part):
    if isinstance(part, str):
        return part
    if part.get("type", "text") not in ("text", "input_text", "output_text"):
        raise Misfit(f"a message holds a part of type {part['type']!r}, and not only text")
    return text(part, "text")


def learned(role, content, weight=1):
    is_silent = role == "assistant" and (weight == 0 or not content.strip())
    return "unlearned" if is_silent else role, content


def as_messages(dialogue):
    """Turns -> messages of a file that is read as these turns again."""
    silent = {"role": "assistant", "weight": 0}
    return [
        (silent if role == "unlearned" else {"role": role}) | {"content": content}
        for role, content in dialogue
    ]


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
    dialogue = [
        learned(ROLES[who.lower()], said.strip()) for who, said in zip(pieces[::2], pieces[1::2])
    ]
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


def reply(record, key):
    """A string, or a list of messages -> what `as_reply` makes of them."""
    if not isinstance(record[key], list):
        return text(record, key)
    return as_reply(turns(record[key], key), key)


def as_reply(dialogue, key):
    """Turns that the assistant begins -> its words; the turns, where there are more than one."""
    role, words = dialogue[0]
    if role in ASKING:
        raise Misfit(f"{key!r} begins with a user turn")
    is_text = len(dialogue) == 1 and (role == "assistant" or not words.strip())
    return words if is_text else dialogue


def as_turns(reply):
    """The turns of a reply, see `as_reply`."""
    return [("assistant", reply)] if isinstance(reply, str) else reply


# ---- the shapes of our own records -------------------------------------------------------------


def as_it_is(r):
    """A prompt with what was said to it, and perhaps a judgement of that."""
    record = {"prompt": prompt(r)}
    if "ranks" in r:
        return record | ranking(r.get("completions"), r["ranks"])
    if {"chosen", "rejected"} <= r.keys():
        return record | pair(reply(r, "chosen"), reply(r, "rejected"))
    said = "completion" if "completion" in r else "chosen"
    if said in r:
        record["completions"] = [reply(r, said)]
    for key, kind in (("rating", "ratings"), ("label", "thumbs")):
        if key in r and said == "completion":
            return record | {"kind": kind, "target": [r[key]]}
    return record


def pair(better, worse):
    return {"completions": [better, worse], "kind": "rankings", "target": [1, 2]}


def ranking(texts, ranks):
    if not isinstance(texts, list) or not isinstance(ranks, list):
        raise Misfit("'completions' and 'ranks' must be lists")
    if len(ranks) != len(texts) or len(ranks) < 2:
        raise Misfit(f"{len(texts)} completions with {len(ranks)} ranks; needs 2 of each")
    if not all(is_number(r) and r == int(r) > 0 for r in ranks):
        raise Misfit("'ranks' must be integers, 1 for the best")
    replies = [reply({"completions": t}, "completions") for t in texts]
    ranks = [min(int(r), 2**31) for r in ranks]
    return {"completions": replies, "kind": "rankings", "target": ranks}


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < math.inf


def dialogue(r, key="messages"):
    return {"messages": turns(r[key], key)}


def plain_text(r):
    """A text; also a dialogue, where it is written as openassistant-guanaco's are."""
    record = {"text": text(r, "text")}
    if record["text"].startswith("### Human:"):
        record["messages"] = marked_turns(record["text"], r"(?<!\s)\s*### (Human|Assistant):")
    return record


@dataclass(frozen=True)
class Shape:
    name: str
    keys: str  # columns that must be there; ones in [] hold lists
    convert: Callable  # record -> record with the keys above; None where there is nothing in it

    def fits(self, record):
        return all(
            isinstance(record.get(key.strip("[]")), list) if key[0] == "[" else key in record
            for key in self.keys.split()
        )


OURS = (
    Shape("rankings", "prompt completions ranks", as_it_is),
    Shape("comparisons", "prompt chosen rejected", as_it_is),
    Shape("ratings", "prompt completion rating", as_it_is),
    Shape("likes and dislikes", "prompt completion label", as_it_is),
    Shape("messages", "messages", dialogue),
    Shape("prompt, completion", "prompt completion", as_it_is),
    Shape("prompts", "prompt", as_it_is),
    Shape("text", "text", plain_text),
)


def our_shape(record):
    """The shape that has just the columns of the record, but for the labeler; None where it is none
    of ours. Lists of `chosen` messages may be whole dialogues."""
    columns = record.keys() - {"labeler"}
    is_ours = lambda shape: columns == set(shape.keys.split())
    return None if isinstance(record.get("chosen"), list) else next(filter(is_ours, OURS), None)
