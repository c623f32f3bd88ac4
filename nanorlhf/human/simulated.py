"""A labeler of the embedded world who answers as a browser does: over HTTP."""

import json
import random
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from nanorlhf.config import die
from nanorlhf.data import world


def answer_all(address, labeler, seed):
    """Answer until nothing is left to ask. `labeler`: one of world.PANEL, who is in the address as
    ?labeler=NAME."""
    rng = random.Random(f"{labeler}/{seed}")
    base, _, query = address.partition("?")
    while not (question := call(f"{base}api/next?{query}")).get("done"):
        if "prompt" not in question:
            die("a simulated labeler judges answers to single prompts, and not in dialogues")
        answer = judge(rng, labeler, question["kind"], question["prompt"], question["responses"])
        body = {"id": question["id"], "labeler": labeler, "answer": answer}
        call(f"{base}api/answer?{query}", body)


def judge(rng, labeler, kind, prompt, responses):
    if kind in ("comparisons", "rankings"):
        ranks = world.rank(rng, labeler, prompt, responses)
        return ranks.index(1) if kind == "comparisons" else ranks
    value = world.rate if kind == "ratings" else world.likes
    return [value(rng, labeler, prompt, text) for text in responses]


def call(url, body=None):
    """The JSON that comes back; exits 2 with an error's reason."""
    request = Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except HTTPError as error:
        reply = json.load(error)
        return reply if reply.get("done") else die(f"{url}: {reply.get('error')}")
