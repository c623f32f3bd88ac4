"""A chat page in the browser, for one model or two side by side, whose judgements are feedback.

GET  /api/about      gives {"models": how many, "keeps_turns", "temperature", "to"}
POST /api/reply      takes {"messages", "model": 0 or 1, "temperature"}; gives the reply's id, a
                     line break, and its text, as it is sampled
POST /api/judge      takes {"labeler", "ids": [one or two], "answer"}: like (true) or dislike
                     (false) of one reply, or the index of the better one; null takes it back
"""

import sys
from collections import OrderedDict
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock
from uuid import uuid4

import torch

from nanorlhf.config import arg, die, note
from nanorlhf.data import dialogue
from nanorlhf.data.values import Misfit, prompt
from nanorlhf.human import web
from nanorlhf.human.journal import Journal
from nanorlhf.sampling import stream, uniforms
from nanorlhf.tools.chat import Talk, keeps_turns, told, what_fits
from nanorlhf.tools.sample import asked, load_speaker

LARGEST_BODY = 2**18  # bytes of a conversation
REMEMBERED = 500  # replies that can be judged


@dataclass
class Config(Talk):
    """Chat in the browser. A like, a dislike, or 'this one is better' is added to a feedback file,
    with the whole conversation, for train_rm.py --data."""

    models: list[str] = arg(["out/ppo"], "one model, or two to compare", positional=True)
    to: str = arg("", "TO-thumbs.jsonl and -comparisons.jsonl; default: out/feedback/MODELS")
    host: str = arg("127.0.0.1", "address to listen at; beyond this machine the page needs a token")
    port: int = arg(8001, "port of the page; 0: a free one", low=0, high=65535)


def main(cfg):
    with redirect_stdout(sys.stderr):  # the first line of stdout is the page's address
        web.packages()
        room = Room(cfg)
    server, address = web.listen(partial(chatting, room), cfg.host, cfg.port)
    print(address, flush=True)
    note(f"judgements go to {', '.join(str(j.path) for j in room.journals)}; Ctrl-C ends")
    server.run()


class Room:
    """The models, what they have said, and what people think of it."""

    def __init__(self, cfg):
        if not 1 <= len(cfg.models) <= 2:
            die(f"{len(cfg.models)} models; one to talk to, or two to compare")
        self.cfg, self.numbers, self.replies = cfg, count(), OrderedDict()
        self.speakers = [Speaker(cfg, name) for name in cfg.models]
        self.keeps = all(speaker.keeps for speaker in self.speakers)
        stem = cfg.to or "out/feedback/" + "-".join(Path(name).name for name in cfg.models)
        kinds = ("thumbs", "comparisons")[: len(cfg.models)]
        self.journals = [Journal(f"{stem}-{kind}.jsonl", kind) for kind in kinds]

    def reply(self, messages, speaker, temperature):
        """Yields the id of a reply and a line break, and then its text, piece by piece."""
        id, said = uuid4().hex, ""
        yield id + "\n"
        for piece in speaker.say(messages, temperature, next(self.numbers)):
            said += piece
            yield piece
        self.replies[id] = messages, said, speaker.name
        if len(self.replies) > REMEMBERED:
            self.replies.popitem(last=False)

    def can_judge(self, ids, answer):
        """Whether an answer is one to these replies."""
        if len(ids) == 1:
            return answer is None or type(answer) is bool
        is_pair = len(self.speakers) == len(ids) == len(set(ids)) == 2
        is_pair = is_pair and self.replies[ids[0]][0] == self.replies[ids[1]][0]
        return is_pair and (answer is None or type(answer) is int and answer in (0, 1))

    def judge(self, labeler, ids, answer):
        """Keep what a labeler says of one reply or of two, in place of what was said before."""
        replies = [self.replies[id] for id in ids]
        (messages, *_), journal = replies[0], self.journals[len(ids) - 1]
        heard = told(self.cfg.system, messages)  # the model has read this, too
        about = {"prompt": next(iter(asked(heard).values())), "seed": self.cfg.seed}
        about |= {"models": [name for _, _, name in replies]}
        if len(ids) == 1:
            said = {"completion": replies[0][1], "label": answer}
        else:
            ranks = [1, 2] if answer == 0 else [2, 1]
            said = {"completions": [text for _, text, _ in replies], "ranks": ranks}
        id = "-".join(sorted(ids))
        with journal.lock:
            records = [{"undone": True}] if id in journal.given(labeler) else []
            records += [about | said] if answer is not None else []
            if records:
                journal.write(labeler, id, records)


class Speaker:
    """One model, which says one thing at a time."""

    def __init__(self, cfg, name):
        self.cfg, self.name, self.lock = cfg, name, Lock()
        self.gpt, found = load_speaker(cfg, name)
        self.tokenizer, self.keeps = found.tokenizer, keeps_turns(cfg, found)
        self.room = dialogue.room_for_prompts(cfg.max_new_tokens, self.gpt.config.block_size)

    def say(self, messages, temperature, number):
        """Yields the answer as it is sampled; characters of several tokens come whole."""
        cfg, tokenizer = self.cfg, self.tokenizer
        read = messages if self.keeps else messages[-1:]
        _, ids = what_fits(tokenizer, cfg.system, read, self.room)
        tokens = torch.tensor([ids], device=self.gpt.device)
        noise = uniforms(cfg.seed, number, [0], cfg.max_new_tokens)
        about = (cfg.max_new_tokens, tokenizer.eos_id, noise, temperature, cfg.top_k, cfg.top_p)
        said, shown = [], ""
        with self.lock:
            for token in stream(self.gpt, tokens, *about):
                said.append(token)
                text = tokenizer.decode(said)
                if not text.endswith("\ufffd"):  # a part of a character
                    yield text[len(shown) :]
                    shown = text
        yield tokenizer.decode(said)[len(shown) :]


def chatting(room, token=""):
    """The app of the chat page."""
    app, flask = web.make_app("chat.html", token, LARGEST_BODY), web.packages()[0]

    @app.get("/api/about")
    def about():
        found = {"models": len(room.speakers), "keeps_turns": room.keeps}
        return found | {
            "temperature": room.cfg.temperature,
            "to": [str(j.path) for j in room.journals],
        }

    @app.post("/api/reply")
    def reply():
        given = web.body(flask)
        number, temperature = given.get("model"), given.get("temperature", room.cfg.temperature)
        if type(number) is not int or not 0 <= number < len(room.speakers):
            flask.abort(400, "model must be the number of one, from 0")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 2:
            flask.abort(400, "temperature must be a number from 0 to 2")
        try:
            messages = prompt({"messages": given.get("messages")}, "messages")
            "".join(words for _, words in messages).encode()  # a tokenizer knows no half characters
        except (Misfit, TypeError, AttributeError, LookupError, ValueError) as error:
            flask.abort(400, f"messages: {error}")
        pieces = room.reply(messages, room.speakers[number], temperature)
        return flask.Response(pieces, mimetype="text/plain")

    @app.post("/api/judge")
    def judge():
        given = web.body(flask)
        ids, answer = given.get("ids"), given.get("answer", "")
        if not isinstance(ids, list) or not all(
            isinstance(i, str) and i in room.replies for i in ids
        ):
            flask.abort(400, "a reply that is not known here, or no more")
        if not room.can_judge(ids, answer):
            flask.abort(
                400,
                "needs a reply and true, false or null; or two to the same words, and 0, 1 or null",
            )
        room.judge(web.name_of(flask, given.get("labeler")), ids, answer)
        return {"saved": ids}

    return app
