"""The shapes in which other people publish data. Each function reads one of them as a record with
the keys at the top of values.py. Imported only when a record has other columns than ours."""

import re
from collections import defaultdict
from os.path import commonprefix

from nanorlhf.config import die
from nanorlhf.data import values as v
from nanorlhf.data.values import Misfit, Shape, as_it_is, prompt, text

JUDGED = ("rating", "label", "chosen", "rejected")


def renamed(r):
    """A prompt and what was said to it under other names. An input or context goes behind the
    question."""
    question = next(key for key in ("instruction", "question", "prompt") if key in r)
    context = r.get("input", r.get("context", ""))
    if not isinstance(context, str) and not v.is_number(context):
        raise Misfit(f"what is asked about must be text or a number, found {context!r}")
    record = {key: r[key] for key in JUDGED if key in r} | {"prompt": r[question]}
    if context != "":
        record["prompt"] = "\n\n".join(filter(None, (text(r, question), str(context))))
    answer = next((key for key in ("output", "response", "answer") if key in r), None)
    if answer:
        record["completion"] = r[answer]
    return as_it_is(record)


def beavertails(r):
    return renamed({**r, "label": r["is_safe"]})


def helpsteer(r):
    """Helpfulness is 0 to 4, a rating 0 to 5. A prompt of several turns has marks between them, and
    none before the first."""
    marks = r"(?<!\s)\s*<extra_id_1>(User|Assistant)\s*"
    before = v.marked_turns("<extra_id_1>User\n" + text(r, "prompt"), marks)
    rating = r["helpfulness"]
    if isinstance(rating, (int, float)):
        rating = rating * 5 / 4
    completions = [text(r, "response")]
    return {"prompt": before, "completions": completions, "kind": "ratings", "target": [rating]}


def opening(words):
    """(start, rest) of a text. The start is its first quarter, from 1 to 8 words: the prompt that a
    policy continues in the sentiment task of arXiv:1909.08593."""
    n_words = len(re.findall(r"\S+", words))
    n_start = min(8, max(1, n_words // 4))
    start = re.match(rf"(?:\s*\S+){{0,{n_start}}}", words).group()
    return start, words[len(start) :]


def judged_text(r):
    start, rest = opening(text(r, "text"))
    judged = {"prompt": [("user", start)], "completions": [rest]}
    return judged | {"text": r["text"], "kind": "thumbs", "target": [r["label"]]}


def judged_review(r):
    return judged_text({"text": r["review"], "label": r["sentiment"]})


def sharegpt(r):
    return v.dialogue(r, "conversations") if r["conversations"] else None


def wildchat(r):
    return v.dialogue(r, "conversation")


# ---- two replies -------------------------------------------------------------------------------


def hh(r):
    """Two dialogues that are the same up to the assistant's last turn, each as one text."""
    chosen = text(r, "chosen")
    if "rejected" not in r:
        return {"messages": v.marked_turns(chosen), "text": chosen.strip()}
    both = better_dialogue(v.marked_turns(chosen), v.marked_turns(text(r, "rejected")))
    return both | {"text": chosen.strip()}


def preference_chat(r):
    """Two dialogues as lists of messages, or two replies that go on from the `prompt`."""
    chosen, rejected = v.turns(r["chosen"], "chosen"), v.turns(r.get("rejected"), "rejected")
    before = prompt(r) if chosen[0][0] not in v.ASKING and "prompt" in r else []
    return better_dialogue(before + chosen, before + rejected)


def better_dialogue(chosen, rejected):
    asked, better, worse = apart(chosen, rejected)
    return {"prompt": asked, "messages": chosen} | v.pair(better, worse)


def apart(one, other):
    """Two dialogues that begin alike -> (prompt, a reply, the other reply). The prompt is what they
    share, up to the last turn that an assistant answers."""
    n = len(commonprefix([one[:-1], other[:-1]]))
    roles = [role for role, _ in one]
    while n and (roles[n - 1] not in v.ASKING or roles[n - 1 : n + 1] == ["system", "user"]):
        n -= 1
    if not n:
        raise Misfit("the two dialogues share no prompt that ends in a user turn")
    return one[:n], v.as_reply(one[n:], "a reply"), v.as_reply(other[n:], "a reply")


def better_of(r, key, *replies):
    """Two replies, of which a column has the index of the better one."""
    if r[key] not in (0, 1) or len(replies) != 2:
        raise Misfit(f"{key!r} must be 0 or 1, of two replies; found {r[key]!r} of {len(replies)}")
    return v.pair(replies[int(r[key])], replies[1 - int(r[key])])


def openai_pairs(r):
    asked = r["input"]
    if asked.get("tools"):
        raise Misfit("the replies may call tools: there is no such role")
    both = v.pair(v.reply(r, "preferred_output"), v.reply(r, "non_preferred_output"))
    return {"prompt": prompt(asked, "messages")} | both


def tldr(r):
    """A Reddit post, or an article, as the labelers of arXiv:2009.01325 saw it; one summary, or two
    of which a labeler chose one."""
    post = r.get("info", r)
    fields = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    parts = [start + text(post, key) for start, key in fields if post.get(key)]
    if not post.get("post"):
        parts.append("ARTICLE: " + text(post, "article"))
    record = {"prompt": [("user", "\n\n".join([*parts, "TL;DR:"]))]}
    if "summary" in r:
        return record | {"completions": [text(r, "summary").strip()]}
    summaries = [text(summary, "text").strip() for summary in r["summaries"]]
    return record | better_of(r, "choice", *summaries) | {"labeler": str(r.get("worker", ""))}


def shp(r):
    """`labels` is 1 where A is preferred."""
    replies = text(r, "human_ref_B"), text(r, "human_ref_A")
    return {"prompt": prompt(r, "history")} | better_of(r, "labels", *replies)


def pku_saferlhf(r):
    """Judged by how helpful a reply is. Which is safer is a judgement of its own."""
    replies = text(r, "response_0"), text(r, "response_1")
    return {"prompt": prompt(r)} | better_of(r, "better_response_id", *replies)


# ---- rankings ----------------------------------------------------------------------------------


def ultrafeedback(r):
    """Ranked by the mean of the fine-grained ratings. Old copies of the data set have an
    overall_score of 10 where the annotator gave 1."""
    return ranked(prompt(r, "instruction"), r["completions"], "response", "fine-grained_score")


def stack_exchange(r):
    return ranked(prompt(r, "question"), r["answers"], "text", "pm_score")


def ranked_answers(r):
    return ranked(prompt(r), r["answers"], "answer", "rank", sign=-1)


def ranked(asked, answers, text_key, score_key, sign=1):
    """A ranking of those answers that have a score; of one alone also without. The highest score
    times `sign` is the best."""
    if len(answers) == 1:
        return scored(asked, [text(answers[0], text_key)], [0])
    judged = [answer for answer in answers if v.is_number(answer.get(score_key))]
    scores = [sign * answer[score_key] for answer in judged]
    return scored(asked, [text(answer, text_key) for answer in judged], scores)


def scored(asked, completions, scores):
    """A ranking by scores, the highest first. None where there is nothing to rank."""
    if not all(map(v.is_number, scores)):
        raise Misfit(f"scores must be numbers, found {scores}")
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    record = {"prompt": asked, "completions": completions, "kind": "rankings", "target": ranks}
    return record if ranks else None


def arena(r):
    """What one user asked of two models, and whose conversation the user liked better."""
    scores = {"model_a": [1, 0], "model_b": [0, 1]}
    scores |= dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), [0, 0])
    if r["winner"] not in scores:
        raise Misfit(f"'winner' must be one of {', '.join(scores)}, found {r['winner']!r}")
    talks = [v.turns(r[key], key) for key in ("conversation_a", "conversation_b")]
    asked, *replies = apart(*talks)
    return scored(asked, replies, scores[r["winner"]]) | {"labeler": str(r.get("judge", ""))}


def helpsteer3(r):
    """The preference is from -3, the first is much better, to 3, the second is; 0 is a tie."""
    asked, score = prompt(r, "context"), r["overall_preference"]
    return scored(asked, [text(r, "response1"), text(r, "response2")], [-score, score])


def webgpt(r):
    asked, replies = prompt(r["question"], "full_text"), [text(r, "answer_0"), text(r, "answer_1")]
    return scored(asked, replies, [r["score_0"], r["score_1"]])


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
    Shape("Alpaca", "instruction output", renamed),
    Shape("Dolly", "instruction response", renamed),
    Shape("comparisons", "instruction chosen rejected", renamed),
    Shape("comparisons", "question chosen rejected", renamed),
    *v.OURS[:-2],
    Shape("prompt, completion", "prompt chosen", as_it_is),
    Shape("HH-RLHF", "chosen", hh),
    Shape("ShareGPT", "conversations", sharegpt),
    Shape("WildChat, LMSYS-Chat", "conversation", wildchat),
    Shape("prompt, completion", "prompt response", renamed),
    Shape("prompt, completion", "question answer", renamed),
    Shape("judged text", "text label", judged_text),
    Shape("judged text", "review sentiment", judged_review),
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
    return max(fitting, key=lambda shape: len({*re.findall(r"\w+", shape.keys)} & named))


def in_context(record, converted):
    """The converted record with what the published one says beside its dialogue in front of this: a
    system text, and earlier rounds of question and answer in a list `history`."""
    before = [("system", text(record, k)) for k in ("system", "system_prompt") if record.get(k)]
    history = record.get("history")
    for question_and_answer in history if isinstance(history, list) else []:  # SHP's is its prompt
        roles = zip(("user", "assistant"), question_and_answer, strict=True)
        before += v.turns([{"role": role, "content": words} for role, words in roles], "history")
    dialogues = {key: before + converted[key] for key in ("prompt", "messages") if key in converted}
    return converted | dialogues


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
        path, at = [], row
        while "parent_id" in at:
            parent = str(at["parent_id"])
            if parent not in messages or len(path) > len(messages):
                die(f"{source}: its parent {parent!r} is not in the file, or part of a circle")
            _, at = messages[parent]
            path.insert(0, {"role": at["role"], "content": at["text"], "weight": 0})
        if row["role"] == "prompter":
            asked = [*path, {"role": "prompter", "content": row["text"]}]
            yield source, row | {"prompt": asked, "answers": answers[name]}
