import json
import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from nanorlhf.human.journal import Journal
from nanorlhf.human.questions import read_questions
from nanorlhf.human.survey import Survey


def write_samples(path, n=12, models=("a", "a", "a", "a")):
    """n prompts, each with a response for every name in `models`."""
    lines = [
        {
            "prompt": f"Question {i}?",
            "responses": [f"answer {i}.{k}" for k in range(len(models))],
            "models": list(models),
            "seed": 3,
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def survey(tmp_path):
    """survey(kind, ...) -> a Survey over samples in tmp_path; each call is a program of its own."""
    opened = []

    def make(kind="comparisons", n=12, seed=1, repeat=0.0, models=("a", "a", "a", "a")):
        if opened:
            os.close(opened.pop().fd)
        samples = write_samples(tmp_path / "samples.jsonl", n, models)
        journal = Journal(tmp_path / "feedback.jsonl", kind)
        opened.append(journal)
        return Survey(read_questions(samples, kind), journal, kind, seed, repeat)

    return make


def call(url, body=None):
    """The JSON that a page's server answers; 404 says that nothing is left to ask."""
    request = Request(url, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)
    except HTTPError as error:
        assert error.code == 404, error
        return json.load(error)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
