"""`data` shows what will be learned."""

import json
from pathlib import Path

import pytest

from nanorlhf.config import from_cli
from nanorlhf.tools import data as data_tool
from tests.helpers import refused
from tests.tools import test_evaluate

FIXTURES = Path(__file__).parents[1] / "fixtures"
fork = test_evaluate.fork  # the fixture


def shown(capsys, name, *flags):
    data_tool.main(from_cli(data_tool.Config, [str(FIXTURES / name), *flags]))
    return capsys.readouterr().out


def test_data_marks_exactly_the_tokens_that_carry_loss(model, capsys):
    out = shown(capsys, "messages.jsonl", "--init", model, "--max_tokens", "2000")
    record = json.loads((FIXTURES / "messages.jsonl").read_text().splitlines()[0])
    ask, say = (m["content"] for m in record["messages"])
    bar = "|".join
    assert f"<|user|>|{bar(ask)}|<|assistant|>[{bar(say)}|<|endoftext|>]" in out
    assert "2 records read as 'messages'" in out
    assert f"What train_sft.py reads, in tokens of {model}, apart by |; in [] what carries" in out
    assert "1 examples to train on and 1 held out" in out


def test_data_marks_where_a_reward_model_reads_its_score(model, capsys):
    out = shown(capsys, "hh_rlhf.jsonl", "--init", model, "--max_tokens", "2000")
    assert "What train_rm.py reads" in out and out.count("[<|endoftext|>]") == 3  # three examples


def test_data_counts_what_the_context_cuts(model, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (1, 10, 11, 20, 500)))
    out = shown(capsys, path, "--init", model, "--block_size", "12")  # 2 ids of the template each
    assert "mean 110.4, half up to 13, 95 % up to 502, longest 502" in out
    assert "3 of 5 exceed the context of 12" in out


def test_data_shows_each_stage_what_it_would_read(model, capsys):
    for stage in ("gpt", "sft", "ppo"):
        out = shown(capsys, "hh_rlhf.jsonl", "--init", model, "--stage", stage)
        assert f"What train_{stage}.py reads" in out
        assert ("documents" if stage == "gpt" else "held out") in out
    with pytest.raises(SystemExit) as stop:
        shown(capsys, "prompts.jsonl", "--init", model, "--stage", "rm")
    assert stop.value.code == 2 and "no judgement in it" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.name for p in FIXTURES.iterdir()))
def test_data_shows_every_published_shape(name, model, capsys):
    out = shown(capsys, name, "--init", model)
    assert " records read as '" in out and "tokens per row: mean" in out


def test_data_needs_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "lengths are in bytes" in shown(capsys, "alpaca.json")
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo")
    data_tool.main(data_tool.Config(str(path)))
    assert "2 records read as 'text'" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["", "nothing.jsonl"])
def test_data_refuses_what_is_not_there(argument, capsys):
    refused(capsys, data_tool.main, data_tool.Config(argument))


@pytest.mark.parametrize("name, content", [("a.txt", "\x1f"), ("a.jsonl", '{"text": ""}\n' * 2)])
def test_a_file_that_leaves_nothing_to_show_is_refused(tmp_path, model, capsys, name, content):
    """Python takes the first for white space, and bytes do not."""
    path = tmp_path / name
    path.write_text(content)
    call = lambda: data_tool.main(data_tool.Config(str(path), init=str(model)))
    assert path.name in refused(capsys, call) if name == "a.txt" else call() is None


def test_data_names_the_columns_that_the_shape_does_not(tmp_path, model, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "odd": 1, "id": 7}\n')
    data_tool.main(data_tool.Config(str(path), init=str(model)))
    assert "other columns: id, odd" in capsys.readouterr().out


def test_what_a_file_holds_is_shown_and_not_obeyed(tmp_path, model, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a\x1b[2Kb", "od\x1b[1Ad": 1}) + "\n")
    out = shown(capsys, path, "--init", model)
    assert "\x1b" not in out and "other columns: od\\x1b[1Ad" in out and "a|\\x1b|[|2|K|b" in out


def test_data_counts_in_the_tokens_of_a_fork(fork, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 300}) + "\n")
    data_tool.main(from_cli(data_tool.Config, [str(path), "--init", str(fork)]))
    assert "1 of 1 exceed the context of 200" in capsys.readouterr().out
