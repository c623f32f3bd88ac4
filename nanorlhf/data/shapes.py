"""The shapes in which people publish data. From each of them a function makes a record of one
shape, ours, which has those of these keys that it can fill:

    messages              a dialogue, as turns (see values.py)
    prompt                turns, up to the one that the completions answer
    completion            a reply: text, or turns where it goes on over several
    rating, label         what a person said of the completion: 0..5, or like / dislike
    chosen, rejected      replies, one better than the other
    completions, ranks    lists; 1 is the best, equal ranks are a tie
    text                  plain text
    labeler               who judged
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from nanorlhf.config import die
from nanorlhf.data.values import Misfit, apart, in_context, marked_turns, prompt, reply, text, turns

TREE = {"message_id", "message_tree_id", "role", "text"}  # a message of OpenAssistant's
BESIDE = ("system", "system_prompt", "history", "rating", "label", "chosen", "rejected")


def as_it_is(r):
    """The shapes in which our own files are written, whose keys are ours already."""
    found = {k: r[k] for k in ("rating", "label") if k in r}
    if "ranks" in r:
        found |= rankings(r.get("completions"), r["ranks"])
    if "prompt" in r:
        found["prompt"] = prompt(r)
    return found | {k: reply(r, k) for k in ("completion", "chosen", "rejected") if k in r}


def rankings(texts, ranks):
    if not isinstance(texts, list) or not isinstance(ranks, list):
        raise Misfit("'completions' and 'ranks' must be lists")
    if len(ranks) != len(texts) or len(ranks) < 2:
        raise Misfit(f"{len(texts)} completions with {len(ranks)} ranks; needs 2 of each")
    if not all(is_number(r) and r == int(r) > 0 for r in ranks):
        raise Misfit("'ranks' must be integers, 1 for the best")
    replies = [reply({"completions": t}, "completions") for t in texts]
    return {"completions": replies, "ranks": [min(int(r), 2**31) for r in ranks]}


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < math.inf


def renamed(r):
    """A prompt and its completion under other names. An input or context goes behind the
    question."""
    question = next(key for key in ("instruction", "question", "prompt") if key in r)
    about = r.get("input", r.get("context", ""))
    if not isinstance(about, str) and not is_number(about):
        raise Misfit(f"what is asked about must be text or a number, found {about!r}")
    if about == "":
        found = {"prompt": r[question]}
    else:
        found = {"prompt": "\n\n".join(filter(None, (text(r, question), str(about))))}
    answer = next((key for key in ("output", "response", "answer") if key in r), None)
    if answer:
        found["completion"] = r[answer]
    return as_it_is(found | {key: r[key] for key in BESIDE if key in r})


def beavertails(r):
    return renamed(r) | {"label": r["is_safe"]}


def opening(words):
    """(start, rest) of a text. The start is its first quarter, from 1 to 8 words: the prompt that a
    policy continues in the sentiment task of arXiv:1909.08593."""
    n_words = len(re.findall(r"\S+", words))
    n_start = min(8, max(1, n_words // 4))
    start = re.match(rf"(?:\s*\S+){{0,{n_start}}}", words).group()
    return start, words[len(start) :]


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
    key = next(key for key in ("messages", "conversations", "conversation") if key in r)
    return {"messages": in_context(r, turns(r[key], key))}


def hh(r):
    """Two dialogues that are the same up to the assistant's last turn, each as one text."""
    chosen = text(r, "chosen")
    found = {"messages": marked_turns(chosen), "text": chosen.strip()}
    if "rejected" in r:
        found |= better_dialogue(found["messages"], marked_turns(text(r, "rejected")))
    return found


def preference_chat(r):
    """Two dialogues as lists of messages, or two replies that go on from the `prompt`."""
    chosen, rejected = turns(r["chosen"], "chosen"), turns(r.get("rejected"), "rejected")
    if chosen[0][0] != "user" and "prompt" in r:
        before = prompt(r)
        return better_dialogue(before + chosen, before + rejected)
    return better_dialogue(in_context(r, chosen), in_context(r, rejected))


def better_dialogue(chosen, rejected):
    asked, better, worse = apart(chosen, rejected)
    return {"prompt": asked, "chosen": better, "rejected": worse, "messages": chosen}


def openai_pairs(r):
    asked = r["input"]
    if asked.get("tools"):
        raise Misfit("the replies may call tools: there is no such role")
    chosen, rejected = reply(r, "preferred_output"), reply(r, "non_preferred_output")
    return {"prompt": prompt(asked, "messages"), "chosen": chosen, "rejected": rejected}


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
    return found | better_of(r, "choice", *summaries) | {"labeler": str(r.get("worker", ""))}


def better_of(r, key, *replies):
    """Two replies, of which a column has the index of the better one."""
    if r[key] not in (0, 1) or len(replies) != 2:
        raise Misfit(f"{key!r} must be 0 or 1, of two replies; found {r[key]!r} of {len(replies)}")
    return {"chosen": replies[int(r[key])], "rejected": replies[1 - int(r[key])]}


def shp(r):
    """`labels` is 1 where A is preferred."""
    replies = text(r, "human_ref_B"), text(r, "human_ref_A")
    return {"prompt": prompt(r, "history")} | better_of(r, "labels", *replies)


def ultrafeedback(r):
    """Ranked by the mean of the fine-grained ratings. Old copies of the data set have an
    overall_score of 10 where the annotator gave 1."""
    return ranked(prompt(r, "instruction"), r["completions"], "response", "fine-grained_score")


def stack_exchange(r):
    return ranked(prompt(r, "question"), r["answers"], "text", "pm_score")


def ranked_answers(r):
    return ranked(prompt(r), r["answers"], "answer", "rank", highest_first=False)


def ranked(asked, answers, text_key, score_key, highest_first=True):
    """A ranking of those answers that have a score; of one alone also without."""
    sign = 1 if highest_first else -1
    judged = [answer for answer in answers if is_number(answer.get(score_key))]
    if len(answers) == 1:
        return scored(asked, [text(answers[0], text_key)], [0])
    scores = [sign * answer[score_key] for answer in judged]
    return scored(asked, [text(answer, text_key) for answer in judged], scores)


def scored(asked, completions, scores):
    """A ranking by scores, the highest first. None where there is nothing to rank."""
    if not all(map(is_number, scores)):
        raise Misfit(f"scores must be numbers, found {scores}")
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    return {"prompt": asked, "completions": completions, "ranks": ranks} if ranks else None


def arena(r):
    """What one user asked of two models, and whose conversation the user liked better."""
    scores = {"model_a": [1, 0], "model_b": [0, 1]}
    scores |= dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), [0, 0])
    if r["winner"] not in scores:
        raise Misfit(f"'winner' must be one of {', '.join(scores)}, found {r['winner']!r}")
    talks = [in_context(r, turns(r[key], key)) for key in ("conversation_a", "conversation_b")]
    asked, *replies = apart(*talks)
    return scored(asked, replies, scores[r["winner"]]) | {"labeler": str(r.get("judge", ""))}


def helpsteer3(r):
    """The preference is from -3, the first is much better, to 3, the second is; 0 is a tie."""
    asked, score = prompt(r, "context"), r["overall_preference"]
    return scored(asked, [text(r, "response1"), text(r, "response2")], [-score, score])


def webgpt(r):
    asked, replies = prompt(r["question"], "full_text"), [text(r, "answer_0"), text(r, "answer_1")]
    return scored(asked, replies, [r["score_0"], r["score_1"]])


def pku_saferlhf(r):
    """Judged by how helpful a reply is. Which is safer is a judgement of its own."""
    replies = text(r, "response_0"), text(r, "response_1")
    return {"prompt": prompt(r)} | better_of(r, "better_response_id", *replies)


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
    Shape("Chatbot Arena", "conversation_a conversation_b winner", arena),
    Shape("HelpSteer3", "context response1 response2 overall_preference", helpsteer3),
    Shape("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id", pku_saferlhf),
    Shape("WebGPT", "question answer_0 answer_1 score_0 score_1", webgpt),
    Shape("OpenAI preferences", "input [preferred_output] [non_preferred_output]", openai_pairs),
    Shape("OpenAssistant, Nectar", "prompt [answers]", ranked_answers),
    Shape("UltraFeedback", "instruction [completions]", ultrafeedback),
    Shape("Stack Exchange", "question [answers]", stack_exchange),
    Shape("HelpSteer", "prompt response helpfulness", helpsteer),
    Shape("BeaverTails", "prompt response is_safe", beavertails),
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
    Shape("WildChat, LMSYS-Chat", "conversation", dialogue),
    Shape("prompt, completion", "prompt completion", as_it_is),
    Shape("prompt, completion", "prompt response", renamed),
    Shape("prompt, completion", "question answer", renamed),
    Shape("prompts", "prompt", as_it_is),
    Shape("judged text", "text label", judged_text),
    Shape("judged text", "review sentiment", judged_review),
    Shape("text", "text", plain_text),
)


class Watched(dict):
    """A record that notes which of its columns are there and which are read, also those of records
    inside it: "answers[].rank"."""

    def __init__(self, record, there, read, path=""):
        super().__init__(record)
        self.there, self.read, self.path = there, read, path
        there.update(path + str(key) for key in record)

    def __getitem__(self, key):
        self.read.add(self.path + str(key))
        return self.watched(super().__getitem__(key), self.path + str(key))

    def get(self, key, default=None):
        return self[key] if key in self else default

    def watched(self, value, path):
        if isinstance(value, dict):
            return Watched(value, self.there, self.read, path + ".")
        if isinstance(value, list):
            return [self.watched(item, path + "[]") for item in value]
        return value


class Unknown(Misfit):
    """A record that fits no shape."""


def recognise(record, columns=()):
    """(the shape that fits, the record in the keys at the top of this file, the set of columns that
    were not used). The record is None where the publisher left nothing in it to learn from. The
    first shape that fits is taken, of those with most of the columns that --columns names. Raises
    Misfit where none fits, or where a value is not what its column promises."""
    named = [column.partition("=")[0] for column in columns]
    fitting = [shape for shape in SHAPES if shape.fits(record)]
    if not fitting:
        raise Unknown(f"columns {', '.join(map(repr, record)) or 'none'} fit no known shape")
    shape = max(fitting, key=lambda s: len(set(re.findall(r"\w+", s.keys)) & set(named)))
    there, read = set(), set()
    watched = Watched(record, there, read)
    try:
        found = shape.convert(watched)
    except (Misfit, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise Misfit(f"read as {shape.name!r}: {error}") from None
    if found is not None:
        found = {"labeler": str(watched.get("labeler", ""))} | found
    return shape, found, there - read


BOOKKEEPING = {"judgement_id", "models", "seed", "seconds", "time", "part", "repeat_of"}


def standing(records, keep=False):
    """Yields (source, record). Judgements that `python -m nanorlhf label` wrote come last, without
    those that were taken back, and without what is noted beside them (see human/journal.py) unless
    it is to be kept."""
    given = defaultdict(list)
    for source, record in records:
        if "judgement_id" not in record:
            yield source, record
            continue
        key = str(record["judgement_id"]), str(record.get("labeler"))
        if record.get("undone"):
            given.pop(key, None)
        elif not record.get("skipped"):
            kept = {k: v for k, v in record.items() if keep or k not in BOOKKEEPING}
            given[key].append((source, kept))
    for judgements in given.values():
        yield from judgements


def in_trees(records):
    """Yields (source, record). Rows that are messages of trees, as OpenAssistant publishes them,
    become one record for each prompt, with what was said before it and the ranked answers to it.
    Earlier answers are learned where they are answers, and not once more as somebody's context."""
    rows, answers = {}, defaultdict(list)
    for source, row in records:
        if not row.keys() >= TREE:
            yield source, row
            continue
        rows[str(row["message_id"])] = source, row
        answer = {"answer": row["text"], "rank": row.get("rank")}
        answers[str(row.get("parent_id"))].append(answer)
    for name, (source, row) in rows.items():
        path, at = [], row
        while "parent_id" in at:
            parent = str(at["parent_id"])
            if parent not in rows or len(path) > len(rows):
                die(f"{source}: its parent {parent!r} is not in the file, or part of a circle")
            _, at = rows[parent]
            path.insert(0, {"role": at["role"], "content": at["text"], "weight": 0})
        if row["role"] == "prompter":
            others = {k: v for k, v in row.items() if k not in (*TREE, "parent_id", "rank")}
            asked = [*path, {"role": "prompter", "content": row["text"]}]
            yield source, others | {"prompt": asked, "answers": answers[name]}
