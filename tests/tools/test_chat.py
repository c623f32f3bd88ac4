"""The chat keeps the conversation, and forgets whole turns."""

import pytest

from nanorlhf.config import from_cli
from nanorlhf.data import dialogue
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import chat
from tests.tools import test_evaluate
from tests.tools.test_evaluate import make_gpt, save
from train_ppo import Config as TrainPPO

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
    chat.main(chat.Config(model=model, device="cpu", dtype="float32", max_new_tokens=8, **flags))
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
    asked = talk(monkeypatch, model, ["hi", "yo"], keep_turns="no")
    assert [ids for ids, _ in asked] == [
        dialogue.encode_prompt(BYTES, [("user", text)]) for text in ("hi", "yo")
    ]


@pytest.mark.parametrize("turns, keeps", [(1, False), (3, True), (None, True)])
def test_a_conversation_is_kept_where_the_training_data_had_some(tmp_path, capsys, turns, keeps):
    """Also by a model that started from such a one; of one that does not say it nothing is known,
    and the user decides."""
    gpt, known = make_gpt(1), {} if turns is None else {"user_turns": turns}
    saved = {"first": True, "best": True}
    for stage, about in (("sft", known), ("ppo", {})):
        cfg = TrainPPO(out_dir=f"{tmp_path}/{stage}", init=f"{tmp_path}/sft")
        weights = gpt.state_dict()
        checkpoint.save(cfg, stage, 1, weights, {}, BYTES, gpt.config, **saved, about=about)
    found = checkpoint.load(tmp_path / "ppo")
    assert chat.keeps_turns(chat.Config(), found) == keeps
    assert ("single questions" in capsys.readouterr().out) == (turns == 1)
    assert chat.keeps_turns(chat.Config(keep_turns="yes"), found)
    assert not chat.keeps_turns(chat.Config(keep_turns="no"), found)


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(model, monkeypatch, capsys):
    """What was stopped is no part of the conversation."""
    said, asked = iter(["hi", "stop", "yo", KeyboardInterrupt]), []

    def read(prompt):
        word = next(said)
        if word is KeyboardInterrupt:
            raise word
        return word

    def sample(gpt, tokenizer, prompts, *args):
        asked.append(tokenizer.decode(prompts[0]))
        if "stop" in asked[-1] and "yo" not in asked[-1]:
            raise KeyboardInterrupt
        return [tokenizer.encode("A")]

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "sample_responses", sample)
    chat.main(from_cli(chat.Config, [str(model), "--device", "cpu", "--max_new_tokens", "8"]))
    assert "stop" in asked[1] and "stop" not in asked[2] and "yo" in asked[2]
    said = capsys.readouterr()
    assert "(stopped" in said.out and "--resume" not in said.out + said.err


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns_whole():
    turns = [("user", "a" * 10), ("assistant", "b" * 10), ("user", "c" * 10)]
    kept, ids = chat.what_fits(BYTES, "", turns, ROOM)
    assert kept == turns and len(ids) == 35
    kept, ids = chat.what_fits(BYTES, "", turns, 34)
    assert kept == turns[2:] and ids == dialogue.encode_prompt(BYTES, turns[2:])
    kept, ids = chat.what_fits(BYTES, "s", turns, 34)  # what the system says never leaves
    assert ids == dialogue.encode_prompt(BYTES, [("user", "s\n\n" + "c" * 10)])
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
