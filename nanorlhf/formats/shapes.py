"""The shapes in which people publish data -> one record with those of these keys that it has:

messages              [(role, content)], a dialogue; roles are "user" and "assistant"
prompt                [(role, content)], up to the turn that the completions answer
completion            text; a person's `rating` 0..5 or `label` (like / dislike) may be with it
chosen, rejected      text, one better than the other
completions, ranks    lists; 1 is the best
text                  plain text
labeler               who judged
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix

from nanorlhf.config import die

ROLES = {"user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
         "system": "system"}  # fmt: skip


class Misfit(Exception):
    """A record that is not what its columns promise; the message says what is wrong."""


# ---- one value ---------------------------------------------------------------------------------


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


def hh_turns(dialogue):
    """HH-RLHF's "\n\nHuman: ...\n\nAssistant: ..." -> [(role, content)]."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", dialogue)
    return [(ROLES[r.lower()], content.strip()) for r, content in zip(parts[1::2], parts[2::2])]


# ---- one shape each ----------------------------------------------------------------------------


def as_it_is(r):
    found = {k: r[k] for k in ("completions", "ranks", "rating", "label", "text") if k in r}
    if "prompt" in r:
        found["prompt"] = prompt(r)
    if "messages" in r:
        found["messages"] = turns(r["messages"])
    for key in ("completion", "chosen", "rejected"):
        if key in r:
            found[key] = reply(r, key)
    return found | {"labeler": str(r.get("labeler", ""))}


def judged_text(r):
    start, rest = opening(text(r, "text"))
    return {"text": r["text"], "prompt": [("user", start)], "completion": rest, "label": r["label"]}


def renamed(**names):
    return lambda r: as_it_is({**r, **{to: r[was] for to, was in names.items()}})


def hh(r):
    chosen = text(r, "chosen")
    found = {"messages": hh_turns(chosen), "text": chosen.strip()}
    if "rejected" in r:
        turn, rejected = "\n\nAssistant:", text(r, "rejected")
        cut = chosen.rfind(turn, 0, len(commonprefix([chosen, rejected])))
        if cut < 0:
            raise Misfit(f"chosen and rejected share no prompt that ends in {turn!r}")
        found["prompt"] = hh_turns(chosen[:cut])
        found |= {"chosen": chosen[cut + len(turn) :].strip(),
                  "rejected": rejected[cut + len(turn) :].strip()}  # fmt: skip
    return found


def preference_chat(r):
    """Lists of messages; without a list as prompt, what both share is the prompt."""
    chosen, rejected = turns(r["chosen"], "chosen"), turns(r.get("rejected"), "rejected")
    before = chosen[:-1] or prompt(r)
    if (rejected[:-1] or before) != before:
        raise Misfit("chosen and rejected share no prompt")
    if before[-1][0] != "user" or chosen[-1][0] != "assistant":
        raise Misfit("chosen must end with a user turn and the assistant's reply")
    said = {"prompt": before, "chosen": chosen[-1][1], "rejected": rejected[-1][1]}
    return said | {"messages": before + chosen[-1:]}


def instruction(r):
    ask, more = text(r, "instruction"), r.get("input", r.get("context", ""))
    found = {"prompt": ask + "\n\n" + more if isinstance(more, str) and more else ask}
    found["completion"] = r.get("output", r.get("response"))
    return as_it_is(found | {k: r[k] for k in ("chosen", "rejected") if "rejected" in r})


def question(r):
    ask = text(r, "question")
    ask = r["system"] + "\n\n" + ask if isinstance(r.get("system"), str) and r["system"] else ask
    found = {k: r[k] for k in ("chosen", "rejected") if k in r}
    answer = {"completion": r["answer"]} if "answer" in r else {}
    return as_it_is(found | answer | {"prompt": ask})


def tldr(r):
    about, choice = r["info"], r["choice"]
    if not isinstance(about, dict) or choice not in (0, 1) or len(r["summaries"]) != 2:
        raise Misfit("needs an object 'info', two 'summaries' and a 'choice' of 0 or 1")
    lines = [f"{key.upper()}: {prefix}{about[field]}" for key, field, prefix in
             (("subreddit", "subreddit", "r/"), ("title", "title", ""), ("post", "post", ""))
             if about.get(field)]  # fmt: skip
    lines = lines if about.get("post") else [*lines, f"ARTICLE: {text(about, 'article')}"]
    said = [text(summary, "text").strip() for summary in r["summaries"]]
    ask = [("user", "\n\n".join([*lines, "TL;DR:"]))]
    judged = {"chosen": said[choice], "rejected": said[1 - choice]}
    return {"prompt": ask, **judged, "labeler": str(r.get("worker", ""))}


def shp(r):
    said = [text(r, "human_ref_B"), text(r, "human_ref_A")]  # labels is 1 where A is preferred
    if r["labels"] not in (0, 1):
        raise Misfit(f"'labels' must be 0 or 1, found {r['labels']!r}")
    chosen, rejected = said[r["labels"]], said[1 - r["labels"]]
    return {"prompt": prompt(r, "history"), "chosen": chosen, "rejected": rejected}


def scored(r):
    """Answers with a score each: UltraFeedback's and Stack Exchange's. The highest ranks 1."""
    answers, words, points = next(x for x in SCORED if x[0] in r)
    said = [a for a in r[answers] if isinstance(a.get(points), (int, float))]
    ranks = [1 + sum(a[points] > b[points] for a in said) for b in said]
    ask = prompt(r, "instruction" if "instruction" in r else "question")
    return {"prompt": ask, "completions": [text(a, words) for a in said], "ranks": ranks}


SCORED = (("completions", "response", "overall_score"), ("answers", "text", "pm_score"))


def helpsteer(r):
    rating = r["helpfulness"]
    rating = rating * 5 / 4 if isinstance(rating, (int, float)) else rating  # theirs is 0 to 4
    return {"prompt": prompt(r), "completion": text(r, "response"), "rating": rating}


@dataclass
class Shape:
    name: str
    keys: str  # columns that must be there; ones in [] hold lists
    convert: Callable  # record -> record with the keys above

    def fits(self, record):
        return all(
            isinstance(record.get(key.strip("[]")), list) if key[0] == "[" else key in record
            for key in self.keys.split()
        )


SHAPES = (  # the first that fits is taken, so those with more columns stand first
    Shape("TL;DR comparisons", "info [summaries] choice", tldr),
    Shape("SHP", "history human_ref_A human_ref_B labels", shp),
    Shape("scored completions", "instruction [completions]", scored),
    Shape("scored answers", "question [answers]", scored),
    Shape("HelpSteer", "prompt response helpfulness", helpsteer),
    Shape("comparisons of dialogues", "[chosen] rejected", preference_chat),
    Shape("rankings", "prompt completions ranks", as_it_is),
    Shape("Alpaca", "instruction output", instruction),
    Shape("Dolly", "instruction response", instruction),
    Shape("question, comparison", "question chosen rejected", question),
    Shape("comparisons", "prompt chosen", as_it_is),
    Shape("HH-RLHF", "chosen", hh),
    Shape("ratings", "prompt completion rating", as_it_is),
    Shape("likes and dislikes", "prompt completion label", as_it_is),
    Shape("ShareGPT", "conversations", lambda r: {"messages": turns(r["conversations"])}),
    Shape("messages", "messages", as_it_is),
    Shape("prompt, completion", "prompt completion", as_it_is),
    Shape("prompt, response", "prompt response", renamed(completion="response")),
    Shape("question, answer", "question answer", question),
    Shape("prompts", "prompt", as_it_is),
    Shape("judged text", "text label", judged_text),
    Shape("judged text", "review sentiment", lambda r: judged_text(
        {"text": r["review"], "label": r["sentiment"]})),
    Shape("text", "text", lambda r: {"text": text(r, "text")}),
)  # fmt: skip


def recognise(record, source):
    """(Shape, record with the keys at the top of this file); what fits no shape exits 2."""
    shape = next((shape for shape in SHAPES if shape.fits(record)), None)
    if shape is None:
        known = "; ".join(f"{shape.name}: {shape.keys}" for shape in SHAPES)
        found = ", ".join(map(repr, record)) or "none"
        die(f"{source}: columns {found} fit no known shape. Name them, as in --columns "
            f"prompt=my_question completion=my_answer. Known are {known}")  # fmt: skip
    try:
        return shape, shape.convert(record)
    except (Misfit, TypeError, ValueError, LookupError, AttributeError) as error:
        die(f"{source}: read as {shape.name!r}: {error}")
