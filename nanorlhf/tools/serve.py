"""A chat page in the browser, for one model or two side by side, whose judgements are feedback.

GET  /api/about      gives {"models": how many, "keeps_turns", "temperature", "to"}
POST /api/reply      takes {"messages", "model": 0 or 1, "temperature"}; gives the reply's id, a
                     line break, and its text, as it is sampled
POST /api/judge      takes {"labeler", "ids": [one or two], "answer"}: like (true) or dislike
                     (false) of one reply, or the index of the better one, or -1 for a tie; null
                     takes it back
"""

import sys
from collections import OrderedDict
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from uuid import uuid4

from nanorlhf.config import arg, die, note
from nanorlhf.data.values import Misfit, prompt
from nanorlhf.human import web
from nanorlhf.human.journal import Journal, Refused
from nanorlhf.human.samples import prompt_record
from nanorlhf.human.survey import records_of
from nanorlhf.speaker import ChatConfig, Speaker, with_system

LARGEST_BODY = 2**18  # bytes of a conversation
REMEMBERED = 500  # replies that can be judged
KINDS = {1: "thumbs", 2: "comparisons"}  # by how many replies are judged together


@dataclass
class Config(ChatConfig):
    """Chat in the browser. A like, a dislike, or 'this one is better' is added to a feedback file,
    with the whole conversation, for train_rm.py --data."""

    models: list[str] = arg(["out/ppo"], "one model, or two to compare", positional=True)
    to: str = arg("", "TO-thumbs.jsonl and -comparisons.jsonl; default: out/feedback/MODELS")
    host: str = arg("127.0.0.1", "address to listen at; beyond this machine the page needs a token")
    port: int = arg(8001, "port of the page; 0: a free one", low=0, high=65535)


def main(cfg):
    with redirect_stdout(sys.stderr):  # the first line of stdout is the page's address
        web.check_packages()
        chat = Chat(cfg)
    server, address = web.listen(partial(chat_app, chat), cfg.host, cfg.port)
    print(address, flush=True)
    paths = ", ".join(str(journal.path) for journal in chat.journals.values())
    note(f"judgements go to {paths}; Ctrl-C ends")
    server.run()


@dataclass(frozen=True)
class Reply:
    messages: list  # the conversation that it answers
    text: str
    model: str


class Chat:
    """The models, their latest replies, and the files of what people think of these."""

    def __init__(self, cfg):
        if not 1 <= len(cfg.models) <= 2:
            die(f"{len(cfg.models)} models; one to talk to, or two to compare")
        self.cfg, self.numbers, self.replies = cfg, count(), OrderedDict()  # id -> Reply
        self.speakers = [Speaker(cfg, name, must_answer=True) for name in cfg.models]
        stem = cfg.to or "out/feedback/" + "-".join(Path(name).name for name in cfg.models)
        kinds = [KINDS[n] for n in range(1, len(cfg.models) + 1)]
        self.journals = {kind: Journal(f"{stem}-{kind}.jsonl", kind) for kind in kinds}

    def reply(self, messages, speaker, temperature):
        """Yields the id of a reply and a line break, and then its text, piece by piece."""
        id, text = uuid4().hex, ""
        yield id + "\n"
        for piece in speaker.answer(messages, temperature, next(self.numbers)):
            text += piece
            yield piece
        self.replies[id] = Reply(messages, text, speaker.name)
        if len(self.replies) > REMEMBERED:
            self.replies.popitem(last=False)

    def judge(self, labeler, ids, answer):
        """Keep a labeler's judgement of one reply or of two, in place of an earlier one. Refused
        where it is none."""
        if not isinstance(ids, list) or not all(type(i) is str and i in self.replies for i in ids):
            raise Refused(400, "a reply that is not known here, or no more")
        replies, kind = [self.replies[id] for id in ids], KINDS.get(len(ids))
        is_same = all(reply.messages == replies[0].messages for reply in replies)
        if kind not in self.journals or not is_same or len(set(ids)) < len(ids):
            raise Refused(400, "needs a reply, or two to the same words")
        id, journal = "-".join(sorted(ids)), self.journals[kind]
        records = [] if answer is None else self.records(kind, replies, answer)
        with journal.lock:
            if id in journal.answered_by(labeler):
                records = [{"undone": True}, *records]
            if records:
                journal.write(labeler, id, records)

    def records(self, kind, replies, answer):
        turns = with_system(self.cfg.system, replies[0].messages)  # the model has read both
        prompt = next(iter(prompt_record(turns).values()))
        texts, models = [reply.text for reply in replies], [reply.model for reply in replies]
        answer = [answer] if kind == "thumbs" else answer
        records = records_of(kind, prompt, texts, models, answer)
        return [record | {"seed": self.cfg.seed} for record in records]


def chat_app(chat, token=""):
    """The app of the chat page."""
    app = web.make_app("chat.html", token, LARGEST_BODY)
    from flask import Response, request

    @app.get("/api/about")
    def about():
        return {
            "models": len(chat.speakers),
            "keeps_turns": all(speaker.keeps_turns for speaker in chat.speakers),
            "temperature": chat.cfg.temperature,
            "to": [str(journal.path) for journal in chat.journals.values()],
        }

    @app.post("/api/reply")
    def reply():
        body = web.json_body(request)
        number, temperature = body.get("model"), body.get("temperature", chat.cfg.temperature)
        if type(number) is not int or not 0 <= number < len(chat.speakers):
            raise Refused(400, "model must be the number of one, from 0")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 2:
            raise Refused(400, "temperature must be a number from 0 to 2")
        try:
            messages = prompt({"messages": body.get("messages")}, "messages")
            "".join(text for _, text in messages).encode()  # a tokenizer knows no half characters
        except (Misfit, TypeError, AttributeError, LookupError, ValueError) as error:
            raise Refused(400, f"messages: {error}") from None
        pieces = chat.reply(messages, chat.speakers[number], temperature)
        return Response(pieces, mimetype="text/plain")

    @app.post("/api/judge")
    def judge():
        body = web.json_body(request)
        labeler = web.labeler_name(body.get("labeler"))
        chat.judge(labeler, body.get("ids"), body.get("answer", ""))
        return {"saved": body["ids"]}

    return app
