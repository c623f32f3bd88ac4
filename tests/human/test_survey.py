"""survey.py and journal.py: an answer is kept once, on the disk, as train_rm.py reads it."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.examples import load_demonstrations, load_feedback, load_prompts
from nanorlhf.human import journal as journal_module
from nanorlhf.human import survey as survey_module
from nanorlhf.human.journal import Journal, Refused
from nanorlhf.human.questions import read_questions
from nanorlhf.human.survey import Survey
from tests.helpers import refused
from tests.human.conftest import records, write_samples

SAID = {
    "comparisons": [0, 1, -1],
    "rankings": [[1, 2, 3, 4], [2, 1, 1, 4]],
    "ratings": [[0, 5, 2.5, 1], [5, 5, 5, 5]],
    "thumbs": [[True, False, True, True]],
}
NONSENSE = [True, 2, -2, 0.0, "0", [], [1], {}, [0, 0], [1, 2, 3, 5], [1, 2, 3, float("nan")]]
NONSENSE += [[1, 2, 3, 10**400], [6, 0, 0, 0], [True, False], [[1], 2, 3, 4], ["1", "2", "3", "4"]]


def answer_all(survey, labeler, answers):
    """What was shown and what was said to it, for each question."""
    given = []
    while (asked := survey.next(labeler)[0]) is not None:
        said = answers[len(given) % len(answers)]
        survey.answer(labeler, asked.id, said)
        given.append((asked, said))
    return given


@pytest.mark.parametrize("kind", SAID)
def test_what_is_said_is_what_train_rm_reads(survey, kind):
    d = survey(kind)
    given = answer_all(d, "ann", SAID[kind])
    found, examples = load_feedback([d.journal.path])
    assert found == {"comparisons": "rankings"}.get(kind, kind)
    assert {e.labeler for e in examples} == {"ann"}
    read = [(e.messages[0][1], e.completions, e.target) for e in examples]
    wanted = []
    for asked, said in given:
        prompt, texts = asked.prompt, list(asked.responses)
        if kind == "comparisons":
            wanted.append((prompt, texts, {0: [1, 2], 1: [2, 1], -1: [1, 1]}[said]))
        elif kind == "rankings":
            wanted.append((prompt, texts, said))
        else:
            wanted += [(prompt, [text], [float(x)]) for text, x in zip(texts, said)]
    assert read == wanted and len(given) == {"comparisons": 24}.get(kind, 12)


def test_what_it_refers_to_is_in_the_record(survey):
    d = survey(models=("out/sft", "out/ppo"))
    asked = d.next("ann")[0]
    d.answer("ann", asked.id, 1)
    (record,) = records(d.journal.path)
    assert record["models"] == list(asked.models) and record["seed"] == 3
    assert record["completions"] == list(asked.responses)
    assert record["seconds"] >= 0 and record["time"].endswith("+00:00")


@pytest.mark.parametrize("kind", SAID)
def test_what_is_no_answer_is_refused_and_leaves_no_trace(survey, kind):
    d = survey(kind)
    asked = d.next("ann")[0]
    for said in NONSENSE:
        if kind == "ratings" and said == [1, 2, 3, 5]:
            continue
        with pytest.raises(Refused) as refusal:
            d.answer("ann", asked.id, said)
        assert refusal.value.status == 400
    assert d.journal.path.read_text() == "" and d.next("ann")[0].id == asked.id


def test_an_answer_stands_until_it_is_taken_back(survey):
    d = survey()
    first = d.next("ann")[0]
    d.answer("ann", first.id, 0)
    with pytest.raises(Refused) as refusal:
        d.answer("ann", first.id, 1)
    assert refusal.value.status == 409
    second = d.next("ann")[0]
    assert second.id != first.id and d.next("bob")[1] == {"answered": 0, "total": 24}
    assert d.undo("ann") == first.id and d.next("ann")[0].id == first.id
    d.answer("ann", first.id, 1)
    _, (example,) = load_feedback([d.journal.path])
    assert example.target == [2, 1]
    for name in ("bob", "nobody"):
        with pytest.raises(Refused) as refusal:
            d.undo(name)
        assert refusal.value.status == 409


def test_another_labelers_id_is_no_question(survey):
    d = survey()
    with pytest.raises(Refused) as refusal:
        d.answer("bob", d.next("ann")[0].id, 0)
    assert refusal.value.status == 400


def test_a_skipped_question_is_not_asked_again_and_no_judgement(survey):
    d = survey(n=1)
    ids = [d.next("ann")[0].id]
    d.answer("ann", ids[0], None)
    ids.append(d.next("ann")[0].id)
    assert ids[0] != ids[1]
    d.answer("ann", ids[1], 0)
    assert d.next("ann")[0] is None
    assert len(load_feedback([d.journal.path])[1]) == 1
    assert d.undo("ann") == ids[1] and d.undo("ann") == ids[0]
    assert d.next("ann")[0].id == ids[0]


@given(st.lists(st.sampled_from([0, 1, -1, None, "undo", "restart"]), max_size=40))
def test_no_order_of_answers_undos_and_restarts_loses_or_doubles_one(said):
    """Against a list that remembers; the file is read as every stage reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.jsonl")
        questions = read_questions(write_samples(Path(folder, "s.jsonl"), 5), "comparisons")
        journal = Journal(path, "comparisons")
        d, standing = Survey(questions, journal, "comparisons", repeat=0.5), []
        for word in said:
            if word == "restart":
                os.close(journal.fd)
                journal = Journal(path, "comparisons")
                d = Survey(questions, journal, "comparisons", repeat=0.5)
            elif word == "undo" and standing:
                assert d.undo("ann") == standing.pop()[0]
            elif word != "undo" and (asked := d.next("ann")[0]):
                d.answer("ann", asked.id, word)
                standing.append((asked.id, word))
        os.close(journal.fd)
        wanted = [{0: [1, 2], 1: [2, 1], -1: [1, 1]}[w] for _, w in standing if w is not None]
        if wanted:
            assert [e.target for e in load_feedback([path])[1]] == wanted
        elif path.stat().st_size:
            with pytest.raises(SystemExit):
                load_feedback([path])


def test_every_reader_honours_what_was_taken_back(survey):
    d = survey("ratings", n=3)
    kept, taken = d.next("ann")[0], None
    d.answer("ann", kept.id, [1, 2, 3, 4])
    taken = d.next("ann")[0]
    d.answer("ann", taken.id, [5, 5, 5, 5])
    d.undo("ann")
    prompt = kept.prompt
    for load in (load_prompts, load_demonstrations):
        assert {e.messages[0][1] for e in load([d.journal.path])} == {prompt}
    assert len(load_feedback([d.journal.path])[1]) == 4


def test_a_new_program_goes_on_where_the_old_one_stopped(survey):
    d = survey(repeat=0.5)
    order = [a.id for a, _ in answer_all(d, "ann", [0])]
    d.journal.path.unlink()
    d = survey(repeat=0.5)
    for _ in range(7):
        d.answer("ann", d.next("ann")[0].id, 1)
    again = survey(repeat=0.5)
    assert again.next("ann")[0].id == order[7]
    assert again.next("ann")[1]["answered"] == 7
    assert again.undo("ann") == order[6]


@pytest.mark.parametrize("kind", ["comparisons", "ratings"])
def test_a_half_written_line_is_removed_and_whole_ones_stay(survey, capsys, kind):
    """Wherever the end is cut off."""
    d = survey(kind, n=3)
    answer_all(d, "ann", SAID[kind])
    whole = d.journal.path.read_bytes()
    *lines, last = whole.splitlines(keepends=True)
    before = b"".join(lines)
    for cut in range(len(before) + 15, len(whole), 7):
        d.journal.path.write_bytes(whole[:cut])
        d = survey(kind, n=3)
        assert d.journal.path.read_bytes() == before, cut
        assert "never finished" in capsys.readouterr().err
    assert (d.next("ann")[0] is None) == (kind == "ratings")  # three of its four lines stand
    for cut in range(15, len(lines[0]), 7):  # nothing but a part of one answer
        d.journal.path.write_bytes(whole[:cut])
        assert survey(kind, n=3).journal.path.read_bytes() == b""


@pytest.mark.parametrize(
    "text",
    [b'{"precious": 1}', b'{"a": 1}\n{"b": 2}', b"notes", b"[1]\n", b'{"judged": 1', b"x\n\n"],
)
def test_a_file_of_somebody_elses_stays_as_it_is(tmp_path, capsys, text):
    path = tmp_path / "f.jsonl"
    path.write_bytes(text)
    with pytest.raises(SystemExit):
        Journal(path, "comparisons")
    assert path.read_bytes() == text


@pytest.mark.parametrize("line", ["{broken", '"text"', "[1]", '{"part": 3}', '{"part": "ab"}'])
def test_a_broken_last_line_of_our_own_is_named_and_stays(survey, capsys, line):
    d = survey(n=1)
    answer_all(d, "ann", [0])
    text = d.journal.path.read_text() + line + "\n"
    d.journal.path.write_text(text)
    assert f"{d.journal.path}:3" in refused(capsys, survey, n=1)
    assert d.journal.path.read_text() == text


@pytest.mark.parametrize("words", ['[{"role"', '[{"role":"user"}]', " [ {'from': 1"])
def test_no_name_and_no_text_makes_the_file_unreadable(tmp_path, words):
    samples = tmp_path / "s.jsonl"
    row = {"messages": [{"role": "user", "content": words}], "responses": [words, words + "!"]}
    samples.write_text(json.dumps(row) + "\n")
    path = tmp_path / "f.jsonl"
    for _ in range(2):
        journal = Journal(path, "ratings")
        d = Survey(read_questions(samples, "ratings"), journal, "ratings")
        if asked := d.next(words)[0]:
            d.answer(words, asked.id, [1, 5])
        os.close(journal.fd)
    _, examples = load_feedback([path])
    assert [e.completions for e in examples] == [[t] for t in asked_texts(path)]
    assert {e.labeler for e in examples} == {words} and examples[0].messages == [("user", words)]


def asked_texts(path):
    return [r["completion"] for r in records(path)]


def test_what_cannot_be_asked_again_is_not_taken_back(survey, tmp_path):
    """Answers about samples that are gone stand."""
    d = survey(n=3)
    answer_all(d, "ann", [0])
    d = survey(n=3, models=("b", "b", "c", "c"), seed=9)  # the same file, other questions
    with pytest.raises(Refused) as refusal:
        d.undo("ann")
    assert refusal.value.status == 409
    d.answer("ann", d.next("ann")[0].id, 1)
    d.undo("ann")
    with pytest.raises(Refused):
        d.undo("ann")


def test_an_answer_is_on_the_disk_before_it_is_confirmed(survey, monkeypatch):
    d, done = survey(), []
    monkeypatch.setattr(journal_module.os, "fsync", lambda fd: done.append(os.fstat(fd).st_size))
    d.answer("ann", d.next("ann")[0].id, 0)
    assert done == [d.journal.path.stat().st_size] != [0]


def test_a_file_that_an_editor_replaced_takes_no_more_answers(survey):
    """Its old contents, without a name, would swallow them."""
    d = survey()
    d.answer("ann", d.next("ann")[0].id, 0)
    text = d.journal.path.read_bytes()
    d.journal.path.unlink()
    for write in (lambda: None, lambda: d.journal.path.write_bytes(text)):
        write()
        with pytest.raises(Refused) as refusal:
            d.answer("ann", d.next("ann")[0].id, 0)
        assert refusal.value.status == 507
    d = survey()
    assert d.next("ann")[1]["answered"] == 1


def test_a_full_disk_refuses_the_answer_and_keeps_the_file_as_it_was(survey, monkeypatch):
    d = survey("ratings")
    first = d.next("ann")[0]
    d.answer("ann", first.id, [1, 2, 3, 4])
    before = d.journal.path.read_bytes()
    write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: write(fd, data[:50]))
    with pytest.raises(Refused) as refusal:
        d.answer("ann", d.next("ann")[0].id, [1, 2, 3, 4])
    assert refusal.value.status == 507 and d.journal.path.read_bytes() == before

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    second = d.next("ann")[0]
    with pytest.raises(Refused, match="No space left"):
        d.answer("ann", second.id, [1, 2, 3, 4])
    monkeypatch.undo()
    d.answer("ann", second.id, [1, 2, 3, 4])
    assert len(load_feedback([d.journal.path])[1]) == 8


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]},
        {"judgement_id": "x", "labeler": "a", "label": True},
    ],
)
def test_answers_are_not_mixed_with_anything_else(line, tmp_path, capsys):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert "not one of the comparisons" in refused(capsys, Journal, path, "comparisons")


def test_a_second_program_cannot_write_to_the_same_file(survey, capsys):
    d = survey()
    with pytest.raises(SystemExit) as end:
        Journal(d.journal.path, "comparisons")
    assert end.value.code == 2 and "another program" in capsys.readouterr().err


def test_time_is_taken_from_the_first_look(survey, monkeypatch):
    d, now = survey(), [100.0]
    monkeypatch.setattr(survey_module.time, "monotonic", lambda: now[0])
    asked = d.next("ann")[0]
    now[0] = 103.26
    d.next("ann")  # a reload
    now[0] = 104.5
    d.answer("ann", asked.id, 0)
    assert records(d.journal.path)[0]["seconds"] == 4.5
