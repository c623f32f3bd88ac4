"""label: from models or a file to questions, and answers without a browser."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanorlhf.data.examples import load_feedback
from nanorlhf.human import terminal
from nanorlhf.tools import label
from tests.helpers import refused
from tests.human.conftest import call, records, write_samples
from tests.tools.test_evaluate import make_gpt, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def samples(tmp_path):
    return str(write_samples(tmp_path / "samples.jsonl", 3))


def config(*models, **flags):
    limits = {"device": "cpu", "dtype": "float32", "max_new_tokens": 4}
    return label.Config(models=list(models), **limits, **flags)


def type_in(monkeypatch, *lines):
    said = iter(lines)
    monkeypatch.setattr("builtins.input", lambda question: next(said))


@pytest.mark.parametrize(
    "kind, lines, wanted",
    [
        ("comparisons", ["1", "2", "t"], [[1, 2], [2, 1], [1, 1]]),
        ("rankings", ["2 1 3 4", "1 1 1 2"], [[2, 1, 3, 4], [1, 1, 1, 2]]),
        ("ratings", ["0 5 2.5 1"], [[0], [5], [2.5], [1]]),
        ("thumbs", ["y n n y"], [[1], [0], [0], [1]]),
    ],
)
def test_the_terminal_asks_the_same(samples, tmp_path, monkeypatch, capsys, kind, lines, wanted):
    type_in(monkeypatch, "nonsense", "9 9 9 9", "2 1", lines[0], "u", *lines, "q")
    to = tmp_path / "f.jsonl"
    label.main(config(samples, to=str(to), feedback=kind, terminal=True, labeler="ann"))
    assert [e.target for e in load_feedback([to])[1]] == wanted
    shown = capsys.readouterr().out
    assert "user: Question" in shown and "-- reply 2\nanswer" in shown
    assert shown.count("is no answer") + shown.count("the answer must") == 3


def test_the_terminal_goes_on_and_ends(samples, tmp_path, monkeypatch, capsys):
    to = tmp_path / "f.jsonl"
    for lines in (["ann", "1", "s", "q"], ["ann", "2", "2", "2", "2"]):
        type_in(monkeypatch, *lines)
        cfg = config(samples, to=str(to), terminal=True)
        survey, _ = label.prepare(cfg)
        terminal.ask(survey, cfg.labeler, "")
        os.close(survey.journal.fd)
    assert len(records(to)) == 6 and len(load_feedback([to])[1]) == 5
    assert "nothing is left" in capsys.readouterr().out


def test_the_terminal_shows_escape_codes_and_says_what_undo_took_back(
    tmp_path, monkeypatch, capsys
):
    path, to = tmp_path / "s.jsonl", tmp_path / "f.jsonl"
    row = {"prompt": "\x1b]0;title\x07", "responses": ["\x1b[1A\x1b[2Ka", "b\rc"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "q"}) + "\n")
    type_in(monkeypatch, "t", "u", "q")
    flags = {"to": str(to), "terminal": True, "labeler": "ann", "guidelines": str(path)}
    label.main(config(str(path), **flags))
    shown = capsys.readouterr().out
    assert "(taken back: a tie)" in shown and not {"\x1b", "\r", "\x07"} & set(shown)
    assert {"user: \\x1b]0;title\\x07", "\\x1b[1A\\x1b[2Ka", "b\\rc"} <= set(shown.split("\n"))


def test_models_answer_first_and_only_once(model, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "hi"}\n{"prompt": "yo"}\n')
    cfg = config(model, data=[str(data)], to=str(tmp_path / "f.jsonl"), terminal=True)
    survey, _ = label.prepare(cfg)
    os.close(survey.journal.fd)
    made = (tmp_path / "f.samples.jsonl").read_text()
    assert [r["models"] for r in map(json.loads, made.splitlines())] == [[model] * 4] * 2
    data.write_text('{"prompt": "other"}\n')
    again, _ = label.prepare(cfg)
    os.close(again.journal.fd)
    assert (tmp_path / "f.samples.jsonl").read_text() == made
    assert again.next("ann")[0].id == survey.next("ann")[0].id


def start(*flags):
    """(a server of its own, the first line that it prints)."""
    pytest.importorskip("flask")
    command = [sys.executable, "-m", "nanorlhf", "label", *flags, "--port", "0"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    return server, server.stdout.readline().strip()


def answer_one(address):
    asked = call(f"{address}api/next?labeler=ann")
    if "id" in asked:
        said = {"id": asked["id"], "labeler": "ann", "answer": 1}
        call(f"{address}api/answer", said)
    return asked.get("id")


def test_the_first_line_is_the_address_and_a_kill_loses_nothing(samples, tmp_path):
    """A server that is killed between two answers and started again."""
    to, given = tmp_path / "f.jsonl", []
    for _ in range(2):
        server, address = start(samples, "--to", str(to))
        assert address.startswith("http://127.0.0.1:")
        given += [answer_one(address) for _ in range(2)]
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert [r["judgement_id"] for r in records(to)] == given and len(set(given)) == 4


def test_the_simulated_labeler_judges_the_worlds_stories_and_the_program_ends(tmp_path):
    to, sft = tmp_path / "f.jsonl", save(tmp_path / "sft", "sft", make_gpt(2))
    flags = {"prompts": 5, "port": 0, "labeler": "simulated"}
    label.main(config(str(sft), to=str(to), **flags))
    assert [r["labeler"] for r in records(to)] == ["simulated"] * 10


@pytest.mark.slow
def test_once_ends_the_program_when_somebody_is_done_also_before_it_began(samples, tmp_path):
    to = tmp_path / "f.jsonl"
    for n_asked in (6, 0):  # the second time everything has been answered
        server, address = start(samples, "--to", str(to), "--once", "--labeler", "ann")
        assert address.endswith("/?labeler=ann")
        for _ in range(n_asked):
            assert answer_one(address.partition("?")[0])
        if n_asked:
            assert not answer_one(address.partition("?")[0])  # heard before the end
        assert server.wait(timeout=30) == 0
    assert len(records(to)) == 6


def test_samples_of_another_model_or_seed_are_not_asked_about_in_silence(model, tmp_path, capsys):
    cfg = config(model, to=str(tmp_path / "f.jsonl"), terminal=True)
    write_samples(tmp_path / "f.samples.jsonl", 3, (model,) * 4)  # of seed 3
    for flags in ({"seed": 1}, {"seed": 3, "models": [f"{model}/step_1"]}):
        message = refused(capsys, label.samples_of, replace(cfg, **flags), tmp_path / "f.jsonl")
        assert "remove it" in message
    (tmp_path / "g.samples.jsonl").write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    message = refused(capsys, label.samples_of, cfg, tmp_path / "g.jsonl")
    assert "remove it" in message
    found = label.samples_of(replace(cfg, seed=3), tmp_path / "f.jsonl")
    assert found == tmp_path / "f.samples.jsonl"


def test_where_answers_go_by_default_and_guidelines_that_are_nowhere(
    samples, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    cfg = config(samples, feedback="thumbs", terminal=True)
    survey, _ = label.prepare(cfg)
    assert survey.journal.path == Path("out/feedback/samples-thumbs.jsonl")
    os.close(survey.journal.fd)
    cfg = replace(cfg, models=["Qwen2.5-0.5B/", "hf:owner/SmolLM2-1.7B"])
    monkeypatch.setattr(label, "samples_of", lambda cfg, to: samples)
    survey, guidelines = label.prepare(cfg)
    name = "Qwen2.5-0.5B-SmolLM2-1.7B-thumbs.jsonl"  # whole, and not Qwen2
    assert survey.journal.path == Path("out/feedback", name)
    assert "harms nobody" in guidelines and "better is the one" in guidelines
    os.close(survey.journal.fd)
    cfg = replace(cfg, guidelines="nowhere.txt")
    assert "--guidelines nowhere.txt" in refused(capsys, label.prepare, cfg)
