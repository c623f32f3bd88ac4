"""examples/make_data.py on small invented files in the formats that are published."""

import csv
import gzip
import io
import json
import re
import tarfile
from types import SimpleNamespace

import pytest

from examples import chitchat, make_data
from nanorlhf.config import from_cli
from nanorlhf.data.examples import load_demonstrations, load_feedback, read_texts
from nanorlhf.judge_file import load_judge
from tests.helpers import refused

VOICES = make_data.VOICES


def tarball(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def table(*rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def qna(voice):
    """Three intents of 30 wordings each; the voices agree on the last one's answer."""
    blocks = ["> # QnA pairs\n"]
    for i, topic in enumerate(("tea", "rain", "chess")):
        wordings = "\n".join(f"- Do you like {topic}, friend {n}?" for n in range(29))
        answer = "Yes." if i == 2 else f"{topic}, says the {voice} one.\n\nTruly."
        blocks.append(
            f"> !# @qna.pair.source = qna_chitchat_{voice}\n\n# ? Do you like {topic}?\n"
            f"{wordings}\n- Who would kill for {topic}?\n\n**Filters:**\n- editorial = chitchat\n\n"
            f"```markdown\n{answer}\n```\n"
        )
    return ("\ufeff" + "\n".join(blocks)).encode()


BOOK = """# Title: A Tale

## Author: Nobody

## Year: 1900

-------

## CHAPTER I

A _very_ quiet day.

It ended*.
"""
STORY, ASKED = ("section", "text"), ("question_id", "cor_section", "question", "answer1")
TALES = {
    "section-stories/train/a-story.csv": table(STORY, ("1", "One\nday."), ("2", "Two\n days.")),
    "questions/train/a-questions.csv": table(ASKED, ("1", "1,2", "How  many?", "two")),
    "section-stories/val/b-story.csv": table(STORY, ("1", "A night.")),
    "questions/val/b-questions.csv": table(ASKED, ("1", "1", "What?", "a night")),
    "section-stories/test/c-story.csv": table(STORY, ("1", "Not read.")),
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The folder that make_data.py writes, with the published files already there."""
    monkeypatch.setattr(make_data, "CLASSICS", ["A Tale.md", "Another.md"])
    hh = {k: f"\n\nHuman: Hi\n\nAssistant: {k}." for k in ("chosen", "rejected")}
    split = "FairytaleQAData-main/data-by-train-split/"
    reviews = {"pos": "a fine \x85 film \na café scene \n".encode("latin-1"), "neg": b"dull . \n"}
    files = {
        **{f"qna_chitchat_{v}.qna": qna(v) for v in VOICES},
        "A Tale.md": BOOK.encode(),
        "Another.md": BOOK.replace("quiet", "loud").encode(),
        "FairytaleQAData.tar.gz": tarball({f"{split}{k}": v for k, v in TALES.items()}),
        "harmless-base-test.jsonl.gz": gzip.compress(json.dumps(hh).encode() + b"\n"),
        "rt-polaritydata.tar.gz": tarball(
            {f"rt-polaritydata/rt-polarity.{k}": v for k, v in reversed(reviews.items())}
        ),
        "vader_lexicon.txt": b"fine\t1.5\t0.5\t[1, 2]\n",
    }
    (tmp_path / "published").mkdir()
    for name, content in files.items():
        (tmp_path / "published" / name).write_bytes(content)
    make_data.main(from_cli(make_data.Config, [str(tmp_path)]))
    return tmp_path


def lines_of(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_every_question_is_demonstrated_or_held_out_and_no_rude_one_is(made):
    demonstrations = lines_of(made / "chitchat/demonstrations.jsonl")
    tests = lines_of(made / "chitchat/prompts_test.jsonl")
    answers = {r["intent"]: r for r in lines_of(made / "chitchat/answers.jsonl")}
    asked = [r["prompt"] for r in demonstrations + tests]
    assert len(asked) == len(set(asked)) == 90 and not any("kill" in q for q in asked)
    assert len(answers) == 3 and {r["style"] for r in demonstrations} == set(VOICES)
    for r in demonstrations:
        assert r["completion"] in [a[r["style"]] for a in answers.values()]
    topics = ("tea", "rain", "chess")
    assert all(t["prompt"].split()[3].startswith(topics[t["intent"]]) for t in tests)


def test_a_ranking_has_the_caring_answer_first_and_another_questions_last(made):
    answers = lines_of(made / "chitchat/answers.jsonl")
    for r in lines_of(made / "chitchat/rankings.jsonl"):
        best_first = [text for _, text in sorted(zip(r["ranks"], r["completions"]))]
        assert sorted(r["ranks"]) == [1, 2, 3, 4, 5, 6]
        [own] = [a for a in answers if [a[v] for v in make_data.BEST_FIRST] == best_first[:5]]
        others = [a for a in answers if a is not own]
        topic = re.search("tea|rain|chess", r["prompt"])[0]
        assert own["caring"] == "Yes." if topic == "chess" else topic in own["caring"]
        assert best_first[5] in [a[v] for a in others for v in VOICES]


def test_the_judges_know_the_question_and_the_voice(made, monkeypatch):
    monkeypatch.setenv("CHITCHAT", str(made / "chitchat"))
    chitchat.answers.cache_clear()
    tea, _, chess = answers = lines_of(made / "chitchat/answers.jsonl")
    texts = [tea["caring"], tea["witty"], chess["witty"], "Yes", chess["witty"]]
    asked = [SimpleNamespace(text="", columns={"intent": i}, source="") for i in (0, 0, 0, 0, 2)]
    judge = lambda name: load_judge(f"{chitchat.__file__}:{name}", "--judge", asked)(asked, texts)
    assert [len({a[v] for v in VOICES}) for a in answers] == [5, 5, 1]
    assert judge("right").tolist() == [1, 1, 0, 0, 1]
    assert judge("other").tolist() == [0, 0, 1, 0, 0]
    for voice in VOICES:  # the last question has one text for all voices: it is left out
        *known, left_out = judge(voice).tolist()
        assert known == [voice == "caring", voice == "witty", 0, 0] and left_out != left_out


def test_the_stages_read_what_is_made(made):
    assert len(load_demonstrations([str(made / "chitchat/demonstrations.jsonl")])) > 70
    for name in ("chitchat/rankings.jsonl", "hh/harmless-base.jsonl.gz"):
        assert load_feedback([str(made / name)])[0] == "rankings"
    kind, reviews = load_feedback([str(made / "sentiment/rt_polarity.jsonl.gz")])
    assert kind == "thumbs" and [e.target[0] for e in reviews] == [1, 1, 0]
    books = [text for _, text in read_texts([str(made / "text/childrens_classics.txt.gz")])]
    book = "CHAPTER I\nA very quiet day.\n\nIt ended*."
    assert [b.strip() for b in books] == [book, book.replace("quiet", "loud")]


def test_reviews_are_read_in_the_encoding_that_they_have(made):
    texts = [r["text"] for r in lines_of(made / "sentiment/rt_polarity.jsonl.gz")]
    assert texts == ["a fine … film", "a café scene", "dull ."]


def test_a_tale_is_its_sections_and_a_question_has_those_that_it_is_about(made):
    tales = [text.strip() for _, text in read_texts([str(made / "text/fairytales.txt.gz")])]
    assert tales == ["One day.\nTwo days.", "A night."]
    assert lines_of(made / "text/fairytale_questions.jsonl.gz") == [
        {"prompt": "One day.\nTwo days.\n\nHow many?", "completion": "two"},
        {"prompt": "A night.\n\nWhat?", "completion": "a night"},
    ]


def test_what_cannot_be_downloaded_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    url = "file:///nowhere/vader_lexicon.txt"
    monkeypatch.setitem(make_data.PUBLISHED, "vader_lexicon.txt", url)
    said = refused(capsys, make_data.published, tmp_path, "vader_lexicon.txt")
    assert said.startswith(f"error: {url}: ")
    assert not (tmp_path / "vader_lexicon.txt").exists()
