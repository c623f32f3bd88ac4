"""The shapes in which other people publish data, as a table: the columns of each, under our names,
and the rule that makes a record of ours of them. Imported only when a record has other columns.

A rule is given the published record, with the columns of the table under our names as well. What
it returns is read as our own records are, see `standard` in values.py; it may hold turns.
"""

import re
from collections import defaultdict
from functools import partial
from os.path import commonprefix

from nanorlhf.config import die
from nanorlhf.data import values as v
from nanorlhf.data.values import Misfit, Shape, text

JUDGED = ("rating", "label", "chosen", "rejected")
TIES = dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), [0, 0])
WINNERS = {"a": [1, 0], "b": [0, 1], "1": [1, 0], "2": [0, 1]} | TIES  # scores of the two

# ---- a prompt and what was said to it ----------------------------------------------------------


def with_context(r):
    """An input or context goes behind the question. A judgement that stands beside is used."""
    context = r.get("input", r.get("context", ""))
    if not isinstance(context, str) and not v.is_number(context):
        raise Misfit(f"what is asked about must be text or a number, found {context!r}")
    record = {key: r[key] for key in ("prompt", "completion", *JUDGED) if key in r}
    if context != "":
        record["prompt"] = "\n\n".join(filter(None, (text(r, "prompt"), str(context))))
    return record


def helpsteer(r):
    """Helpfulness is 0 to 4, a rating 0 to 5. A prompt of several turns has marks between them, and
    none before the first."""
    marks = r"(?<!\s)\s*<extra_id_1>(User|Assistant)\s*"
    dialogue = v.marked_turns("<extra_id_1>User\n" + text(r, "prompt"), marks)
    rating = r["rating"] * 5 / 4 if isinstance(r["rating"], (int, float)) else r["rating"]
    return {"prompt": dialogue, "completion": r["completion"], "rating": rating}


def opening(words):
    """(start, rest) of a text. The start is its first quarter, from 1 to 8 words: the prompt that a
    policy continues in the sentiment task of arXiv:1909.08593."""
    n_words = len(re.findall(r"\S+", words))
    n_start = min(8, max(1, n_words // 4))
    start = re.match(rf"(?:\s*\S+){{0,{n_start}}}", words).group()
    return start, words[len(start) :]


def judged_text(r):
    start, rest = opening(text(r, "text"))
    prompt = {"prompt": [("user", start)], "completion": rest}
    return prompt | {"text": r["text"], "label": r["label"]}


def tldr(r):
    """A Reddit post, or an article, as the labelers of arXiv:2009.01325 saw it; one summary, or two
    of which a labeler chose one."""
    post = r.get("info", r)
    fields = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    parts = [start + text(post, key) for start, key in fields if post.get(key)]
    if not post.get("post"):
        parts.append("ARTICLE: " + text(post, "article"))
    prompt = [("user", "\n\n".join([*parts, "TL;DR:"]))]
    if "summary" in r:
        return {"prompt": prompt, "completion": text(r, "summary").strip()}
    a, b = (text(summary, "text").strip() for summary in r["summaries"])
    pair = better_of({"prompt": prompt, "a": a, "b": b, "better": r["choice"]})
    return pair | {"labeler": r.get("worker", "")}


# ---- two replies -------------------------------------------------------------------------------


def hh(r):
    """Two dialogues that are the same up to the assistant's last turn, each as one text."""
    chosen = v.marked_turns(text(r, "chosen"))
    pair = two_dialogues(chosen, v.marked_turns(text(r, "rejected"))) if "rejected" in r else {}
    return {"messages": chosen, "text": r["chosen"].strip()} | pair


def two_chats(r):
    """Two dialogues as lists of messages, or two replies that go on from the `prompt`."""
    chosen, rejected = v.turns(r["chosen"], "chosen"), v.turns(r["rejected"], "rejected")
    before = v.prompt(r) if chosen[0][0] not in v.ASKING and "prompt" in r else []
    return {"messages": before + chosen} | two_dialogues(before + chosen, before + rejected)


def two_dialogues(chosen, rejected):
    """Two dialogues that begin alike: the prompt is what they share, up to the last turn that an
    assistant answers."""
    n = len(commonprefix([chosen[:-1], rejected[:-1]]))
    roles = [role for role, _ in chosen]
    while n and (roles[n - 1] not in v.ASKING or roles[n - 1 : n + 1] == ["system", "user"]):
        n -= 1
    if not n:
        raise Misfit("the two dialogues share no prompt that ends in a user turn")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def openai_pair(r):
    if r["input"].get("tools"):
        raise Misfit("the replies may call tools: there is no such role")
    pair = {"chosen": r["preferred_output"], "rejected": r["non_preferred_output"]}
    return {"prompt": r["input"]["messages"]} | pair


def better_of(r):
    """Replies `a` and `b`; `better` is the index of one."""
    if r["better"] not in (0, 1):
        raise Misfit(f"the index of the better reply must be 0 or 1, found {r['better']!r}")
    worse, better = (r["b"], r["a"]) if r["better"] == 0 else (r["a"], r["b"])
    return {"prompt": r["prompt"], "chosen": better, "rejected": worse}


# ---- rankings ----------------------------------------------------------------------------------


def by_score(prompt, completions, scores):
    """A ranking by scores, the highest first."""
    if not all(map(v.is_number, scores)):
        raise Misfit(f"scores must be numbers, found {scores}")
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    return {"prompt": prompt, "completions": completions, "ranks": ranks}


def ranked(r, words, score, sign=1):
    """A ranking of those answers that have a score; of one alone also without. The highest score
    times `sign` is the best."""
    answers = r["answers"]
    if len(answers) == 1:
        answers = [answers[0] | {score: 0}]
    pairs = [(a, n) for a in answers if v.is_number(n := v.number(a.get(score)))]
    if answers and not pairs:
        raise Misfit(f"none of the {len(answers)} answers has a number {score!r}")
    return by_score(r["prompt"], [text(a, words) for a, _ in pairs], [sign * n for _, n in pairs])


def of_winner(r):
    """Answers `a` and `b` to a prompt, and which is better, as people write it in a spreadsheet."""
    said = re.sub(r"^(model|answer|response)_|\.0$", "", str(r["winner"]).strip().lower())
    if said not in WINNERS:
        raise Misfit(f"'winner' must be one of {', '.join(WINNERS)}; found {r['winner']!r}")
    record = by_score(r["prompt"], [r["a"], r["b"]], WINNERS[said])
    return record | {"labeler": r.get("labeler", r.get("judge", ""))}


def arena(r):
    """What one user asked of two models, and whose conversation the user liked better."""
    both = two_dialogues(v.turns(r["a"], "conversation_a"), v.turns(r["b"], "conversation_b"))
    return of_winner(r | {"prompt": both["prompt"], "a": both["chosen"], "b": both["rejected"]})


def helpsteer3(r):
    """The preference is from -3, the first is much better, to 3, the second is; 0 is a tie."""
    score = r["overall_preference"]
    return by_score(r["context"], [r["a"], r["b"]], [-score, score])


def webgpt(r):
    return by_score(r["question"]["full_text"], [r["a"], r["b"]], [r["score_0"], r["score_1"]])


by_rank = partial(ranked, words="answer", score="rank", sign=-1)
by_votes = partial(ranked, words="text", score="pm_score")
# the mean of several ratings: old copies have an overall_score of 10 where the annotator gave 1
by_mean = partial(ranked, words="response", score="fine-grained_score")

SHAPES = (  # the first that fits is taken, so those with more columns stand first
    Shape("TL;DR comparisons", "info [summaries] choice", tldr),
    Shape("TL;DR", "subreddit post summary", tldr),
    Shape("SHP", "prompt=history a=human_ref_B b=human_ref_A better=labels", better_of),
    Shape("Chatbot Arena", "a=conversation_a b=conversation_b winner", arena),
    Shape("a spreadsheet", "prompt=question a=answer_a b=answer_b winner", of_winner),
    Shape("a spreadsheet", "prompt a=response_a b=response_b winner", of_winner),
    Shape("HelpSteer3", "context a=response1 b=response2 overall_preference", helpsteer3),
    Shape("PKU-SafeRLHF", "prompt a=response_0 b=response_1 better=better_response_id", better_of),
    Shape("WebGPT", "question a=answer_0 b=answer_1 score_0 score_1", webgpt),
    Shape("OpenAI preferences", "input preferred_output non_preferred_output", openai_pair),
    Shape("OpenAssistant, Nectar", "prompt [answers]", by_rank),
    Shape("UltraFeedback", "prompt=instruction answers=[completions]", by_mean),
    Shape("Stack Exchange", "prompt=question [answers]", by_votes),
    Shape("HelpSteer", "prompt completion=response rating=helpfulness", helpsteer),
    Shape("BeaverTails", "prompt completion=response label=is_safe", with_context),
    Shape("comparisons of dialogues", "[chosen] rejected", two_chats),
    Shape("Alpaca", "prompt=instruction completion=output", with_context),
    Shape("Dolly", "prompt=instruction completion=response", with_context),
    Shape("comparisons", "prompt=instruction chosen rejected", with_context),
    Shape("comparisons", "prompt=question chosen rejected", with_context),
    *v.OURS[:-2],
    Shape("prompt, completion", "prompt completion=chosen"),
    Shape("HH-RLHF", "chosen", hh),
    Shape("ShareGPT", "messages=conversations"),
    Shape("WildChat, LMSYS-Chat", "messages=conversation"),
    Shape("prompt, completion", "prompt completion=response", with_context),
    Shape("prompt, completion", "prompt=question completion=answer", with_context),
    Shape("judged text", "text label", judged_text),
    Shape("judged text", "text=review label=sentiment", judged_text),
    *v.OURS[-2:],  # prompts, text
)


def shape_of(record, columns=()):
    """The first shape that fits, of those with most of the columns that --columns names."""
    named = {column.partition("=")[0] for column in columns}
    fitting = [shape for shape in SHAPES if shape.fits(record)]
    if not fitting:
        names = ", ".join(map(repr, record)) or "none"
        advice = "name them, as in --columns prompt=my_question; docs/data.md lists the shapes"
        raise Misfit(f"columns {names} fit no known shape: {advice}")
    return max(fitting, key=lambda shape: len(named.intersection(shape.columns.values())))


def in_trees(rows):
    """Yields (source, record). Rows that are messages of trees, as OpenAssistant publishes them,
    become one record for each prompt, with what was said before it and the ranked answers to it.
    Earlier answers are learned where they are answers, and not once more as somebody's context."""
    messages, answers = {}, defaultdict(list)
    for source, row in rows:
        messages[str(row["message_id"])] = source, row
        answer = {"answer": row["text"], "rank": row.get("rank")}
        answers[str(row.get("parent_id"))].append(answer)
    for name, (source, row) in messages.items():
        path, at = [{"role": row["role"], "content": row["text"]}], row
        while "parent_id" in at:
            parent = str(at["parent_id"])
            if parent not in messages or len(path) > len(messages):
                die(f"{source}: its parent {parent!r} is not in the file, or part of a circle")
            _, at = messages[parent]
            path.insert(0, {"role": at["role"], "content": at["text"], "weight": 0})
        if row["role"] == "prompter":
            yield source, row | {"prompt": path, "answers": answers[name]}
