"""A chat page in the browser, for one model or two side by side, whose judgements are feedback.

GET  /api/about      gives {"models": how many, "keeps_turns", "temperature", "to"}
POST /api/reply      takes {"messages", "model": 0 or 1, "temperature"}; gives the reply's id, a
                     line break, and its text, as it is sampled; the header Messages-Read says how
                     many of the messages the models read, the last ones
POST /api/judge      takes {"labeler", "ids": [one or two], "answer"}: like (true) or dislike
                     (false) of one reply, or the index of the better one, or -1 for a tie; null
                     takes it back
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from uuid import uuid4

from nanorlhf.config import arg, die, note
from nanorlhf.data.values import Misfit, prompt
from nanorlhf.human import web
from nanorlhf.human.journal import Journal, Refused, records_of
from nanorlhf.human.samples import as_prompt
from nanorlhf.speaker import ChatConfig, Speaker

REMEMBERED = 500  # replies that can be judged
KINDS = {1: "thumbs", 2: "comparisons"}  # by how many replies are judged together


@dataclass
class Config(ChatConfig):
    """Chat in the browser. A like, a dislike, or 'this one is better' is added to a feedback file,
    with the whole conversation, for train_rm.py --data."""

    models: list[str] = arg(["out/ppo"], "one model, or two to compare", positional=True)
    to: str = arg("", "TO-thumbs.jsonl and -comparisons.jsonl; default: out/feedback/MODELS")
    host: str = arg("127.0.0.1", "address to listen at; beyond this machine the page needs a token")
    allow_host: list[str] = arg([], "names by which a proxy shows the page; needs the token, too")
    port: int = arg(8001, "port of the page; 0: a free one", low=0, high=65535)


def main(cfg):
    with redirect_stdout(sys.stderr):  # the first line of stdout is the page's address
        web.check_packages()
        chat = Chat(cfg)
    server, address = web.listen(chat_app(chat), cfg.host, cfg.port, "", cfg.allow_host)
    print(address, flush=True)
    note(f"judgements go to {', '.join(chat.paths)}; Ctrl-C ends")
    server.run()


class Chat:
    """The models, their replies, and the files of what people think of these."""

    def __init__(self, cfg):
        if not 1 <= len(cfg.models) <= 2:
            die(f"{len(cfg.models)} models; one to talk to, or two to compare")
        self.cfg, self.numbers, self.replies = cfg, count(), {}  # id -> {"prompt", "text", "model"}
        self.speakers = [Speaker(cfg, name, must_answer=True) for name in cfg.models]
        stem = cfg.to or "out/feedback/" + "-".join(Path(name).name for name in cfg.models)
        kinds = list(KINDS.values())[: len(cfg.models)]
        self.journals = {kind: Journal(f"{stem}-{kind}.jsonl", kind) for kind in kinds}
        self.paths = [str(journal.path) for journal in self.journals.values()]

    def remembered(self, messages):
        """The end of a conversation that every one of the models reads."""
        for speaker in self.speakers:
            messages = speaker.remembered(messages)
        return messages

    def reply(self, messages, speaker, temperature):
        """Yields the id of a reply and a line break, and then its text, piece by piece."""
        id, text, prompt = uuid4().hex, "", as_prompt([*speaker.system, *messages])
        yield id + "\n"
        for piece in speaker.answer(messages, temperature, next(self.numbers)):
            text += piece
            yield piece
        # only a whole reply can be judged
        self.replies[id] = {"prompt": prompt, "text": text, "model": speaker.name}
        if len(self.replies) > REMEMBERED:
            self.replies.pop(next(iter(self.replies)))  # the oldest

    def judge(self, labeler, ids, answer):
        """Keep a labeler's judgement of one reply or of two, in place of an earlier one. Refused
        where it is none."""
        ids = list(map(str, ids)) if isinstance(ids, list) else []
        replies, kind = [self.replies.get(id) for id in ids], KINDS.get(len(set(ids)))
        journal = self.journals.get(kind)
        if not journal or None in replies or replies[0]["prompt"] != replies[-1]["prompt"]:
            raise Refused(400, "needs a reply that is known here, or two to the same words")
        id, records = "-".join(sorted(ids)), []
        if answer is not None:
            texts, models = ([reply[key] for reply in replies] for key in ("text", "model"))
            answer = [answer] if kind == "thumbs" else answer
            records = records_of(kind, replies[0]["prompt"], texts, models, answer)
        records = [record | {"seed": self.cfg.seed} for record in records]
        with journal.lock:
            if id in journal.ids[labeler]:
                records = [{"undone": True}, *records]
            journal.write(labeler, id, records)


def chat_app(chat):
    """The app of the chat page."""
    app = web.make_app("chat.html")
    from flask import Response, request

    @app.get("/api/about")
    def about():
        keeps_turns = all(speaker.keeps_turns for speaker in chat.speakers)
        about = {"models": len(chat.speakers), "keeps_turns": keeps_turns, "to": chat.paths}
        return about | {"temperature": chat.cfg.temperature}

    @app.post("/api/reply")
    def reply():
        body = web.json_body(request)
        temperature = body.get("temperature", chat.cfg.temperature)
        try:
            if type(body["model"]) is not int or body["model"] < 0:
                raise ValueError("model must be the number of one, from 0")
            speaker = chat.speakers[body["model"]]
            messages = prompt({"messages": body["messages"]}, "messages")
            "".join(text for _, text in messages).encode()  # a tokenizer knows no half characters
            if not 0 <= temperature <= 2:
                raise ValueError("a temperature is from 0 to 2")
        except (Misfit, TypeError, AttributeError, LookupError, ValueError) as error:
            raise Refused(400, f"needs messages, model and temperature: {error}") from None
        messages = chat.remembered(messages)
        headers = {"Messages-Read": len(messages)}
        reply = chat.reply(messages, speaker, temperature)
        return Response(reply, mimetype="text/plain", headers=headers)

    @app.post("/api/judge")
    def judge():
        body = web.json_body(request)
        chat.judge(web.labeler_of(body), body.get("ids"), body.get("answer", "none"))
        return {"saved": body["ids"]}

    return app
