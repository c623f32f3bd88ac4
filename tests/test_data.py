"""Files -> examples -> batches: every format of DESIGN 6, every way a file can be wrong."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanorlhf.data import batches, dialogue
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
from nanorlhf.data.tokens import text_batch, write_tokens
from nanorlhf.tokenizer import byte_tokenizer

SHARED = Path(__file__).parents[2] / "shared/data"
BYTES = byte_tokenizer()
EOS, PAD, USER, ASSISTANT = BYTES.eos_id, BYTES.pad_id, BYTES.user_id, BYTES.assistant_id
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


def refused(capsys, loader, path):
    """The one line on stderr with which a file is refused."""
    with pytest.raises(SystemExit) as stop:
        read(loader, path)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
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
    error = refused(capsys, loader, path)
    assert f"{path}:3: " in error and reason in error, error


def test_mixed_kinds_name_both_places(tmp_path, capsys):
    path = write(tmp_path, GOOD["feedback"], {**PAIR, "rating": 3})
    error = refused(capsys, "feedback", path)
    assert f"{path}:1 has comparisons" in error and f"{path}:2: ratings" in error


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_missing_or_empty_file_is_refused(tmp_path, capsys, loader, name):
    assert "No such file" in refused(capsys, loader, tmp_path / name)
    for lines in ([], ["", "  "]):
        assert "empty" in refused(capsys, loader, write(tmp_path, *lines, name=name))
    assert "directory" in refused(capsys, loader, tmp_path)


@pytest.mark.parametrize("name", ["data.txt", "data.txt.gz"])
def test_an_empty_text_file_is_refused(tmp_path, capsys, name):
    assert "empty" in refused(capsys, "texts", write(tmp_path, "", name=name))


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.txt", "data.txt.gz"])
@pytest.mark.parametrize("before", [1, 3000])  # more lines than one read of a buffer
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, capsys, name, before):
    content = b'{"text": "caf\xc3\xa9"}\n' * before + b'{"text": "caf\xe9"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    error = refused(capsys, "texts", path)
    assert "UTF-8" in error and f"{path}:{before + 1}: " in error, error


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.txt.gz"])
def test_a_broken_gzip_file_is_refused(tmp_path, capsys, name):
    lines = [json.dumps({"text": str(i**3)}) for i in range(2000)]
    whole = write(tmp_path, *lines, name=name).read_bytes()
    path = tmp_path / name
    path.write_bytes(whole[:-100])
    assert "ended" in refused(capsys, "texts", path)
    path.write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    refused(capsys, "texts", path)
    path.write_bytes(b"not zipped at all")
    assert "gzip" in refused(capsys, "texts", path)


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
    with pytest.raises(SystemExit) as stop:
        split_held_out(train, [])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--val_data" in error


def test_written_records_are_read_back(tmp_path):
    records = [{"prompt": "é\n\u2028", "completion": "🦊"}, {"prompt": "", "completion": "x"}]
    path = write_records(tmp_path / "new/folder/a.jsonl", iter(records))
    assert [record for _, record in read_records([path])] == records


# ---- the template ------------------------------------------------------------------------------


def test_the_template_is_exact_and_the_loss_is_on_the_assistant_and_its_eos():
    messages = [("user", "hi"), ("assistant", "yo"), ("user", "é"), ("assistant", "")]
    ids, is_loss = dialogue.encode_dialogue(BYTES, messages)
    h, i, y, o, *e = b"hiyo\xc3\xa9"
    assert ids == [USER, h, i, ASSISTANT, y, o, EOS, USER, *e, ASSISTANT, EOS]
    assert is_loss == [False] * 4 + [True] * 3 + [False] * 4 + [True]


def test_a_prompt_ends_where_the_assistant_speaks_and_a_pair_with_its_eos():
    turns = [("user", "q"), ("assistant", "a"), ("user", "r")]
    prompt = [USER, ord("q"), ASSISTANT, ord("a"), EOS, USER, ord("r"), ASSISTANT]
    assert dialogue.encode_prompt(BYTES, turns) == prompt
    assert dialogue.encode_pair(BYTES, turns, "s") == [*prompt, ord("s"), EOS]
    assert dialogue.encode_pair(BYTES, turns, "") == [*prompt, EOS]


TURN = st.tuples(
    st.sampled_from(["user", "assistant"]), st.sampled_from(["", "x", "<|endoftext|>", "<|user|>"])
)


@given(st.lists(TURN, min_size=1, max_size=5))
def test_nothing_of_the_user_is_in_the_loss_and_every_assistant_eos_is(messages):
    ids, is_loss = dialogue.encode_dialogue(BYTES, messages)
    assert len(ids) == len(is_loss)
    learned = [i for i, loss in zip(ids, is_loss) if loss]
    said = [[*BYTES.encode(text), EOS] for role, text in messages if role == "assistant"]
    assert learned == sum(said, [])
    assert ids.count(EOS) == len(said)  # text that spells a special token is plain text
    assert ids.count(USER) + ids.count(ASSISTANT) == len(messages)


def test_empty_completions_are_counted_and_their_end_is_learned(tmp_path, capsys):
    path = write(tmp_path, PAIR, {"prompt": "q", "completion": ""})
    examples = read("demonstrations", path)
    assert "1 of 2 completions are empty" in capsys.readouterr().err
    ids, is_loss = dialogue.encode_dialogue(BYTES, examples[1].messages)
    assert ids == [USER, ord("q"), ASSISTANT, EOS] and is_loss == [False, False, False, True]


# ---- fit ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(13, 20),
)
def test_fit_cuts_prompts_from_the_left_and_never_the_response(sizes, block_size):
    rows = [[*range(100, 100 + p), *range(200, 200 + r)] for p, r in sizes]
    fitted, kept = dialogue.fit(rows, [r for _, r in sizes], block_size, "rows")
    assert kept == list(range(len(rows)))
    for (p, r), row, cut in zip(sizes, rows, fitted):
        assert len(cut) == min(p + r, block_size)
        assert row[-len(cut) :] == cut and cut[-r:] == row[p:] and cut[0] in row[:p]


def test_fit_counts_what_it_cuts_and_drops_what_cannot_fit(capsys):
    rows = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [9] * 4]
    fitted, kept = dialogue.fit(rows, [1, 3, 2, 4, 4], 4, "examples")
    assert fitted == [[1, 2, 3], [2, 3, 4, 5], [1, 2, 3, 4]] and kept == [0, 1, 2]
    cut, dropped = capsys.readouterr().err.splitlines()
    assert "1 of 5 examples" in cut and "4 tokens" in cut and "left" in cut
    assert "2 of 5 examples dropped" in dropped


def test_fit_says_nothing_where_everything_fits(capsys):
    assert dialogue.fit([[1, 2], [3]], [1, 0], 2, "prompts") == ([[1, 2], [3]], [0, 1])
    assert capsys.readouterr() == ("", "")


def test_fit_exits_2_where_nothing_fits(capsys):
    with pytest.raises(SystemExit) as stop:
        dialogue.fit([[1, 2, 3]], [2], 2, "demonstrations")
    assert stop.value.code == 2
    assert "error: no demonstrations fits into 2 tokens\n" in capsys.readouterr().err


def test_room_for_prompts_is_what_a_response_leaves_or_one_line_and_status_2(capsys):
    assert dialogue.room_for_prompts(6, 8) == 2
    assert dialogue.room_for_prompts(3, 8, longest=5) == 5
    for flags in ((7, 8), (9, 8), (3, 8, 6)):
        with pytest.raises(SystemExit) as stop:
            dialogue.room_for_prompts(*flags)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and "leaves no room" in said


DIALOGUES = st.lists(
    st.lists(
        st.tuples(st.text("ab", max_size=4), st.text("cd", max_size=4)), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=4,
)


@given(DIALOGUES, st.integers(6, 20))
def test_demonstrations_fit_their_mask_with_their_ids(dialogues, block_size):
    turns = [[t for q, a in d for t in (("user", q), ("assistant", a))] for d in dialogues]
    examples = [Example(messages, f"f:{i}") for i, messages in enumerate(turns)]
    rows = dialogue.encode_demonstrations(BYTES, examples, block_size)
    assert [source for *_, source in rows] == [e.source for e in examples]
    for messages, (ids, is_loss, _) in zip(turns, rows):
        whole = dialogue.encode_dialogue(BYTES, messages)
        assert (ids, is_loss) == tuple(x[-block_size:] for x in whole)
        last = [*BYTES.encode(messages[-1][1]), EOS]
        assert ids[-len(last) :] == last and all(is_loss[-len(last) :])


def test_a_demonstration_is_dropped_where_its_last_answer_leaves_no_room(capsys):
    """With its eos. What comes before it may be as long as it likes."""
    roles = ("user", "assistant", "user", "assistant")
    says = {
        "just fits": ("q" * 9, "aaa"),
        "too long": ("q", "aaaa"),
        "long before": ("q", "a" * 9, "q" * 9, "a"),
        "long at last": ("q", "a", "q", "a" * 9),
    }
    examples = [Example(list(zip(roles, turns)), source) for source, turns in says.items()]
    rows = dialogue.encode_demonstrations(BYTES, examples, 5)
    assert [source for *_, source in rows] == ["just fits", "long before"]
    assert "2 of 4 dialogues dropped" in capsys.readouterr().err


def test_a_ranking_with_one_completion_too_long_is_dropped_whole(capsys):
    """The longest that fits, with its eos, leaves room for one token of the prompt."""
    long = Feedback(Q, "f:1", ["a", "b" * 7], [1, 2], "")
    short = Feedback(Q, "f:2", ["a", "bb", ""], [2, 1, 3], "")
    longest = Feedback(Q, "f:3", ["a", "b" * 6], [1, 2], "")
    rows = dialogue.encode_feedback(BYTES, [long, short, longest], 8)
    ids = [dialogue.encode_pair(BYTES, Q, text)[-8:] for text in ("a", "bb", "", "b" * 6)]
    assert rows == [(ids[:3], [2, 1, 3], "f:2"), ([ids[0], ids[3]], [1, 2], "f:3")]
    assert "1 of 7 completions dropped" in capsys.readouterr().err


def test_feedback_that_fits_nowhere_exits_2():
    long = Feedback(Q, "f:1", ["a", "b" * 9], [1, 2], "")
    with pytest.raises(SystemExit) as stop:
        dialogue.encode_feedback(BYTES, [long], 8)
    assert stop.value.code == 2


def test_prompts_are_cut_from_the_left_and_keep_their_text():
    examples = [Example([("user", "abcdef")], "f:1"), Example([*Q, SAID, *Q], "f:2")]
    a, b = dialogue.encode_prompts(BYTES, examples, 5)
    assert a.ids == [*b"cdef", ASSISTANT] and (a.text, a.source) == ("abcdef", "f:1")
    assert b.ids == [ord("a"), EOS, USER, ord("q"), ASSISTANT] and b.text == "q\na\nq"


# ---- batches -----------------------------------------------------------------------------------


def test_pad_puts_pads_on_the_right_or_on_the_left():
    tokens, mask = batches.pad([[1, 2, 3], [4], []], PAD)
    assert tokens.tolist() == [[1, 2, 3], [4, PAD, PAD], [PAD] * 3]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]
    tokens, mask = batches.pad([[1, 2, 3], [4], []], PAD, left=True)
    assert tokens.tolist() == [[PAD] * 5 + [1, 2, 3], [PAD] * 7 + [4], [PAD] * 8]
    assert mask.tolist() == [[False] * 5 + [True] * 3, [False] * 7 + [True], [False] * 8]
    assert batches.pad([[1] * 8], PAD, left=True)[0].shape == (1, 8)


ROWS = st.lists(st.lists(st.integers(0, 255), max_size=6), min_size=1, max_size=5)


@given(ROWS, st.booleans())
def test_the_mask_of_pad_gives_the_rows_back(rows, left):
    tokens, mask = batches.pad(rows, PAD, left)
    assert [t[m].tolist() for t, m in zip(tokens, mask)] == rows
    assert (tokens[~mask] == PAD).all() and tokens.shape == mask.shape


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.integers(0, 9)), min_size=1))
def test_pads_last_puts_prompt_and_response_side_by_side(lengths):
    """Rows of (pads, prompt, response, pads): what is real keeps its order and comes first."""
    P, T = max(a + b for a, b, _ in lengths), max(c for *_, c in lengths)
    tokens = torch.randint(0, 256, (len(lengths), P + T))
    real = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (_, prompt, response) in zip(real, lengths):
        row[P - prompt : P + response] = True
    tokens[~real] = PAD
    found = batches.pads_last(tokens, real)
    assert found.shape[1] == max(b + c for _, b, c in lengths)
    for row, before, mask in zip(found, tokens, real):
        assert row.tolist() == [*before[mask].tolist(), *[PAD] * (len(row) - int(mask.sum()))]


@example([(5, 5), (4, 4)], 2)  # two groups save just a tenth
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1), st.integers(1, 5))
def test_groups_of_one_length_hold_every_row_once_and_nothing_real_is_cut(lengths, n):
    prompt, response = torch.tensor(lengths).T
    total = prompt + response
    S, T = int(total.max()), int(response.max())
    column = torch.arange(S)
    batch = {
        "tokens": column.expand(len(lengths), S),
        "response_mask": column[:T] < response[:, None],
        "n_tokens": total,
        "n_response": response,
        "source": ["x"] * len(lengths),
    }
    groups = list(batches.by_length(batch, n, always=True))
    assert len(groups) == min(n, len(lengths))
    assert sorted(i for index, _ in groups for i in index.tolist()) == list(range(len(lengths)))
    for index, rows in groups:
        assert torch.equal(rows["n_tokens"], total[index]) and "source" not in rows
        assert rows["tokens"].shape[1] == min(S, -(-int(total[index].max()) // 8) * 8)
        assert torch.equal(rows["response_mask"].sum(1), response[index])
        assert rows["response_mask"].shape[1] == min(T, -(-int(response[index].max()) // 8) * 8)
    longest = [int(rows["n_tokens"].max()) for _, rows in groups]
    assert longest == sorted(longest)
    cost = lambda groups: sum(len(i) * int(rows["n_tokens"].max()) for i, rows in groups)
    worth_it = cost(groups) <= 0.9 * cost(batches.by_length(batch, 1))
    assert len(list(batches.by_length(batch, n))) == (len(groups) if worth_it else 1)


@pytest.mark.parametrize(
    "n, sizes",
    [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (5, [2, 2, 2, 1]), (7, [1] * 7), (9, [1] * 7)],
)
def test_a_batch_is_split_into_all_its_rows_in_order(n, sizes):
    batch = {"weight": torch.ones(7), "tokens": torch.arange(14).view(7, 2), "source": [*"abcdefg"]}
    parts = list(batches.split(batch, n))
    assert [len(p["weight"]) for p in parts] == sizes == [len(p["source"]) for p in parts]
    assert torch.equal(torch.cat([p["tokens"] for p in parts]), batch["tokens"])
    assert sum((p["source"] for p in parts), []) == batch["source"]


@pytest.mark.parametrize(
    "shard, parts",
    [(False, [[2, 3], [38, 39], [1, 4], [37, 40]]), (True, [[2, 3, 38, 39], [1, 4, 37, 40]])],
)
def test_micro_batches_are_grouped_by_length_but_not_where_a_model_is_sharded(shard, parts):
    """Those with --grad_accum 2; a batch that does not know its lengths stays as it is."""
    lengths = torch.tensor([39, 2, 38, 3, 1, 40, 4, 37])
    batch = {"n_tokens": lengths, "tokens": torch.zeros(8, 40), "weight": torch.ones(8)}
    cfg = SimpleNamespace(grad_accum=2, shard=shard)
    found = batches.micro_batches(batch, cfg)
    assert [rows["n_tokens"].tolist() for rows in found] == parts
    found = batches.micro_batches({"tokens": torch.arange(8), "weight": torch.ones(8)}, cfg)
    assert [rows["tokens"].tolist() for rows in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9), st.integers(0, 5))
def test_every_epoch_visits_every_example_once(n, batch_size, seed, epoch):
    steps = -(-n // batch_size)
    first = epoch * steps
    epoch = [batches.epoch_batch(n, batch_size, seed, first + i) for i in range(steps)]
    assert sorted(np.concatenate(epoch)) == list(range(n))
    assert all(len(b) == batch_size for b in epoch[:-1]) and len(epoch[-1]) > 0
    for i in reversed(range(steps)):  # in any order: it is pure
        assert (batches.epoch_batch(n, batch_size, seed, first + i) == epoch[i]).all()


def test_epochs_and_seeds_shuffle_differently():
    keys = [(seed, step) for seed in (1, 2) for step in (0, 1)]
    orders = [batches.epoch_batch(50, 50, seed, step).tolist() for seed, step in keys]
    assert len(set(map(tuple, orders))) == 4
    assert sorted(orders[0]) != orders[0]


def test_a_dialogue_batch_pads_right_and_weighs_its_loss_tokens():
    rows = [
        ([1, 2, 3], [False, True, True], "f:1"),
        ([4], [False], "f:2"),
        ([5, 6], [False, True], "f"),
    ]
    batch = batches.dialogue_batch(rows, [2, 0], PAD)
    assert batch["tokens"].tolist() == [[5, 6, PAD], [1, 2, 3]]
    assert batch["mask"].tolist() == [[False, True, False], [False, True, True]]
    assert batch["mask"].dtype == torch.bool
    assert batch["weight"].tolist() == [1, 2] and batch["source"] == ["f", "f:1"]


def test_a_dialogue_cut_within_an_answer_weighs_only_what_can_be_predicted():
    example = Example([*Q, ("assistant", "abcd"), *Q, SAID], "f:1")
    rows = dialogue.encode_demonstrations(BYTES, [example], 9)
    batch = batches.dialogue_batch(rows, [0], PAD)
    assert batch["mask"][0, 0]  # starts within "abcd": nothing comes before its first token
    assert batch["weight"].tolist() == batch["mask"][:, 1:].sum(1).tolist()


def test_a_feedback_batch_keeps_every_completion_at_its_place():
    rows = [([[1, 2], [3]], [1, 2], "f:1"), ([[4], [5, 6, 7], [8]], [2, 1, 2], "f:2")]
    batch = batches.feedback_batch(rows, [1, 0], PAD)
    assert batch["present"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["target"].tolist() == [[2, 1, 2], [1, 2, 0]]  # 0: absent
    assert batch["tokens"][0].tolist() == [[4, PAD, PAD], [5, 6, 7], [8, PAD, PAD]]
    assert batch["tokens"][1].tolist() == [[1, 2, PAD], [3, PAD, PAD], [PAD] * 3]
    assert (batch["mask"] == (batch["tokens"] != PAD)).all()
    assert batch["n_completion"].tolist() == [[1, 3, 1], [2, 1, 0]]
    assert batch["weight"].tolist() == [1, 1] and batch["source"] == ["f:2", "f:1"]


def test_only_prompts_with_an_ordered_pair_or_a_number_have_weight():
    tied, ranked = ([[1], [2]], [1, 1], "f:1"), ([[1], [2]], [2, 1], "f:2")
    assert batches.feedback_batch([tied, ranked], [0, 1], PAD)["weight"].tolist() == [0, 1]
    rated = [([[1]], [2.5], "f:1"), ([[2]], [0.0], "f:2")]
    batch = batches.feedback_batch(rated, [0, 1], PAD)
    assert batch["weight"].tolist() == [1, 1] and batch["target"].tolist() == [[2.5], [0.0]]


def test_what_the_cpu_decides_by_stays_there():
    names = ("tokens", "mask", "n_tokens", "n_response", "weight")
    batch = {name: torch.ones(2, 3) for name in names} | {"source": ["a", "b"]}
    moved = batches.to_device(batch, torch.device("meta"))
    assert moved["source"] == ["a", "b"]
    where = [moved[name].device.type for name in names]
    assert where == ["meta", "meta", "cpu", "cpu", "cpu"]


def test_batches_hold_all_rows_in_their_order():
    rows = [([i, i], [False, True], f"f:{i}") for i in range(7)]
    found = batches.batches(rows, 3, batches.dialogue_batch, PAD)
    assert [len(b["tokens"]) for b in found] == [3, 3, 1]
    assert [s for b in found for s in b["source"]] == [s for *_, s in rows]
    assert batches.batches([], 3, batches.dialogue_batch, PAD) == []


def test_tokens_are_written_with_an_eos_before_and_behind_every_document(tmp_path):
    stream, n_bytes = write_tokens(iter(["hé", "", "x"]), BYTES, tmp_path / "a.bin")
    assert stream.tolist() == [EOS, *"hé".encode(), EOS, EOS, ord("x"), EOS]
    assert stream.dtype == np.uint16 and n_bytes == 4


@pytest.mark.parametrize("size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_large_vocabulary_is_written_whole(tmp_path, size, dtype):
    large = SimpleNamespace(vocab_size=size, eos_id=size - 1, encode=lambda text: [size - 2])
    stream, _ = write_tokens(["x"], large, tmp_path / "a.bin")
    assert stream.dtype == dtype and stream.tolist() == [size - 1, size - 2, size - 1]


def test_a_token_file_that_cannot_be_written_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        write_tokens(["x"], BYTES, tmp_path / "missing" / "a.bin")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "missing/a.bin" in said


def test_no_text_is_one_eos(tmp_path):
    stream, n_bytes = write_tokens([], BYTES, tmp_path / "a.bin")
    assert stream.tolist() == [EOS] and n_bytes == 0


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 9))
def test_windows_are_in_range_and_hold_each_token_with_the_next(length, spare, seed):
    stream = np.arange(1000, 1000 + length + spare, dtype=np.uint16)
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, 7)
    batch = text_batch(stream, [*starts, 0, len(stream) - length - 1], length, "book")
    tokens = batch["tokens"]
    assert tokens.shape == (9, length + 1)
    assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()  # targets are inputs shifted by one
    assert tokens[:, 0].tolist() == [1000 + s for s in (*starts, 0, len(stream) - length - 1)]
    assert tokens.max() == stream[-1]
    assert batch["weight"].tolist() == [float(length)] * 9
    assert batch["source"][7] == "book, token 0"
