"""The chat keeps the conversation, and forgets whole turns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanorlhf import speaker
from nanorlhf.config import from_cli, visible
from nanorlhf.data import dialogue
from nanorlhf.llama import LlamaConfig
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.speaker import keeps_turns, load_speaker, what_fits
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import chat
from tests.tools import test_evaluate
from tests.tools.test_evaluate import make_gpt, save
from train_ppo import Config as TrainPPO

BYTES = byte_tokenizer()
ROOT = Path(__file__).parents[2]
ROOM = 40
fork = test_evaluate.fork  # the fixture


def talk(monkeypatch, model, typed, answer=None, **flags):
    """What the model is given at each turn of a conversation. `answer`: what it says."""
    typed, prompts, real = iter(typed), [], speaker.stream

    def stream(gpt, prompt, *args):
        prompts.append(prompt[0].tolist())
        return real(gpt, prompt, *args) if answer is None else answer(prompts[-1])

    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or leave())
    monkeypatch.setattr(speaker, "stream", stream)
    chat.main(chat.Config(model=str(model), device="cpu", dtype="float32", **flags))
    return prompts


def leave():
    raise EOFError


def test_the_chat_keeps_the_conversation(model, monkeypatch, capsys):
    (first, second) = talk(monkeypatch, model, ["hi", "yo"], max_new_tokens=8)
    assert first == dialogue.encode_prompt(BYTES, [("user", "hi")])
    gpt, _ = load_speaker(chat.Config(device="cpu", dtype="float32"), model)
    (ids,) = sample_responses(gpt, BYTES, [first], 8, 1, 0, 0.7, 0, 0.95)  # all at once
    reply = BYTES.decode(ids)
    assert f"\n{reply}\n" in capsys.readouterr().out
    turns = [("user", "hi"), ("assistant", reply), ("user", "yo")]
    wanted = dialogue.encode_prompt(BYTES, turns)
    assert second == (wanted if len(wanted) <= ROOM else dialogue.encode_prompt(BYTES, turns[2:]))


def test_without_keep_turns_every_question_is_the_first(model, monkeypatch):
    prompts = talk(monkeypatch, model, ["hi", "yo"], keep_turns="no", max_new_tokens=8)
    assert prompts == [dialogue.encode_prompt(BYTES, [("user", text)]) for text in ("hi", "yo")]


@pytest.mark.parametrize("turns, keeps", [(1, False), (3, True), (None, True)])
def test_a_conversation_is_kept_where_the_training_data_had_some(tmp_path, capsys, turns, keeps):
    """Also by a model that started from such a one; of one that does not say it nothing is known,
    and the user decides."""
    gpt, known = make_gpt(1), {} if turns is None else {"user_turns": turns}
    for stage, details in (("sft", known), ("ppo", {})):
        cfg = TrainPPO(out_dir=f"{tmp_path}/{stage}", init=f"{tmp_path}/sft")
        Path(cfg.out_dir).mkdir()
        checkpoint.save(cfg, stage, 1, gpt.state_dict(), {}, BYTES, gpt.config, details=details)
    loaded = checkpoint.load(tmp_path / "ppo")
    assert keeps_turns(chat.Config(), loaded) == keeps
    assert (f"{turns} questions" in capsys.readouterr().out) == bool(turns)
    assert keeps_turns(chat.Config(keep_turns="yes"), loaded)
    assert not keeps_turns(chat.Config(keep_turns="no"), loaded)


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(model, monkeypatch, capsys):
    """What was stopped is no part of the conversation."""

    def answer(prompt):
        yield from BYTES.encode("A")
        text = BYTES.decode(prompt)
        if "stop" in text and "yo" not in text:
            raise KeyboardInterrupt

    prompts = talk(monkeypatch, model, ["hi", "stop", "yo"], answer, max_new_tokens=8)
    texts = [BYTES.decode(ids) for ids in prompts]
    assert "stop" in texts[1] and "stop" not in texts[2] and "yo" in texts[2]
    printed = capsys.readouterr()
    assert "A\n(stopped" in printed.out and "--resume" not in printed.out + printed.err

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    chat.main(from_cli(chat.Config, [str(model), "--device", "cpu", "--max_new_tokens", "8"]))


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns_whole():
    turns = [("user", "a" * 10), ("assistant", "b" * 10), ("user", "c" * 10)]
    n = len(dialogue.encode_prompt(BYTES, turns))
    assert what_fits(BYTES, turns, n) == turns
    assert what_fits(BYTES, turns, n - 1) == what_fits(BYTES, turns[2:], 5) == turns[2:]
    assert what_fits(BYTES, turns, n, [("system", "s")]) == turns[2:]


def test_what_the_system_says_never_leaves_and_a_long_question_loses_its_left(model):
    cfg = chat.Config(device="cpu", dtype="float32", max_new_tokens=8, system="s")
    talker = speaker.Speaker(cfg, model)
    asked = dialogue.encode_prompt(BYTES, [("system", "s"), ("user", "c" * 10)])
    turns = [("user", "a" * 20), ("assistant", "b" * 10), ("user", "c" * 10)]
    assert talker.prompt_ids(turns) == asked and talker.remembered(turns) == turns[2:]
    long = [("user", "c" * 100)]
    assert talker.prompt_ids(long) == dialogue.encode_prompt(BYTES, talker.system + long)[-ROOM:]
    assert talker.remembered(long) == long


HIDING = "\x1b[2K\x1b[1A\rhidden\x9b1A\u202eback\x00"
SHOWN = r"\x1b[2K\x1b[1A\rhidden\x9b1A\u202eback\x00"


def test_escape_codes_are_shown_and_not_obeyed(model, monkeypatch, capsys):
    talk(monkeypatch, model, ["hi"], lambda prompt: iter(BYTES.encode(HIDING)), max_new_tokens=40)
    printed = capsys.readouterr().out
    assert f"\n{SHOWN}\n" in printed and HIDING[:4] not in printed


def test_piped_replies_stand_alone(model):
    """Without the '> ' that asks a person, whose words a terminal shows."""
    command = [sys.executable, "-m", "nanorlhf", "chat", str(model), "--temperature", "0"]
    command += ["--device", "cpu", "--max_new_tokens", "4"]
    done = subprocess.run(command, input="hi\nyo\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "> " not in done.stdout
    cfg = chat.Config(device="cpu", dtype="float32", max_new_tokens=4)
    reply = visible("".join(speaker.Speaker(cfg, model).answer([("user", "hi")], 0, 0)))
    assert f"leaves\n{reply}\n" in done.stdout


def test_somebody_elses_model_is_called_by_its_kind(tmp_path, monkeypatch, capsys):
    base = save(tmp_path / "mine", "gpt", make_gpt(1), chat=False)
    talk(monkeypatch, base, [], max_new_tokens=8)
    assert "(GPT)" in capsys.readouterr().out
    torch.manual_seed(1)
    config = LlamaConfig(BYTES.vocab_size, 48, 1, 2, 16)
    base = save(tmp_path / "theirs", "gpt", config.build(), chat=False)
    talk(monkeypatch, base, [], max_new_tokens=8)
    assert "(Llama)" in capsys.readouterr().out


def test_a_fork_is_talked_to_in_the_template_unless_it_is_a_base_model(
    fork, tmp_path, monkeypatch, capsys
):
    letter = lambda prompt: iter(BYTES.encode("A"))
    prompts = talk(monkeypatch, fork, ["hello"], letter)
    assert prompts == [dialogue.encode_prompt(BYTES, [("user", "hello")])]
    printed = capsys.readouterr().out
    assert "(rloo)" in printed and "\nA\n" in printed
    base = save(tmp_path / "mine", "pretrained", make_gpt(1), chat=False)
    assert talk(monkeypatch, base, ["hello"], letter) == [[BYTES.eos_id, *BYTES.encode("hello")]]
    assert "\nhelloA\n" in capsys.readouterr().out
