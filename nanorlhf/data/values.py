"""One value of a record: a text, a reply, the turns of a dialogue; Misfit where it is none."""

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
    """[{"role", "content"}] or ShareGPT's [{"from", "value"}] -> [(role, content)]. The template
    has no system role: what the system says goes in front of the user's next words."""
    if not isinstance(messages, list) or not messages:
        raise Misfit(f"{key!r} must be a list of messages that is not empty")
    found, system = [], ""
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(content, str):
            raise Misfit(f"a message in {key!r} needs a string 'content'")
        if role not in ROLES:
            raise Misfit(f"role {role!r} in {key!r}; known are {', '.join(ROLES)}")
        if ROLES[role] == "system":
            system += content + "\n\n" if content else ""
        else:
            found.append((ROLES[role], content if ROLES[role] == "assistant" else system + content))
            system = system if ROLES[role] == "assistant" else ""
    if not found:
        raise Misfit(f"{key!r} holds nothing but system turns")
    return found


def prompt(record, key="prompt"):
    """A string or a dialogue that ends with the user."""
    if not isinstance(record.get(key), list):
        return [("user", text(record, key))]
    found = turns(record[key], key)
    if found[-1][0] != "user":
        raise Misfit("a prompt must end in a user turn")
    return found


def reply(record, key):
    """A string, or a list of messages whose last one is the reply."""
    return turns(record[key], key)[-1][1] if isinstance(record[key], list) else text(record, key)


def opening(words):
    """(the first quarter of a text, at most 8 words; the rest): what sentiment models go on with,
    as in arXiv:1909.08593."""
    n = len(re.findall(r"\S+", words))
    start = re.match(rf"(?:\s*\S+){{0,{min(8, max(1, n // 4))}}}", words).group()
    return start, words[len(start) :]


def marked_turns(words, marks=r"(?:^|\n\n)(Human|Assistant):"):
    """A dialogue written as one text, by default HH-RLHF's, -> [(role, content)]."""
    parts = re.split(marks, words)
    return [(ROLES[r.lower()], content.strip()) for r, content in zip(parts[1::2], parts[2::2])]
