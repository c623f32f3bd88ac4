"""The shapes in which people publish data. From each of them a function makes a record of one
shape, ours, which has those of these keys that it can fill:

    messages              [(role, content)], a dialogue; roles are "user" and "assistant"
    prompt                [(role, content)], up to the turn that the completions answer
    completion            text
    rating, label         what a person said of the completion: 0..5, or like / dislike
    chosen, rejected      text, one better than the other
    completions, ranks    lists; 1 is the best
    text                  plain text
    labeler               who judged

Other columns of a data set are ignored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix

from nanorlhf.config import die
from nanorlhf.data.values import Misfit, marked_turns, opening, prompt, reply, text, turns


def as_it_is(r):
    """The shapes in which our own files are written, whose keys are ours already."""
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
    """A prompt and its completion under other names. A system text goes before the question, and an
    input or context behind it."""
    question = next(key for key in ("instruction", "question", "prompt") if key in r)
    parts = (r.get("system"), text(r, question), r.get("input", r.get("context")))
    found = {"prompt": "\n\n".join(part for part in parts if isinstance(part, str) and part)}
    answer = next((key for key in ("output", "response", "answer") if key in r), None)
    if answer:
        found["completion"] = text(r, answer)
    if "rejected" in r:
        found |= {"chosen": r["chosen"], "rejected": r["rejected"]}
    return as_it_is(found)


def judged_text(r):
    start, rest = opening(text(r, "text"))
    return {"text": r["text"], "prompt": [("user", start)], "completion": rest, "label": r["label"]}


def judged_review(r):
    return judged_text({"text": r["review"], "label": r["sentiment"]})


def plain_text(r):
    """A text; also a dialogue, where it is written as openassistant-guanaco's are."""
    found = {"text": text(r, "text")}
    if found["text"].startswith("### Human:"):
        found["messages"] = marked_turns(found["text"], r"(?<!\s)\s*### (Human|Assistant):")
    return found


def dialogue(r):
    if r.get("conversations") == []:
        return None
    key = "messages" if "messages" in r else "conversations"
    return {"messages": turns(r[key], key)}


def hh(r):
    """Two dialogues that are the same up to the assistant's last turn, each as one text."""
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
    """Two dialogues as lists of messages. The prompt is what they share; where each list holds the
    reply alone, it is the record's own `prompt`."""
    chosen, rejected = turns(r["chosen"], "chosen"), turns(r.get("rejected"), "rejected")
    before = chosen[:-1] or prompt(r)
    if (rejected[:-1] or before) != before:
        raise Misfit("chosen and rejected share no prompt")
    if before[-1][0] != "user" or chosen[-1][0] != "assistant":
        raise Misfit("chosen must end with a user turn and the assistant's reply")
    found = {"prompt": before, "chosen": chosen[-1][1], "rejected": rejected[-1][1]}
    return found | {"messages": before + chosen[-1:]}


def tldr(r):
    """A Reddit post, or an article, as the labelers of arXiv:2009.01325 saw it; one summary, or two
    of which a labeler chose one."""
    about = r.get("info", r)
    fields = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    parts = [start + text(about, key) for start, key in fields if about.get(key)]
    if not about.get("post"):
        parts.append("ARTICLE: " + text(about, "article"))
    found = {"prompt": [("user", "\n\n".join([*parts, "TL;DR:"]))]}
    if "summary" in r:
        return found | {"completion": text(r, "summary").strip()}
    summaries = [text(summary, "text").strip() for summary in r["summaries"]]
    if len(summaries) != 2 or r["choice"] not in (0, 1):
        raise Misfit("needs two 'summaries' and a 'choice' of 0 or 1")
    chosen, rejected = summaries[r["choice"]], summaries[1 - r["choice"]]
    return found | {"chosen": chosen, "rejected": rejected, "labeler": str(r.get("worker", ""))}


def shp(r):
    replies = [text(r, "human_ref_B"), text(r, "human_ref_A")]  # labels is 1 where A is preferred
    if r["labels"] not in (0, 1):
        raise Misfit(f"'labels' must be 0 or 1, found {r['labels']!r}")
    chosen, rejected = replies[r["labels"]], replies[1 - r["labels"]]
    return {"prompt": prompt(r, "history"), "chosen": chosen, "rejected": rejected}


def ultrafeedback(r):
    """Ranked by the mean of the fine-grained ratings. Old copies of the data set have an
    overall_score of 10 where the annotator gave 1."""
    return ranked(prompt(r, "instruction"), r["completions"], "response", "fine-grained_score")


def stack_exchange(r):
    return ranked(prompt(r, "question"), r["answers"], "text", "pm_score")


def ranked(question, answers, text_key, score_key):
    """A ranking of answers by their scores, the highest first; None where fewer than two answers
    have a score."""

    def has_score(answer):
        score = answer.get(score_key)
        is_number = isinstance(score, (int, float))
        return is_number and score == score  # nan is not equal to itself

    judged = [answer for answer in answers if has_score(answer)]
    scores = [answer[score_key] for answer in judged]
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    completions = [text(answer, text_key) for answer in judged]
    if len(ranks) < 2:
        return None
    return {"prompt": question, "completions": completions, "ranks": ranks}


def helpsteer(r):
    """Helpfulness is 0 to 4, a rating 0 to 5. A prompt of several turns has marks between them, and
    none before the first."""
    marks = r"(?<!\s)\s*<extra_id_1>(User|Assistant)\s*"
    before = marked_turns("<extra_id_1>User\n" + text(r, "prompt"), marks)
    rating = r["helpfulness"]
    if isinstance(rating, (int, float)):
        rating = rating * 5 / 4
    return {"prompt": before, "completion": text(r, "response"), "rating": rating}


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
    Shape("judged text", "review sentiment", judged_review),
    Shape("text", "text", plain_text),
)


def recognise(record, source):
    """(the first shape that fits, the record in the keys at the top of this file). The latter is
    None where the publisher left nothing in it to learn from. Exits 2 where no shape fits, or where
    a value is not what its column promises."""
    shape = next((shape for shape in SHAPES if shape.fits(record)), None)
    if shape is None:
        known = "; ".join(f"{shape.name}: {shape.keys}" for shape in SHAPES)
        columns = ", ".join(map(repr, record)) or "none"
        die(
            f"{source}: columns {columns} fit no known shape. Name them, as in --columns "
            f"prompt=my_question completion=my_answer. Known are {known}"
        )
    try:
        return shape, shape.convert(record)
    except (Misfit, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        die(f"{source}: read as {shape.name!r}: {error}")
