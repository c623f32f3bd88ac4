"""serve: what a person likes in a chat is feedback with the whole conversation."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("flask", reason="pip install -e '.[human]'")

from nanorlhf import speaker  # noqa: E402
from nanorlhf.data import dialogue  # noqa: E402
from nanorlhf.data.examples import load_feedback  # noqa: E402
from nanorlhf.tokenizer import byte_tokenizer  # noqa: E402
from nanorlhf.tools import serve  # noqa: E402
from tests.helpers import refused  # noqa: E402
from tests.human.conftest import records  # noqa: E402
from tests.tools.test_evaluate import make_gpt, save  # noqa: E402

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and?"},
]


@pytest.fixture
def chat(tmp_path):
    """chat(n models, ...) -> a client of the page's server, with its `chat`."""
    opened = []

    def start(n=2, **flags):
        for old in opened:
            for journal in old.journals.values():
                os.close(journal.fd)
        opened.clear()
        names = [str(save(tmp_path / f"{n}_{i}", "sft", make_gpt(i))) for i in range(n)]
        common = {"device": "cpu", "dtype": "float32", "max_new_tokens": 12}
        talk = serve.Chat(serve.Config(models=names, to=str(tmp_path / "said"), **common | flags))
        opened.append(talk)
        client = serve.chat_app(talk).test_client()
        client.chat = talk
        return client

    return start


def ask(client, model=0, messages=TALK, **more):
    """(id, text) of a reply."""
    body = {"messages": messages, "model": model} | more
    id, _, text = client.post("/api/reply", json=body).get_data(as_text=True).partition("\n")
    return id, text


def judge(client, ids, answer, labeler="ann"):
    body = {"labeler": labeler, "ids": ids, "answer": answer}
    return client.post("/api/judge", json=body)


def test_a_like_is_a_thumb_with_the_whole_conversation(chat, tmp_path):
    client = chat(1)
    id, text = ask(client)
    assert judge(client, [id], True).status_code == 200
    kind, (example,) = load_feedback([tmp_path / "said-thumbs.jsonl"])
    assert kind == "thumbs" and example.target == [1.0] and example.completions == [text]
    assert example.messages == [("user", "hi"), ("assistant", "yo"), ("user", "and?")]
    (record,) = records(tmp_path / "said-thumbs.jsonl")
    assert record["models"] == [client.chat.speakers[0].name] and record["labeler"] == "ann"
    assert client.get("/api/about").json["models"] == 1
    assert not (tmp_path / "said-comparisons.jsonl").exists()


def test_the_other_is_better_is_a_comparison(chat, tmp_path):
    client = chat(2)
    (one, a), (other, b) = ask(client, 1), ask(client, 0)
    assert judge(client, [one, other], 1).status_code == 200
    kind, (example,) = load_feedback([tmp_path / "said-comparisons.jsonl"])
    assert kind == "rankings" and example.completions == [a, b] and example.target == [2, 1]
    names = [client.chat.speakers[i].name for i in (1, 0)]
    assert records(tmp_path / "said-comparisons.jsonl")[0]["models"] == names
    judge(client, [one, other], -1)  # a tie, in its place
    assert load_feedback([tmp_path / "said-comparisons.jsonl"])[1][0].target == [1, 1]


def test_a_mind_that_changes_leaves_its_last_word(chat, tmp_path):
    client = chat(2)
    ids = [ask(client, i)[0] for i in (0, 1)]
    for answer in (True, False, True, None):
        judge(client, ids[:1], answer)
    judge(client, ids[1:], False)
    for answer in (0, 1):
        judge(client, ids, answer)
    judge(client, ids[::-1], 1, "bob")  # the same two in the other order, and somebody else
    thumbs = load_feedback([tmp_path / "said-thumbs.jsonl"])[1]
    assert [e.target for e in thumbs] == [[0.0]]
    both = load_feedback([tmp_path / "said-comparisons.jsonl"])[1]
    assert sorted((e.labeler, e.target) for e in both) == [("ann", [2, 1]), ("bob", [2, 1])]
    judge(client, ids, None)
    assert len(load_feedback([tmp_path / "said-comparisons.jsonl"])[1]) == 1


def test_a_reply_is_what_the_model_says_and_every_one_is_another(chat):
    client = chat(2)
    texts = {ask(client, 0, temperature=1.0)[1] for _ in range(6)}
    assert len(texts) > 3
    greedy = [ask(client, i, temperature=0) for i in (0, 0, 1)]
    assert greedy[0][1] == greedy[1][1] != greedy[2][1] and greedy[0][0] != greedy[1][0]


@pytest.mark.parametrize("keeps, n_read", [("yes", 3), ("no", 1)])
def test_the_model_reads_the_conversation_or_its_end(chat, monkeypatch, tmp_path, keeps, n_read):
    client, read = chat(1, keep_turns=keeps), []
    real = speaker.dialogue.encode_prompt

    def spy(tokenizer, messages):
        read.append(messages)
        return real(tokenizer, messages)

    monkeypatch.setattr(speaker.dialogue, "encode_prompt", spy)
    reply = client.post("/api/reply", json={"messages": TALK, "model": 0})
    id = reply.get_data(as_text=True).partition("\n")[0]
    assert len(read[-1]) == n_read and read[-1][-1] == ("user", "and?")
    assert reply.headers["Messages-Read"] == str(n_read)
    assert client.get("/api/about").json["keeps_turns"] == (keeps == "yes")
    judge(client, [id], True)  # the record holds what was read, and no more
    (example,) = load_feedback([tmp_path / "said-thumbs.jsonl"])[1]
    assert example.messages == read[-1]


def test_two_models_read_what_both_can(chat, tmp_path, monkeypatch):
    """So that their replies are to the same words, and can be compared."""
    client = chat(2, keep_turns="yes")
    client.chat.speakers[1].keeps_turns = False
    ids = [ask(client, i)[0] for i in (0, 1)]
    assert judge(client, ids, -1).status_code == 200
    (example,) = load_feedback([tmp_path / "said-comparisons.jsonl"])[1]
    assert example.messages == [("user", "and?")] and example.target == [1, 1]
    client.chat.speakers[1].keeps_turns = True
    client.chat.speakers[1].room = len(dialogue.encode_prompt(byte_tokenizer(), [("user", "and?")]))
    ids = [ask(client, i)[0] for i in (0, 1)]
    assert judge(client, ids, 0).status_code == 200
    assert load_feedback([tmp_path / "said-comparisons.jsonl"])[1][1].messages == example.messages


def test_text_comes_piece_by_piece_and_whole_characters_at_once(chat, monkeypatch):
    model = chat(1).chat.speakers[0]
    ids = model.tokenizer.encode("a€ü") + [model.tokenizer.encode("€")[0]]
    monkeypatch.setattr(speaker, "stream", lambda *args: iter(ids))
    pieces = list(model.answer([("user", "hi")], 1.0, 0))
    assert "".join(pieces) == "a€ü\ufffd" and [p for p in pieces if p][:3] == ["a", "€", "ü"]


def test_two_models_and_many_people_talk_at_once(chat, tmp_path):
    client = chat(2)

    def person(i):
        own = client.application.test_client()
        ids = [ask(own, k, [{"role": "user", "content": f"I am {i}"}])[0] for k in (0, 1)]
        judge(own, ids, i % 2, f"person {i}")
        judge(own, ids[:1], True, f"person {i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(person, range(24)))
    examples = load_feedback([tmp_path / "said-comparisons.jsonl"])[1]
    assert len({e.labeler for e in examples}) == len(examples) == 24
    for e in examples:
        n = int(e.labeler.split()[1])
        assert e.messages == [("user", f"I am {n}")] and e.target == [[1, 2], [2, 1]][n % 2]
    assert len(load_feedback([tmp_path / "said-thumbs.jsonl"])[1]) == 24


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": TALK, "model": 2},
        {"messages": TALK, "model": 0, "temperature": "hot"},
        {"messages": TALK, "model": 0, "temperature": float("nan")},
        {"messages": TALK[:2], "model": 0},
        {"messages": [], "model": 0},
        {"messages": {"role": "user"}, "model": 0},
        {"messages": [{"role": "judge", "content": "x"}], "model": 0},
        {"prompt": "hi", "model": 0},
        {"messages": [{"role": "user", "content": "\ud800"}], "model": 0},
    ],
)
def test_what_no_model_can_answer_is_refused(chat, body):
    answer = chat(2).post("/api/reply", data=json.dumps(body), content_type="application/json")
    assert answer.status_code == 400 and answer.json["error"]


def test_what_is_no_judgement_is_refused(chat, tmp_path):
    client = chat(2)
    ids = [ask(client, i)[0] for i in (0, 1)]
    elsewhere = ask(client, 0, TALK[:1])[0]
    for given, answer in [
        ([], True),
        (["x"], True),
        (ids[:1], 1),
        (ids, 2),
        ([ids[0], ids[0]], 0),
        ([ids[0], elsewhere], 0),
    ]:
        assert judge(client, given, answer).status_code == 400, (given, answer)
    assert judge(client, ids, 0, labeler="").status_code == 400
    assert client.post("/api/judge", json={"labeler": "ann", "ids": ids}).status_code == 400
    assert not any(records(tmp_path / f"said-{kind}.jsonl") for kind in serve.KINDS.values())
    alone = chat(1)
    ids = [ask(alone)[0] for _ in range(2)]
    assert judge(alone, ids, 0).status_code == 400


def test_old_replies_are_forgotten(chat, monkeypatch):
    monkeypatch.setattr(serve, "REMEMBERED", 2)
    client = chat(1)
    ids = [ask(client)[0] for _ in range(3)]
    assert [judge(client, [id], True).status_code for id in ids] == [400, 200, 200]


@pytest.mark.parametrize("number", [-1, True, 1, "0", None])
def test_a_model_is_named_by_its_number(chat, number):
    assert chat(1).post("/api/reply", json={"messages": TALK, "model": number}).status_code == 400


def test_a_reply_that_was_stopped_half_way_cannot_be_judged(chat):
    talk = chat(1).chat
    pieces = talk.reply([("user", "hi")], talk.speakers[0], 1.0)
    next(pieces)
    pieces.close()
    assert not talk.replies


def test_what_the_system_says_is_part_of_what_was_answered(chat, tmp_path):
    client = chat(1, system="be brief")
    judge(client, [ask(client)[0]], True)
    (record,) = records(tmp_path / "said-thumbs.jsonl")
    assert record["prompt"] == [{"role": "system", "content": "be brief"}, *TALK]


def test_a_long_conversation_is_taken_and_an_endless_one_is_not(chat):
    client = chat(1)
    for n, status in ((200_000, 200), (2**20, 413)):
        body = {"messages": [{"role": "user", "content": "x" * n}], "model": 0, "history": ["?"]}
        assert client.post("/api/reply", json=body).status_code == status


def test_a_base_model_and_three_models_are_refused(tmp_path, capsys):
    base = str(save(tmp_path / "base", "gpt", make_gpt(1), chat=False))
    config = lambda names: serve.Config(
        models=names, to=str(tmp_path / "x"), device="cpu", dtype="float32"
    )
    assert "base model" in refused(capsys, serve.Chat, config([base]))
    assert "3 models" in refused(capsys, serve.Chat, config(["a", "b", "c"]))
    assert torch.is_grad_enabled()
