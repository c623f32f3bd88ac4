"""Take one value out of a record: a text, a reply, the turns of a dialogue. What is none of these
raises Misfit."""

import re

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


class Misfit(Exception):
    """A record that is not what its columns promise; the message says what is wrong."""


def text(record, key):
    value = record.get(key)
    if not isinstance(value, str):
        raise Misfit(f"needs a string {key!r}; found keys {', '.join(map(repr, record))}")
    return value


def turns(messages, key="messages"):
    """[{"role", "content"}] or ShareGPT's [{"from", "value"}] -> [(role, content)], a role being
    "user" or "assistant". The chat template has no system role, so what the system says goes in
    front of the user's next words."""
    if not isinstance(messages, list) or not messages:
        raise Misfit(f"{key!r} must be a list of messages that is not empty")
    dialogue, system = [], ""
    for message in messages:
        message = message if isinstance(message, dict) else {}
        name = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(content, str):
            raise Misfit(f"a message in {key!r} needs a string 'content'")
        if name not in ROLES:
            raise Misfit(f"role {name!r} in {key!r}; known are {', '.join(ROLES)}")
        role = ROLES[name]
        if role == "system":
            system += content + "\n\n" if content else ""
        elif role == "user":
            dialogue.append((role, system + content))
            system = ""
        else:
            dialogue.append((role, content))
    if not dialogue:
        raise Misfit(f"{key!r} holds nothing but system turns")
    return dialogue


def prompt(record, key="prompt"):
    """A string, or a list of messages that ends with the user's -> [(role, content)]."""
    if not isinstance(record.get(key), list):
        return [("user", text(record, key))]
    dialogue = turns(record[key], key)
    if dialogue[-1][0] != "user":
        raise Misfit("a prompt must end in a user turn")
    return dialogue


def reply(record, key):
    """A string, or a list of messages whose last one is the reply -> the reply's text."""
    if not isinstance(record[key], list):
        return text(record, key)
    _, content = turns(record[key], key)[-1]
    return content


def opening(words):
    """(start, rest) of a text. The start is its first quarter, from 1 to 8 words: the prompt that a
    policy continues in the sentiment task of arXiv:1909.08593."""
    n_words = len(re.findall(r"\S+", words))
    n_start = min(8, max(1, n_words // 4))
    start = re.match(rf"(?:\s*\S+){{0,{n_start}}}", words).group()
    return start, words[len(start) :]


def marked_turns(words, marks=r"(?:^|\n\n)(Human|Assistant):"):
    """A dialogue written as one text -> [(role, content)]. `marks` is a regex with one group, the
    speaker; by default it finds HH-RLHF's marks. What stands before the first mark is dropped."""
    _, *pieces = re.split(marks, words)  # a speaker, what was said, the next speaker, ...
    return [(ROLES[who.lower()], said.strip()) for who, said in zip(pieces[::2], pieces[1::2])]
