"""The chat keeps the conversation, and forgets whole turns."""

from nanorlhf.config import from_cli
from nanorlhf.data import dialogue
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import chat
from tests.tools import test_evaluate
from tests.tools.test_evaluate import make_gpt, save

BYTES = byte_tokenizer()
ROOM = 40
fork = test_evaluate.fork  # the fixture


def talk(monkeypatch, model, said, **flags):
    """What the model is given at each turn of a conversation, and what it answers."""
    said, asked = iter(said), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, None) or eof())
    real = chat.sample_responses

    def sample(gpt, tokenizer, prompts, *args):
        found = real(gpt, tokenizer, prompts, *args)
        asked.append((prompts[0], tokenizer.decode(found[0])))
        return found

    monkeypatch.setattr(chat, "sample_responses", sample)
    chat.main(chat.Config(model, device="cpu", dtype="float32", max_new_tokens=8, **flags))
    return asked


def eof():
    raise EOFError


def test_the_chat_keeps_the_conversation(model, monkeypatch):
    (first, a), (second, _) = talk(monkeypatch, model, ["hi", "yo"])
    turns = [("user", "hi"), ("assistant", a), ("user", "yo")]
    assert first == dialogue.encode_prompt(BYTES, turns[:1])
    wanted = dialogue.encode_prompt(BYTES, turns)
    assert second == (wanted if len(wanted) <= ROOM else dialogue.encode_prompt(BYTES, turns[2:]))


def test_without_keep_turns_every_question_is_the_first(model, monkeypatch):
    asked = talk(monkeypatch, model, ["hi", "yo"], keep_turns=False)
    assert [ids for ids, _ in asked] == [
        dialogue.encode_prompt(BYTES, [("user", text)]) for text in ("hi", "yo")
    ]


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns_whole():
    turns = [("user", "a" * 10), ("assistant", "b" * 10), ("user", "c" * 10)]
    kept, ids = chat.what_fits(BYTES, "", turns, ROOM)
    assert kept == turns and len(ids) == 35
    kept, ids = chat.what_fits(BYTES, "", turns, 34)
    assert kept == turns[2:] and ids == dialogue.encode_prompt(BYTES, turns[2:])
    kept, ids = chat.what_fits(BYTES, "sys", turns, 34)  # what the system says never leaves
    assert ids == dialogue.encode_prompt(BYTES, [("user", "sys" + "c" * 10)])
    kept, ids = chat.what_fits(BYTES, "", turns[2:], 5)
    assert ids == dialogue.encode_prompt(BYTES, turns[2:])[-5:]


def given_to(monkeypatch, folder):
    """What a model is given when one word is typed."""
    typed, given = iter(["hello"]), []

    def ask(_):
        for word in typed:
            return word
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(chat, "sample_responses", lambda g, t, ids, *a: given.extend(ids) or [[65]])
    chat.main(from_cli(chat.Config, [str(folder), "--device", "cpu"]))
    return given


def test_a_fork_is_talked_to_in_the_template_unless_it_is_a_base_model(
    fork, tmp_path, monkeypatch, capsys
):
    assert given_to(monkeypatch, fork) == [dialogue.encode_prompt(BYTES, [("user", "hello")])]
    printed = capsys.readouterr().out
    assert "(rloo)" in printed and "\nA\n" in printed
    base = save(tmp_path / "mine", "pretrained", make_gpt(1), chat=False)
    assert given_to(monkeypatch, base) == [[BYTES.eos_id, *BYTES.encode("hello")]]
    assert "\nhelloA\n" in capsys.readouterr().out
