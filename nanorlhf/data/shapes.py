"""The shapes in which people publish data -> one record with those of these keys that it has:

    messages              [(role, content)], a dialogue; roles are "user" and "assistant"
    prompt                [(role, content)], up to the turn that the completions answer
    completion            text; a person's `rating` 0..5 or `label` (like / dislike) may be with it
    chosen, rejected      text, one better than the other
    completions, ranks    lists; 1 is the best
    text                  plain text
    labeler               who judged

What a data set holds beside these is not looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix

from nanorlhf.config import die
from nanorlhf.data.values import Misfit, marked_turns, opening, prompt, reply, text, turns


def as_it_is(r):
    found = {k: r[k] for k in ("rating", "label") if k in r}
    if "ranks" in r:
        found |= rankings(r.get("completions"), r["ranks"])
    if "prompt" in r:
        found["prompt"] = prompt(r)
    for key in ("completion", "chosen", "rejected"):
        if key in r:
            found[key] = reply(r, key)
    return found | {"labeler": str(r.get("labeler", ""))}


def rankings(texts, ranks):
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise Misfit("'completions' must be a list of strings")
    if not isinstance(ranks, list) or not all(type(r) is int and 0 < r < 2**31 for r in ranks):
        raise Misfit("'ranks' must be a list of integers, 1 for the best")
    if len(ranks) != len(texts) or len(ranks) < 2:
        raise Misfit(f"{len(texts)} completions with {len(ranks)} ranks; needs 2 of each")
    return {"completions": texts, "ranks": ranks}


def renamed(r):
    """prompt and completion under other names; what there is beside the question goes with it."""
    ask = next(key for key in ("instruction", "question", "prompt") if key in r)
    parts = (r.get("system"), text(r, ask), r.get("input", r.get("context")))
    found = {"prompt": "\n\n".join(part for part in parts if isinstance(part, str) and part)}
    answer = next((key for key in ("output", "response", "answer") if key in r), None)
    found |= {"completion": text(r, answer)} if answer else {}
    return as_it_is(found | {key: r[key] for key in ("chosen", "rejected") if "rejected" in r})


def judged_text(r):
    start, rest = opening(text(r, "text"))
    return {"text": r["text"], "prompt": [("user", start)], "completion": rest, "label": r["label"]}


def plain_text(r):
    """Text; in openassistant-guanaco's way of writing it, a dialogue."""
    is_dialogue = text(r, "text").startswith("### Human:")
    turns_of = lambda words: marked_turns(words, r"(?<!\s)\s*### (Human|Assistant):")
    return {"text": r["text"]} | ({"messages": turns_of(r["text"])} if is_dialogue else {})


def dialogue(r):
    key = "messages" if "messages" in r else "conversations"
    return None if r.get("conversations") == [] else {"messages": turns(r[key], key)}


def hh(r):
    chosen = text(r, "chosen")
    found = {"messages": marked_turns(chosen), "text": chosen.strip()}
    if "rejected" in r:
        turn, rejected = "\n\nAssistant:", text(r, "rejected")
        cut = chosen.rfind(turn, 0, len(commonprefix([chosen, rejected])))
        if cut < 0:
            raise Misfit(f"chosen and rejected share no prompt that ends in {turn!r}")
        found["prompt"] = marked_turns(chosen[:cut])
        found |= {
            "chosen": chosen[cut + len(turn) :].strip(),
            "rejected": rejected[cut + len(turn) :].strip(),
        }
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


def tldr(r):
    """A Reddit post, or an article, as OpenAI put it to the labelers (arXiv:2009.01325)."""
    about = r.get("info", r)
    fields = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    parts = [start + text(about, key) for start, key in fields if about.get(key)]
    parts = parts if about.get("post") else [*parts, "ARTICLE: " + text(about, "article")]
    found = {"prompt": [("user", "\n\n".join([*parts, "TL;DR:"]))]}
    if "summary" in r:
        return found | {"completion": text(r, "summary").strip()}
    said = [text(summary, "text").strip() for summary in r["summaries"]]
    if len(said) != 2 or r["choice"] not in (0, 1):
        raise Misfit("needs two 'summaries' and a 'choice' of 0 or 1")
    chosen, rejected = said[r["choice"]], said[1 - r["choice"]]
    return found | {"chosen": chosen, "rejected": rejected, "labeler": str(r.get("worker", ""))}


def shp(r):
    said = [text(r, "human_ref_B"), text(r, "human_ref_A")]  # labels is 1 where A is preferred
    if r["labels"] not in (0, 1):
        raise Misfit(f"'labels' must be 0 or 1, found {r['labels']!r}")
    chosen, rejected = said[r["labels"]], said[1 - r["labels"]]
    return {"prompt": prompt(r, "history"), "chosen": chosen, "rejected": rejected}


def ultrafeedback(r):
    """By the mean of the fine-grained ratings: overall_score has 10 for 1 in old copies."""
    return ranked(prompt(r, "instruction"), r["completions"], "response", "fine-grained_score")


def stack_exchange(r):
    return ranked(prompt(r, "question"), r["answers"], "text", "pm_score")


def ranked(ask, answers, words, points):
    """Answers with a score each, the highest ranks 1; None where fewer than two have one."""
    judged = [
        a for a in answers if isinstance(a.get(points), (int, float)) and a[points] == a[points]
    ]
    ranks = [1 + sum(a[points] > b[points] for a in judged) for b in judged]
    completions = [text(a, words) for a in judged]
    return {"prompt": ask, "completions": completions, "ranks": ranks} if len(ranks) > 1 else None


def helpsteer(r):
    """helpfulness is 0 to 4; prompts of several turns have a mark between them."""
    marks = r"(?<!\s)\s*<extra_id_1>(User|Assistant)\s*"
    ask = marked_turns("<extra_id_1>User\n" + text(r, "prompt"), marks)
    rating = r["helpfulness"]
    rating = rating * 5 / 4 if isinstance(rating, (int, float)) else rating
    return {"prompt": ask, "completion": text(r, "response"), "rating": rating}


@dataclass(frozen=True)
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
    Shape("TL;DR", "subreddit post summary", tldr),
    Shape("SHP", "history human_ref_A human_ref_B labels", shp),
    Shape("UltraFeedback", "instruction [completions]", ultrafeedback),
    Shape("Stack Exchange", "question [answers]", stack_exchange),
    Shape("HelpSteer", "prompt response helpfulness", helpsteer),
    Shape("comparisons of dialogues", "[chosen] rejected", preference_chat),
    Shape("rankings", "prompt completions ranks", as_it_is),
    Shape("Alpaca", "instruction output", renamed),
    Shape("Dolly", "instruction response", renamed),
    Shape("comparisons", "instruction chosen rejected", renamed),
    Shape("comparisons", "question chosen rejected", renamed),
    Shape("comparisons", "prompt chosen", as_it_is),
    Shape("HH-RLHF", "chosen", hh),
    Shape("ratings", "prompt completion rating", as_it_is),
    Shape("likes and dislikes", "prompt completion label", as_it_is),
    Shape("ShareGPT", "conversations", dialogue),
    Shape("messages", "messages", dialogue),
    Shape("prompt, completion", "prompt completion", as_it_is),
    Shape("prompt, completion", "prompt response", renamed),
    Shape("prompt, completion", "question answer", renamed),
    Shape("prompts", "prompt", as_it_is),
    Shape("judged text", "text label", judged_text),
    Shape(
        "judged text",
        "review sentiment",
        lambda r: judged_text({"text": r["review"], "label": r["sentiment"]}),
    ),
    Shape("text", "text", plain_text),
)


def recognise(record, source):
    """(Shape, record with the keys at the top of this file, None where the publisher left nothing
    to learn from in it); what fits no shape exits 2."""
    shape = next((shape for shape in SHAPES if shape.fits(record)), None)
    if shape is None:
        known = "; ".join(f"{shape.name}: {shape.keys}" for shape in SHAPES)
        found = ", ".join(map(repr, record)) or "none"
        die(
            f"{source}: columns {found} fit no known shape. Name them, as in --columns "
            f"prompt=my_question completion=my_answer. Known are {known}"
        )
    try:
        return shape, shape.convert(record)
    except (Misfit, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        die(f"{source}: read as {shape.name!r}: {error}")
