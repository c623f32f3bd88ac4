"""Files -> examples: every format that docs/data.md lists, every way a file can be wrong."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data import dialogue
from nanorlhf.data.examples import (
    Example,
    Feedback,
    first_user_turn,
    is_held_out,
    load_demonstrations,
    load_feedback,
    load_prompts,
    read_texts,
    split_held_out,
    write_records,
)
from nanorlhf.data.files import read_records
from nanorlhf.data.shapes import recognise
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused

SHARED = Path(__file__).parents[3] / "shared/data"
BYTES = byte_tokenizer()
EOS, USER, ASSISTANT = BYTES.eos_id, BYTES.user_id, BYTES.assistant_id
ASK = {"role": "user", "content": "q1"}
SAY = {"role": "assistant", "content": "a1"}
HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
LOADERS = {
    "texts": read_texts,
    "demonstrations": load_demonstrations,
    "prompts": load_prompts,
    "feedback": load_feedback,
}


def write(folder, *records, name="data.jsonl"):
    """Records, lines or bytes -> a file, zipped if its name says so."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    content = "".join(line + "\n" for line in lines).encode()
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(loader, path):
    return list(LOADERS[loader]([path]))


def refused_file(capsys, loader, path):
    """The one line on stderr with which a file is refused, by name."""
    error = refused(capsys, read, loader, path)
    assert error.startswith(f"error: {path}")
    return error


# ---- formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_cut_at_lines_that_are_endoftext(tmp_path, name):
    end = "<|endoftext|>"
    lines = [end, "one", "", "more", end, "", end, f"two {end} inside", f" {end} ", "  three", ""]
    documents = read("texts", write(tmp_path, *lines, name=name))
    expected = ["one\n\nmore", f"two {end} inside", "  three"]
    assert documents == [(text, text) for text in expected]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_objects_of_every_kind_are_read_as_text(tmp_path, name):
    path = write(
        tmp_path,
        {"text": "plain é", "label": True},
        {"prompt": "q", "completion": "a"},
        {"messages": [ASK, SAY]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"chosen": HH + " a2", "rejected": HH + " b2"},
        {"prompt": "q", "completions": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "q", "completion": "a", "rating": 3},
        {"prompt": "q"},
        name=name,
    )
    keys, texts = zip(*read("texts", path))
    hh = (HH + " a2").strip()
    assert texts == ("plain é", "q\na", "q1\na1", "q\ngood", hh, "q\nx", "q\na", "q")
    assert keys == ("plain", "q", "q1", "q", "q1", "q", "q", "q")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_demonstrations_are_pairs_messages_or_the_chosen_side(tmp_path, name):
    path = write(
        tmp_path,
        {"prompt": "q", "completion": "a", "style": "ignored"},
        {"messages": [ASK, SAY, {**ASK, "content": "q2"}, {**SAY, "content": "a2"}]},
        "",
        {"chosen": HH + " a2", "rejected": HH + " b2"},
        {"messages": [ASK, SAY, ASK]},
        name=name,
    )
    examples = read("demonstrations", path)
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    expected = [[("user", "q"), ("assistant", "a")], turns, turns, turns[:2]]
    assert [e.messages for e in examples] == expected
    assert [e.source for e in examples] == [f"{path}:{n}" for n in (1, 2, 4, 5)]
    assert [e.first_turn for e in examples] == ["q", "q1", "q1", "q1"]


def test_prompts_are_strings_or_dialogues_that_end_with_the_user(tmp_path):
    path = write(tmp_path, {"prompt": "q", "intent": 0}, {"messages": [ASK, SAY, ASK]})
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q1")]
    assert [e.messages for e in read("prompts", path)] == [[("user", "q")], turns]


def feedback_of(folder, *records):
    kind, examples = load_feedback([write(folder, *records)])
    return kind, [(e.messages, e.completions, e.target) for e in examples]


Q, SAID = [("user", "q")], ("assistant", "a")


def test_comparisons_put_the_chosen_text_first(tmp_path):
    record = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert feedback_of(tmp_path, record) == ("comparisons", [(Q, ["good", "bad"], [1, 2])])


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("apple", "banana"),
        ("same start", "same end"),
        ("a", "a and more"),
        ("", "b"),
        ("b", ""),
        ("a\n\nHuman: r\n\nAssistant: s", "a"),
    ],
)
def test_an_hh_pair_shares_the_prefix_up_to_its_last_assistant(tmp_path, chosen, rejected):
    record = {"chosen": f"{HH} {chosen}", "rejected": f"{HH} {rejected}"}
    prompt = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    expected = ("comparisons", [(prompt, [chosen, rejected], [1, 2])])
    assert feedback_of(tmp_path, record) == expected


def test_hh_pairs_that_part_early_keep_their_later_turns_in_the_completions(tmp_path):
    texts = [f"\n\nHuman: q\n\nAssistant: {a}\n\nHuman: r\n\nAssistant: s" for a in ("x", "y")]
    kind, [(prompt, completions, _)] = feedback_of(
        tmp_path, {"chosen": texts[0], "rejected": texts[1]}
    )
    assert prompt == Q
    assert completions == [f"{a}\n\nHuman: r\n\nAssistant: s" for a in ("x", "y")]


def test_the_prompt_of_an_hh_pair_for_ppo_is_what_both_sides_share(tmp_path):
    texts = [f"\n\nHuman: q\n\nAssistant: {a}\n\nHuman: r\n\nAssistant: s" for a in ("x", "y")]
    path = write(tmp_path, {"chosen": texts[0], "rejected": texts[1]})
    assert [e.messages for e in read("prompts", path)] == [Q]


def test_rankings_tie_equal_texts_at_their_best_rank(tmp_path):
    record = {"prompt": "q", "completions": ["a", "b", "a", "c"], "ranks": [3, 2, 1, 2]}
    expected = ("rankings", [(Q, ["a", "b", "a", "c"], [1, 2, 1, 2])])
    assert feedback_of(tmp_path, record) == expected


def test_ratings_are_numbers_from_0_to_5(tmp_path):
    records = [{"prompt": "q", "completion": "a", "rating": r} for r in (0, 2.5, 5)]
    expected = ("ratings", [(Q, ["a"], [r]) for r in (0.0, 2.5, 5.0)])
    assert feedback_of(tmp_path, *records) == expected


def test_thumbs_are_1_for_like_and_0_for_dislike(tmp_path):
    records = [{"prompt": "q", "completion": "a", "label": x} for x in (True, False, 1, 0)]
    expected = ("thumbs", [(Q, ["a"], [x]) for x in (1.0, 0.0, 1.0, 0.0)])
    assert feedback_of(tmp_path, *records) == expected


def test_feedback_keeps_its_labeler_and_may_have_a_dialogue_as_prompt(tmp_path):
    record = {"prompt": [ASK, SAY, ASK], "chosen": "a", "rejected": "b", "labeler": "ann"}
    path = write(tmp_path, record, {"prompt": "q", "chosen": "a", "rejected": "b"})
    _, [signed, unsigned] = load_feedback([path])
    assert (signed.labeler, unsigned.labeler) == ("ann", "")
    assert signed.messages == [("user", "q1"), ("assistant", "a1"), ("user", "q1")]


def test_empty_completions_are_counted_and_their_end_is_learned(tmp_path, capsys):
    path = write(tmp_path, *({"prompt": "q", "completion": x} for x in ("a", "")))
    examples = read("demonstrations", path)
    assert "1 of 2 completions are empty" in capsys.readouterr().err
    ids, is_loss = dialogue.encode_dialogue(BYTES, examples[1].messages)
    assert ids == [USER, ord("q"), ASSISTANT, EOS] and is_loss == [False, False, False, True]


def test_several_files_are_read_one_after_the_other(tmp_path):
    a, b = (write(tmp_path, {"prompt": x}, name=f"{x}.jsonl") for x in "ab")
    assert [e.first_turn for e in load_prompts([b, a])] == ["b", "a"]


def test_text_may_hold_any_character_even_line_separators_and_surrogates(tmp_path):
    path = write(tmp_path, {"prompt": "a\u2028b\x0b\x85\u0000🦊"}, '{"prompt": "\\ud800"}')
    first, second = [e.first_turn for e in read("prompts", path)]
    assert first == "a\u2028b\x0b\x85\u0000🦊" and second == "\ud800"
    assert is_held_out(second) in (True, False)
    assert BYTES.decode(dialogue.encode_prompt(BYTES, [("user", second)])) == "\ufffd"


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
def test_real_files_are_read_whole():
    kind, pairs = load_feedback([SHARED / "hh/harmless-base.jsonl.gz"])
    assert (kind, len(pairs)) == ("comparisons", 1866)
    assert all(e.messages[-1][0] == "user" and e.messages[0][0] == "user" for e in pairs)
    assert len(load_demonstrations([SHARED / "hh/harmless-base.jsonl.gz"])) == 1866
    kind, rankings = load_feedback([SHARED / "chitchat/rankings.jsonl"])
    assert (kind, len(rankings)) == ("rankings", 8749)
    assert len(load_prompts([SHARED / "chitchat/prompts_test.jsonl"])) == 926
    assert len(list(read_texts([SHARED / "text/fairytales.txt.gz"]))) == 255


# ---- bad input ---------------------------------------------------------------------------------

PAIR = {"prompt": "q", "completion": "a"}
BAD = [  # loader, what its second line is, what the message says
    ("demonstrations", '{"prompt": "q", ', "not JSON"),
    ("demonstrations", "", ""),
    ("demonstrations", "[1, 2]", "found list"),
    ("demonstrations", '"text"', "found str"),
    ("demonstrations", {"prompt": "q"}, "'completion'"),
    ("demonstrations", {"prompt": 3, "completion": "a"}, "'prompt'"),
    ("demonstrations", {"prompt": "q", "completion": None}, "'completion'"),
    ("demonstrations", {"messages": []}, "'messages'"),
    ("demonstrations", {"messages": "hello"}, "'messages'"),
    ("demonstrations", {"messages": ["hello"]}, "'content'"),
    ("demonstrations", {"messages": [{"role": "user"}]}, "'content'"),
    ("demonstrations", {"messages": [{**ASK, "role": "robot"}]}, "role 'robot'"),
    ("demonstrations", {"messages": [{**ASK, "role": "system"}]}, "system"),
    ("demonstrations", {"messages": [{"content": "q"}]}, "role None"),
    ("demonstrations", {"messages": [ASK]}, "no assistant turn"),
    ("demonstrations", {"chosen": "no dialogue"}, "no assistant turn"),
    ("demonstrations", {"chosen": ["x"]}, "'chosen'"),
    ("prompts", {"text": "q"}, "'prompt'"),
    ("prompts", {"prompt": ["q"]}, "'prompt'"),
    ("prompts", {"messages": [SAY]}, "user turn"),
    ("texts", {"text": 1}, "'text'"),
    ("texts", {"title": "x"}, "'title'"),
    ("texts", {"messages": [ASK, 3]}, "'content'"),
    ("feedback", {"prompt": "q", "completion": "a"}, "'rating'"),
    ("feedback", {"prompt": "q", "chosen": "a"}, "'rejected'"),
    ("feedback", {"chosen": HH + "a", "rejected": None}, "'rejected'"),
    ("feedback", {"chosen": "a", "rejected": "b"}, "share no prompt"),
    ("feedback", {"chosen": HH + "a", "rejected": "\n\nHuman: x"}, "share no prompt"),
    ("feedback", {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2]}, "3 completions"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2, 3]}, "3 ranks"),
    ("feedback", {"prompt": "q", "completions": ["a"], "ranks": [1]}, "needs 2"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [0, 1]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1.5]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [True, 2]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", 2], "ranks": [1, 2]}, "'completions'"),
    ("feedback", {"prompt": "q", "completions": "ab", "ranks": [1, 2]}, "'completions'"),
    ("feedback", {"prompt": "q", "ranks": [1, 2]}, "'completions'"),
    ("feedback", {**PAIR, "rating": 6}, "found 6"),
    ("feedback", {**PAIR, "rating": -0.5}, "found -0.5"),
    ("feedback", {**PAIR, "rating": "five"}, "'five'"),
    ("feedback", {**PAIR, "rating": True}, "found True"),
    ("feedback", '{"prompt": "q", "completion": "a", "rating": NaN}', "found nan"),
    ("feedback", {**PAIR, "label": "yes"}, "'label'"),
    ("feedback", {**PAIR, "label": 2}, "'label'"),
    ("feedback", {**PAIR, "label": None}, "'label'"),
    ("feedback", {**PAIR, "label": True}, "thumbs"),  # behind a comparison
    ("feedback", {**PAIR, "rating": 3}, "ratings"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}, "rankings"),
]
GOOD = {
    "texts": {"text": "a"},
    "demonstrations": PAIR,
    "prompts": {"prompt": "q"},
    "feedback": {"prompt": "q", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("loader, line, reason", [case for case in BAD if case[1]])
def test_a_bad_line_is_named_with_its_file_its_number_and_the_reason(
    tmp_path, capsys, loader, line, reason, name
):
    path = write(tmp_path, GOOD[loader], "", line, GOOD[loader], name=name)
    error = refused_file(capsys, loader, path)
    assert f"{path}:3: " in error and reason in error, error


def test_mixed_kinds_name_both_places(tmp_path, capsys):
    path = write(tmp_path, GOOD["feedback"], {**PAIR, "rating": 3})
    error = refused_file(capsys, "feedback", path)
    assert f"{path}:1 has comparisons" in error and f"{path}:2: ratings" in error


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_missing_or_empty_file_is_refused(tmp_path, capsys, loader, name):
    assert "No such file" in refused_file(capsys, loader, tmp_path / name)
    for lines in ([], ["", "  "]):
        assert "empty" in refused_file(capsys, loader, write(tmp_path, *lines, name=name))
    assert "directory" in refused_file(capsys, loader, tmp_path)


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_an_empty_text_file_is_refused(tmp_path, capsys, name):
    assert "empty" in refused_file(capsys, "texts", write(tmp_path, "", name=name))


# ---- the split ---------------------------------------------------------------------------------


def test_the_split_is_the_same_in_every_process_and_version():
    assert [i for i in range(60) if is_held_out(f"question {i}")] == [7, 29, 35, 37, 49]
    assert is_held_out("é") is False


def test_a_tenth_is_held_out():
    share = sum(is_held_out(f"question {i}") for i in range(20_000)) / 20_000
    assert 0.09 < share < 0.11


@given(st.text(), st.text(), st.text())
def test_the_split_depends_on_the_first_user_turn_alone(first, a, b):
    records = [
        {"prompt": first, "completion": a},
        {"prompt": first, "chosen": a, "rejected": b},
        {"prompt": first, "completions": [a, b], "ranks": [1, 2], "labeler": b},
        {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": a}]},
        {"messages": [SAY, {"role": "user", "content": first}, {"role": "user", "content": b}]},
    ]
    found = [recognise(record, "a:1")[1] for record in records]
    assert {first_user_turn(record) for record in found} == {first}
    example = Example([("user", first), ("assistant", a), ("user", b)], b)
    feedback = Feedback([("user", first)], a, [a, b], [1, 2], b)
    assert example.first_turn == feedback.first_turn == first
    assert is_held_out(first) is is_held_out(str(first))


def test_both_sides_of_an_hh_pair_and_its_text_are_in_one_split(tmp_path):
    path = write(tmp_path, {"chosen": HH + " a2", "rejected": HH + " b2"})
    [(key, _)] = read("texts", path)
    [demonstration], (_, [pair]) = read("demonstrations", path), load_feedback([path])
    assert key == demonstration.first_turn == pair.first_turn == "q1"


def test_an_hh_dialogue_that_the_assistant_opens_goes_by_its_first_user_turn(tmp_path):
    path = write(tmp_path, {"chosen": "\n\nAssistant: hi" + HH + " a2"})
    [(key, _)], [example] = read("texts", path), read("demonstrations", path)
    assert key == example.first_turn == "q1"


def test_examples_split_by_their_prompt_unless_held_out_ones_are_given(capsys):
    examples = [Example([("user", str(i % 50)), SAID], f"f:{i}") for i in range(200)]
    train, val = split_held_out(examples, [])
    assert sorted(e.source for e in train + val) == sorted(e.source for e in examples)
    assert not {e.first_turn for e in train} & {e.first_turn for e in val}
    assert all(is_held_out(e.first_turn) for e in val)
    assert split_held_out(train, val[:1]) == (train, val[:1])
    assert split_held_out(examples, [], 3) == (train, val[:3])
    assert "--val_data" in refused(capsys, split_held_out, train, [])


def test_written_records_are_read_back(tmp_path):
    records = [{"prompt": "é\n\u2028", "completion": "🦊"}, {"prompt": "", "completion": "x"}]
    path = write_records(tmp_path / "new/folder/a.jsonl", iter(records))
    assert [record for _, record in read_records([path])] == records
