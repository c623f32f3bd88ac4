"""Take one value out of a record: a text, a reply, the turns of a dialogue. What is none of these
raises Misfit.

A turn is (role, content). Roles are "user", "assistant" and "unlearned": an assistant's turn that
carries no loss, since it is empty or its record gives it weight 0.
"""

import re
from os.path import commonprefix

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
HH_MARKS = r"(?:^|\n\n)(Human|Assistant):"


class Misfit(Exception):
    """A record that is not what its columns promise; the message says what is wrong."""


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
    return spoken(dialogue)


def turn(message, key):
    name = message.get("role", message.get("from"))
    if name in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise Misfit(f"a message in {key!r} calls a tool or answers for one: there is no such role")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "\n".join(text_of_part(part) for part in content)
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


class Words(str):
    """What a user says, with what the system said before it in front. A template with a role for
    the system writes the two apart: `system`, and `own`, which is None where only the system
    speaks."""

    system, own = "", None

    @classmethod
    def behind(cls, system, own=None):
        words = cls("\n\n".join([*system, own] if own is not None else system))
        words.system, words.own = "\n\n".join(system), own
        return words


def spoken(dialogue):
    """Not every template has a system role: what the system says goes in front of the user's next
    words, and is a user turn of its own where the assistant speaks next, or nobody."""
    found, system = [], []
    for role, content in dialogue:
        if role == "system":
            system += [content] if content else []
            continue
        if role == "user" and system:
            content = Words.behind(system, content)
        elif system:
            found.append(("user", Words.behind(system)))
        found.append((role, content))
        system = []
    return found + [("user", Words.behind(system))] * bool(system)


def unspoken(dialogue):
    """The inverse of `spoken`: what the system says in turns of its own."""
    found = []
    for role, content in dialogue:
        if isinstance(content, Words):
            found.append(("system", content.system))
            content = content.own
        found += [] if content is None else [(role, content)]
    return found


def as_messages(dialogue):
    """Turns -> messages of a file that is read as these turns again."""
    silent = {"role": "assistant", "weight": 0}
    return [
        (silent if role == "unlearned" else {"role": role}) | {"content": content}
        for role, content in unspoken(dialogue)
    ]


def in_context(record, dialogue):
    """Turns behind what their record says beside them: a system text, and earlier rounds of
    question and answer in a list `history`."""
    before = [("system", text(record, k)) for k in ("system", "system_prompt") if k in record]
    rounds = record.get("history", [])
    if isinstance(rounds, list):  # SHP's history is its prompt
        for asked, answered in rounds:
            pair = {"role": "user", "content": asked}, {"role": "assistant", "content": answered}
            before += [turn(message, "history") for message in pair]
    return spoken(before + dialogue)


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
    if dialogue[-1][0] != "user":
        raise Misfit("a prompt must end in a user turn")
    return in_context(record, dialogue)


def reply(record, key):
    """A string, or a list of messages -> what `as_reply` makes of them."""
    if not isinstance(record[key], list):
        return text(record, key)
    return as_reply(turns(record[key], key), key)


def as_reply(dialogue, key):
    """Turns that the assistant begins -> its words; the turns, where there are more than one."""
    if dialogue[0][0] == "user":
        raise Misfit(f"{key!r} begins with a user turn")
    role, words = dialogue[0]
    is_text = len(dialogue) == 1 and (role == "assistant" or not words.strip())
    return words if is_text else dialogue


def as_turns(reply):
    """The turns of a reply, see `as_reply`."""
    return [("assistant", reply)] if isinstance(reply, str) else reply


def apart(one, other):
    """Two dialogues that begin alike -> (prompt, a reply, the other reply). The prompt is what they
    share, up to its last user turn."""
    n = len(commonprefix([one[:-1], other[:-1]]))
    while n and one[n - 1][0] != "user":
        n -= 1
    if not n:
        raise Misfit("the two dialogues share no prompt that ends in a user turn")
    return one[:n], as_reply(one[n:], "a reply"), as_reply(other[n:], "a reply")


def marked_turns(words, marks=HH_MARKS):
    """A dialogue written as one text -> turns. `marks` is a regex with one group, the speaker. What
    stands before the first mark is the system's."""
    preamble, *pieces = re.split(marks, words)  # ..., a speaker, what was said, the next speaker
    dialogue = [
        learned(ROLES[who.lower()], said.strip()) for who, said in zip(pieces[::2], pieces[1::2])
    ]
    return spoken([("system", preamble.strip()), *dialogue])
