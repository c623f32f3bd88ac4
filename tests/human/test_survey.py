"""survey.py and journal.py: an answer is kept once, on the disk, as train_rm.py reads it."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data import world
from nanorlhf.data.examples import load_demonstrations, load_feedback, load_prompts
from nanorlhf.human import journal as journal_module
from nanorlhf.human import simulated
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
SAID_AS = {0: "reply 1 is better", 1: "reply 2 is better", -1: "a tie", None: "a skip"}
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


def not_taken(status, *call):
    """Why an answer is refused."""
    with pytest.raises(Refused) as refusal:
        call[0](*call[1:])
    assert refusal.value.status == status
    return str(refusal.value)


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


def test_what_it_refers_to_and_the_time_from_the_first_look_are_in_the_record(survey, monkeypatch):
    d, now = survey(models=("out/sft", "out/ppo")), [100.0]
    monkeypatch.setattr(survey_module.time, "monotonic", lambda: now[0])
    asked = d.next("ann")[0]
    now[0] = 103.26
    d.next("ann")  # a reload
    now[0] = 104.5
    d.answer("ann", asked.id, 1)
    (record,) = records(d.journal.path)
    assert record["models"] == list(asked.models) and record["seed"] == 3
    assert record["completions"] == list(asked.responses)
    assert record["seconds"] == 4.5 and record["time"].endswith("+00:00")


@pytest.mark.parametrize("kind", SAID)
def test_what_is_no_answer_is_refused_and_leaves_no_trace(survey, kind):
    d = survey(kind)
    asked = d.next("ann")[0]
    for said in NONSENSE:
        if kind == "ratings" and said == [1, 2, 3, 5]:
            continue
        not_taken(400, d.answer, "ann", asked.id, said)
    not_taken(400, d.answer, "bob", asked.id, SAID[kind][0])  # who was asked it by another id
    not_taken(409, d.undo, "bob")
    assert d.journal.path.read_text() == "" and d.next("ann")[0].id == asked.id


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
                id, word = standing.pop()
                assert d.undo("ann") == (id, SAID_AS[word])
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


OURS = b'{"judgement_id": "x", "labeler": "a", '


@pytest.mark.parametrize(
    "text",
    [b'{"precious": 1}', b'{"a": 1}\n{"b": 2}', b"notes", b"[1]\n", b'{"judged": 1', b"x\n\n"]
    + [OURS + b'"label": true}\n', OURS + b'"ranks": [1, 2]}\n{broken\n'],
)
def test_a_file_of_anything_else_is_named_and_stays_as_it_is(tmp_path, capsys, text):
    path = tmp_path / "f.jsonl"
    path.write_bytes(text)
    assert f"{path}:{1 + text.count(b'broken')}: " in refused(capsys, Journal, path, "comparisons")
    assert path.read_bytes() == text


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


def write_equal(path, n=10, equal=8):
    """n prompts with a response of each of two models, of which so many are equal."""
    line = lambda i: {
        "prompt": f"question {i}",
        "responses": ["the same"] * 2 if i < equal else [f"sft {i}", f"ppo {i}"],
        "models": ["out/sft", "out/ppo"],
    }
    path.write_text("".join(json.dumps(line(i)) + "\n" for i in range(n)))
    return path


@pytest.mark.parametrize("kind", ["comparisons", "rankings"])
def test_equal_answers_are_ties_that_nobody_is_asked_about(tmp_path, capsys, kind):
    """They come into the file as the labeler goes on, each once, also after an undo, and nobody
    learns from them but `agreement`."""
    questions = read_questions(write_equal(tmp_path / "s.jsonl"), kind)
    assert f"8 of 10 {kind} are of equal texts" in capsys.readouterr().out
    journal = Journal(tmp_path / "f.jsonl", kind)
    d = Survey(questions, journal, kind)
    ties = lambda: [r for r in records(journal.path) if r.get("skipped")]
    assert d.next("ann")[1] == {"answered": 0, "total": 2} and not ties()
    for n_ties in (4, 8):
        task = d.next("ann")[0]
        d.answer("ann", task.id, [1, 2] if kind == "rankings" else 0)
        assert len(ties()) == n_ties
        d.undo("ann")
        d.answer("ann", task.id, [2, 1] if kind == "rankings" else 1)
        assert len(ties()) == n_ties
    assert d.next("ann")[0] is None and {str(r["ranks"]) for r in ties()} == {"[1, 1]"}
    assert all(r["models"] == ["out/sft", "out/ppo"] for r in ties())
    assert len(load_feedback([journal.path])[1]) == len(load_prompts([journal.path])) == 2
    os.close(journal.fd)
    d = Survey(questions, Journal(journal.path, kind), kind)
    assert d.undo("ann") == (task.id, "reply 2 is better")
    os.close(d.journal.fd)


def test_ratings_of_a_text_of_two_models_are_of_both(tmp_path):
    journal = Journal(tmp_path / "f.jsonl", "ratings")
    d = Survey(
        read_questions(write_equal(tmp_path / "s.jsonl", 1, 1), "ratings"), journal, "ratings"
    )
    d.answer("ann", d.next("ann")[0].id, [4])
    (record,) = records(journal.path)
    assert record["models"] == [["out/sft", "out/ppo"]] and record["rating"] == 4
    assert d.undo("ann")[1] == "4"
    os.close(journal.fd)


def test_another_seed_asks_a_labeler_nothing_again(survey):
    answer_all(survey(seed=1, repeat=0.3), "ann", [0, 1])
    d = survey(seed=2)
    assert d.next("ann")[0] is None and d.next("bob")[1]["answered"] == 0


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
        not_taken(507, d.answer, "ann", d.next("ann")[0].id, 0)
    d = survey()
    assert d.next("ann")[1]["answered"] == 1


def test_a_full_disk_refuses_the_answer_and_keeps_the_file_as_it_was(survey, monkeypatch):
    d = survey("ratings")
    d.answer("ann", d.next("ann")[0].id, [1, 2, 3, 4])
    before, first = d.journal.path.read_bytes(), d.next("ann")[0]
    write = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda fd, data: write(fd, data[:50]))
    not_taken(507, d.answer, "ann", first.id, [1, 2, 3, 4])
    assert d.journal.path.read_bytes() == before

    def full(fd, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    assert "No space left" in not_taken(507, d.answer, "ann", first.id, [1, 2, 3, 4])
    monkeypatch.undo()
    d.answer("ann", first.id, [1, 2, 3, 4])
    assert len(load_feedback([d.journal.path])[1]) == 8


def test_a_second_program_cannot_write_to_the_same_file(survey, capsys):
    d = survey()
    assert "another program" in refused(capsys, Journal, d.journal.path, "comparisons")


@pytest.mark.parametrize("kind", SAID)
def test_a_simulated_labeler_answers_everything_of_its_own_once(survey, kind):
    d, name = survey(kind, n=3), world.TRAIN_LABELERS[0]
    simulated.answer_all(d, name, seed=1)
    assert d.next(name)[0] is None and d.next("bob")[0]
    given = d.journal.path.read_text()
    assert given.count('"judgement_id"') >= 3
    simulated.answer_all(d, name, seed=1)
    assert d.journal.path.read_text() == given


def test_a_simulated_labeler_ends_in_one_line_where_nothing_can_be_kept(survey, capsys):
    d = survey(n=2)
    d.journal.path.unlink()
    error = refused(capsys, simulated.answer_all, d, world.TRAIN_LABELERS[0], 1)
    assert "feedback.jsonl: not saved" in error
