"""Files -> examples: every format that docs/data.md lists, every way a file can be wrong."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data import dialogue, values
from nanorlhf.data.examples import (
    Example,
    first_user_turn,
    load_demonstrations,
    load_feedback,
    load_prompts,
    read_texts,
    recognise,
)
from nanorlhf.data.files import read_records, write_records
from nanorlhf.data.split import is_held_out, split_held_out
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


def test_demonstrations_are_pairs_messages_or_the_chosen_side(tmp_path):
    first = write(tmp_path, {"prompt": "q", "completion": "a", "style": "ignored"}, name="1.jsonl")
    path = write(
        tmp_path,
        {"messages": [ASK, SAY, {**ASK, "content": "q2"}, {**SAY, "content": "a2"}]},
        "",
        {"chosen": HH + " a2", "rejected": HH + " b2"},
        {"messages": [ASK, SAY, ASK]},
    )
    examples = load_demonstrations([first, path])
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert [e.messages for e in examples] == [[*Q, SAID], turns, turns, turns[:2]]
    assert [e.source for e in examples] == [f"{first}:1", *(f"{path}:{n}" for n in (1, 3, 4))]
    assert [e.first_turn for e in examples] == ["q", "q1", "q1", "q1"]


def test_prompts_are_unique_with_the_columns_of_their_first_record(tmp_path, capsys):
    """The whole dialogue counts, and not its last turn."""
    dialogue = [SAID, ("user", "q")]
    records = [{"prompt": "q", "n": 1}, {"prompt": "r", "n": 2}, {"prompt": "q", "n": 3}]
    records.append({"messages": [{"role": r, "content": c} for r, c in [("user", "x"), *dialogue]]})
    found = read("prompts", write(tmp_path, *records))
    assert [e.messages for e in found[:2]] == [[("user", "q")], [("user", "r")]] and len(found) == 3
    assert [e.columns.get("n") for e in found] == [1, 2, None]
    assert "1 of 4 prompts are repetitions" in capsys.readouterr().out


def feedback_of(folder, *records):
    kind, examples = load_feedback([write(folder, *records)])
    return kind, [(e.messages, e.completions, e.target) for e in examples]


Q, SAID = [("user", "q")], ("assistant", "a")


TARGETS = [  # what is judged and how; the kind, the replies and the target that it becomes
    ({"chosen": "good", "rejected": "bad"}, "rankings", ["good", "bad"], [1, 2]),
    ({"completions": [*"abac"], "ranks": [3, 2.0, 1, 2]}, "rankings", [*"abac"], [1, 2, 1, 2]),
    *(({"completion": "a", "rating": x}, "ratings", ["a"], [x]) for x in (0, 2.5, 5)),
    *(({"completion": "a", "label": x}, "thumbs", ["a"], [1]) for x in (True, 1, 1.0, "1.0")),
    *(({"completion": "a", "label": x}, "thumbs", ["a"], [0]) for x in (False, 0, "0.0", "false")),
]


@pytest.mark.parametrize("judged, kind, replies, target", TARGETS)
def test_a_judgement_is_a_rank_for_each_reply_or_a_number(tmp_path, judged, kind, replies, target):
    """The best rank is 1; texts that are equal share the better rank of theirs."""
    assert feedback_of(tmp_path, {"prompt": "q"} | judged) == (kind, [(Q, replies, target)])


@pytest.mark.parametrize(
    "chosen, rejected",
    [("apple", "banana"), ("same start", "same end"), ("a", "a and more"), ("", "b"), ("b", "")],
)
def test_an_hh_pair_shares_the_prefix_up_to_its_last_assistant(tmp_path, chosen, rejected):
    record = {"chosen": f"{HH} {chosen}", "rejected": f"{HH} {rejected}"}
    prompt = [("user", "q1"), ("assistant", "a1"), ("user", "q2")]
    expected = ("rankings", [(prompt, [chosen, rejected], [1, 2])])
    assert feedback_of(tmp_path, record) == expected


def test_hh_pairs_that_part_early_keep_their_later_turns_in_the_completions(tmp_path):
    """What both sides share is their prompt, also for PPO."""
    texts = [f"\n\nHuman: q\n\nAssistant: {a}\n\nHuman: r\n\nAssistant: s" for a in ("x", "y")]
    record = {"chosen": texts[0], "rejected": texts[1]}
    [(prompt, completions, _)] = feedback_of(tmp_path, record)[1]
    turns = [("user", "r"), ("assistant", "s")]
    assert prompt == Q and completions == [[("assistant", a), *turns] for a in ("x", "y")]
    assert [e.messages for e in read("prompts", write(tmp_path, record))] == [Q]


def test_empty_completions_are_counted_and_their_end_is_learned(tmp_path, capsys):
    path = write(tmp_path, *({"prompt": "q", "completion": x} for x in ("a", "")))
    examples = read("demonstrations", path)
    assert "1 empty completions: only their end" in capsys.readouterr().err
    ids, is_loss = BYTES.dialogue(examples[1].messages)
    assert ids == [USER, ord("q"), ASSISTANT, EOS] and is_loss == [False, False, False, True]


def test_text_may_hold_any_character_even_line_separators_and_surrogates(tmp_path):
    path = write(tmp_path, {"prompt": "a\u2028b\x0b\x85\u0000🦊"}, '{"prompt": "\\ud800"}')
    first, second = [e.first_turn for e in read("prompts", path)]
    assert first == "a\u2028b\x0b\x85\u0000🦊" and second == "\ud800"
    assert is_held_out(second) in (True, False)
    assert BYTES.decode(dialogue.encode_prompt(BYTES, [("user", second)])) == "\ufffd"


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
def test_real_files_are_read_whole():
    kind, pairs = load_feedback([SHARED / "hh/harmless-base.jsonl.gz"])
    assert (kind, len(pairs)) == ("rankings", 1866)
    assert all(e.messages[-1][0] == "user" and e.messages[0][0] == "user" for e in pairs)
    # in two of them the better reply is nothing, and the assistant has said nothing before
    assert len(load_demonstrations([SHARED / "hh/harmless-base.jsonl.gz"])) == 1864
    kind, rankings = load_feedback([SHARED / "chitchat/rankings.jsonl"])
    assert (kind, len(rankings)) == ("rankings", 8749)
    assert len(load_prompts([SHARED / "chitchat/prompts_test.jsonl"])) == 926
    assert len(list(read_texts([SHARED / "text/fairytales.txt.gz"]))) == 255


# ---- nothing is lost or misread in silence -------------------------------------------------------

AGAIN, FINAL = {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}
SYSTEM = {"role": "system", "content": "s"}
Q1, A1, Q2, A2 = ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")


def dialogues(folder, *records):
    return [e.messages for e in load_demonstrations([write(folder, *records)])]


def test_replies_of_several_messages_are_compared_whole(tmp_path, capsys):
    worse = {"role": "assistant", "content": "b"}
    record = {"prompt": [ASK], "chosen": [SAY, AGAIN, FINAL], "rejected": [worse]}
    ranked = {"prompt": [ASK], "completions": [[SAY, AGAIN, FINAL], "b"], "ranks": [1.0, 2.0]}
    learned = {"prompt": [ASK], "completion": [SAY, AGAIN, FINAL]}
    assert dialogues(tmp_path, learned, record, ranked) == [[Q1, A1, Q2, A2]] * 3
    for r in (record, ranked):
        found = feedback_of(tmp_path, r)
        assert found == ("rankings", [([Q1], [[A1, Q2, A2], "b"], [1, 2])])
    [(completions, *_)] = dialogue.encode_feedback(
        BYTES, load_feedback([write(tmp_path, record)])[1], 100
    )
    assert completions[0] == BYTES.dialogue([Q1, A1, Q2, A2])[0]
    assert completions[1] == BYTES.dialogue([Q1, ("assistant", "b")])[0]


@pytest.mark.parametrize(
    "record, says",
    [
        ({"completion": [SAY, AGAIN], "label": True}, "must not end with a user turn"),
        ({"completion": [ASK, SAY], "label": True}, "'completion' begins with a user turn"),
        ({"chosen": [SAY, AGAIN], "rejected": [FINAL]}, "must not end with a user turn"),
        ({"chosen": [SAY], "rejected": [FINAL, AGAIN]}, "must not end with a user turn"),
        ({"chosen": [SAY], "rejected": [ASK, FINAL]}, "begins with a user turn"),
        ({"completions": [[SAY], [FINAL, AGAIN]], "ranks": [1, 2]}, "must not end with a user"),
    ],
)
def test_a_judged_reply_neither_begins_nor_ends_with_the_user(tmp_path, capsys, record, says):
    error = refused_file(capsys, "feedback", write(tmp_path, {"prompt": "q"} | record))
    assert says in error, error


@pytest.mark.parametrize(
    "beside, before",
    [
        ({"system": "s"}, [("system", "s")]),
        ({"system_prompt": "s"}, [("system", "s")]),
        ({"history": [["q0", "a0"]]}, [("user", "q0"), ("assistant", "a0")]),
    ],
)
def test_what_stands_beside_the_dialogue_is_said_before_it(tmp_path, beside, before):
    plain, chat = ([*before, ("user", q)] for q in ("q", "q1"))
    records = [
        ({"prompt": "q", "completion": "a1"}, plain),
        ({"instruction": "q", "output": "a1"}, plain),
        ({"question": "q", "chosen": "a1", "rejected": "b"}, plain),
        ({"messages": [ASK, SAY]}, chat),
        (
            {"conversations": [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]},
            chat,
        ),
        ({"prompt": [ASK], "chosen": [SAY], "rejected": [FINAL]}, chat),
        ({"chosen": [ASK, SAY], "rejected": [ASK, FINAL]}, chat),
    ]
    for record, expected in records:
        assert dialogues(tmp_path, record | beside) == [[*expected, A1]], record


def test_a_system_text_that_is_there_twice_is_said_once(tmp_path):
    system = {"role": "system", "content": "s"}
    said = [("system", "s"), ("user", "q1"), A1]
    record = {"messages": [system, ASK, SAY], "system": "s"}
    assert dialogues(tmp_path, record) == dialogues(tmp_path, record | {"system": ""}) == [said]
    said = [("system", "other"), *said]
    assert dialogues(tmp_path, record | {"system": "other"}) == [said]


def test_a_weight_that_is_null_is_none(tmp_path):
    """Arrow fills what some messages lack."""
    plain = [ASK, SAY | {"weight": None}, AGAIN, FINAL | {"weight": 0, "train": 1}]
    ([*_, (role, words)],) = dialogues(tmp_path, {"messages": plain[:2]})
    assert (role, words) == A1
    assert values.turns([SAY | {"weight": None, "train": 0}]) == [("unlearned", "a1")]
    assert values.turns(plain)[-1][0] == "unlearned"


def test_a_system_turn_may_be_what_the_assistant_answers(tmp_path):
    found = dialogues(tmp_path, {"messages": [ASK, SAY, SYSTEM, FINAL]})
    assert found == [[Q1, A1, ("system", "s"), A2]]
    [prompt] = read("prompts", write(tmp_path, {"messages": [ASK, SAY, SYSTEM]}))
    assert prompt.messages == [Q1, A1, ("system", "s")]


@pytest.mark.parametrize("end", ["", "\n\nAssistant:", "\n\nAssistant: "])
@pytest.mark.parametrize("start", ["\n\n", ""])
def test_marks_in_a_prompt_are_turns(tmp_path, start, end):
    words = f"{start}Human: q1\n\nAssistant: a1\n\nHuman: q2{end}"
    [prompt] = read("prompts", write(tmp_path, {"prompt": words}))
    assert prompt.messages == [Q1, A1, Q2]


def test_text_before_the_first_mark_is_the_systems(tmp_path):
    pair = {"chosen": f"Be kind.{HH} a2", "rejected": f"Be kind.{HH} b2"}
    path = write(tmp_path, pair, {"prompt": "Be kind.\n\nHuman: q1\n\nAssistant:", **pair})
    _, [first, second] = load_feedback([path])
    assert first.messages == [("system", "Be kind."), Q1, A1, Q2]
    assert second.messages == [("system", "Be kind."), Q1]
    assert first.first_turn == second.first_turn == "q1"


@pytest.mark.parametrize("words", ["a\n\nHuman: b", "Who is Human: a film", "x\n\nAssistant:"])
def test_a_prompt_that_only_mentions_a_mark_stays_one_turn(tmp_path, words):
    [prompt] = read("prompts", write(tmp_path, {"prompt": words}))
    assert prompt.messages == [("user", words)]


@pytest.mark.parametrize("key, answer", [("input", "output"), ("context", "response")])
def test_a_number_to_ask_about_is_used_and_a_list_is_refused(tmp_path, capsys, key, answer):
    records = [{"instruction": "q", key: value, answer: "a"} for value in (0, 7.5, "x", "")]
    asked = [messages[0][1] for messages in dialogues(tmp_path, *records)]
    assert asked == ["q\n\n0", "q\n\n7.5", "q\n\nx", "q"]
    for value in ([1], {"a": 1}, True):
        path = write(tmp_path, {"instruction": "q", key: value, answer: "a"})
        assert "text or a number" in refused_file(capsys, "demonstrations", path)


@pytest.mark.parametrize(
    "silent", [{"content": ""}, {"content": " \n"}, {"weight": 0}, {"train": False}]
)
def test_an_empty_or_weightless_assistant_turn_carries_no_loss_and_is_counted(
    tmp_path, capsys, silent
):
    path = write(tmp_path, {"messages": [ASK, {**SAY, **silent}, {**AGAIN, "weight": 0}, FINAL]})
    [example] = load_demonstrations([path])
    ids, is_loss = BYTES.dialogue(example.messages)
    assert BYTES.decode([i for i, learned in zip(ids, is_loss) if learned]) == "a2"
    assert sum(is_loss) == 3 and ids.count(ASSISTANT) == 2
    assert "1 assistant turns carry no loss" in capsys.readouterr().err


def test_a_dialogue_in_which_nothing_is_learned_is_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path, {"messages": [ASK, {**SAY, "content": " "}]}, {"messages": [ASK, SAY]})
    assert len(load_demonstrations([path])) == 1
    assert "1 dialogues with no assistant turn to learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    "judged",
    [
        {"prompt": "q", "response_a": "x", "response_b": "y", "winner_model_a": 1},
        {"prompt": "q", "completion": "a", "score": 3},
        {"messages": [ASK, SAY], "preference": 1},
        {"text": "t", "rank": 2},
    ],
)
def test_what_looks_like_a_judgement_is_never_passed_over_in_silence(tmp_path, capsys, judged):
    list(read_texts([write(tmp_path, judged)]))
    warning = capsys.readouterr().err
    unused = judged.keys() - {"prompt", "completion", "messages", "text"}
    names = [name for name in unused if name != "response_a" and name != "response_b"]
    assert warning.startswith("warning: ") and all(name in warning for name in names)
    assert "may be judgements" in warning


def test_a_stage_that_asks_for_no_judgement_says_what_becomes_of_one(tmp_path, capsys):
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    for loader, says in (("texts", "gpt"), ("demonstrations", "sft"), ("prompts", "ppo")):
        read(loader, path)
        warning = capsys.readouterr().err
        assert "rankings may be judgements: " in warning
        assert f"train_{says}.py sees at most which reply is better" in warning
    load_feedback([path])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "others", [{"instruction": "x", "output": "y"}, {"messages": [ASK, SAY]}, {"prompt": "x"}]
)
def test_named_columns_win_over_those_that_are_known(tmp_path, others):
    path = write(tmp_path, {**others, "my_q": "q", "my_a": "a"})
    [example] = load_demonstrations([path], ["prompt=my_q", "completion=my_a"])
    assert example.messages == [("user", "q"), ("assistant", "a")]
    [prompt] = load_prompts([path], ["prompt=my_q"])
    assert "my_q" not in prompt.columns and prompt.columns["my_a"] == "a"  # it is renamed


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [ASK, SAY], "rejected": [ASK, FINAL]},
        {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1.0},
        {"chosen": HH + " a", "rejected": HH + " b"},
        {"prompt": [ASK, SAY, ASK], "chosen": "a", "rejected": "b"},
    ],
)
def test_every_shape_keeps_its_labeler_also_behind_the_flag(tmp_path, record):
    for columns, key in (((), "labeler"), (["labeler=who"], "who")):
        _, [pair] = load_feedback([write(tmp_path, {**record, key: 7})], columns)
        assert pair.labeler == "7" and pair.messages[-1][0] == "user"


@pytest.mark.parametrize(
    "message",
    [{"role": "tool", "content": "7"}, {**SAY, "content": None, "tool_calls": [{"id": 1}]}],
)
def test_a_dialogue_that_calls_tools_is_refused_by_line(tmp_path, capsys, message):
    path = write(tmp_path, {"messages": [ASK, SAY]}, {"messages": [ASK, message]})
    error = refused(capsys, load_demonstrations, [path])
    assert error.startswith(f"error: {path}:2") and "tool" in error


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_separators_spelled_in_text_are_counted(tmp_path, capsys, name):
    text = "one<|endoftext|>two<|endoftext|>three</s>"
    path = write(tmp_path, text if name == "a.txt" else {"text": text}, name=name)
    assert [text for _, text in read_texts([path])] == [text]
    warning = capsys.readouterr().err
    assert "<|endoftext|> 2 times, </s> 1 times" in warning


def test_each_file_is_warned_of_by_its_own_name(tmp_path, capsys):
    """Whatever its records are called by: a line, or a place in a list."""
    listed, lined = tmp_path / "list[1].json", tmp_path / "lines:1.jsonl"
    listed.write_text(json.dumps([{"text": "a"}, {"text": "one</s>", "score": 1}]))
    lined.write_text('{"text": "two</s>three</s>", "rating": 2}\n')
    assert len(list(read_texts([listed, lined]))) == 3
    warned = set(capsys.readouterr().err.splitlines())
    for path, column, n in ((listed, "score", 1), (lined, "rating", 2)):
        assert any(f"{path}: {column} may be judgements: " in line for line in warned)
        assert any(f"{path}: text spells </s> {n} times: " in line for line in warned)


def test_dialogues_without_a_user_turn_are_told_apart(tmp_path):
    opened = [{"messages": [{**SAY, "content": f"a{i}"}]} for i in range(300)]
    empty = [{"prompt": "", "completion": f"b{i}"} for i in range(300)]
    judged = [{"prompt": "", "chosen": f"c{i}", "rejected": "d"} for i in range(300)]
    for examples in (
        load_demonstrations([write(tmp_path, *opened)]),
        load_demonstrations([write(tmp_path, *empty)]),
        load_feedback([write(tmp_path, *judged)])[1],
    ):
        assert len({e.first_turn for e in examples}) == 300
        train, val = split_held_out(examples, [])
        assert 10 < len(val) < 50
    assert not is_held_out("")


# ---- bad input ---------------------------------------------------------------------------------

PAIR = {"prompt": "q", "completion": "a"}
BAD = [  # loader, what its second line is, what the message says
    ("demonstrations", '{"prompt": "q", ', "not JSON"),
    ("demonstrations", "[1, 2]", "found list"),
    ("demonstrations", {"prompt": "q"}, "'completion'"),
    ("demonstrations", {"prompt": 3, "completion": "a"}, "'prompt'"),
    ("demonstrations", {"prompt": "q", "completion": None}, "'completion'"),
    ("demonstrations", {"messages": [[]]}, "'messages'"),
    ("demonstrations", {"messages": "hello"}, "'messages'"),
    ("demonstrations", {"messages": [{**ASK, "role": "robot"}]}, "role 'robot'"),
    ("demonstrations", {"messages": [{**ASK, "role": "system"}]}, "system"),
    ("demonstrations", {"messages": [ASK]}, "no assistant turn"),
    ("demonstrations", {"chosen": "no dialogue"}, "no assistant turn"),
    ("prompts", {"text": "q"}, "'prompt'"),
    ("prompts", {"messages": [SAY]}, "user turn"),
    ("texts", {"text": 1}, "'text'"),
    ("texts", {"title": "x"}, "'title'"),
    ("feedback", {"prompt": "q", "completion": "a"}, "a rating"),
    ("feedback", {"chosen": HH + "a", "rejected": None}, "chosen and rejected"),
    ("feedback", {"chosen": "a", "rejected": "b"}, "share no prompt"),
    ("feedback", {"prompt": "q", "completions": ["a", "b", "c"], "ranks": [1, 2]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a"], "ranks": []}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 1.5]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", "b"], "ranks": [True, 2]}, "'ranks'"),
    ("feedback", {"prompt": "q", "completions": ["a", 2], "ranks": [1, 2]}, "'completions'"),
    ("feedback", {"prompt": "q", "ranks": [1, 2]}, "completions"),
    ("feedback", {**PAIR, "rating": 6}, "found 6"),
    ("feedback", {**PAIR, "rating": "five"}, "'five'"),
    ("feedback", {**PAIR, "rating": True}, "found True"),
    ("feedback", '{"prompt": "q", "completion": "a", "rating": NaN}', "found nan"),
    ("feedback", {**PAIR, "label": "yes"}, "'label'"),
]
GOOD = {
    "texts": {"text": "a"},
    "demonstrations": PAIR,
    "prompts": {"prompt": "q"},
    "feedback": {"prompt": "q", "chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("loader, line, reason", BAD)
def test_a_bad_line_is_named_with_its_file_its_number_and_the_reason(
    tmp_path, capsys, loader, line, reason, name
):
    path = write(tmp_path, GOOD[loader], "", line, GOOD[loader], name=name)
    error = refused_file(capsys, loader, path)
    assert f"{path}:3: " in error and reason in error, error


def test_mixed_kinds_name_both_places(tmp_path, capsys):
    path = write(tmp_path, GOOD["feedback"], {**PAIR, "rating": 3})
    error = refused_file(capsys, "feedback", path)
    assert f"{path}:1 has rankings" in error and f"{path}:2: ratings" in error


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.txt"])
def test_a_missing_or_empty_file_is_refused(tmp_path, capsys, loader, name):
    assert "No such file" in refused_file(capsys, loader, tmp_path / name)
    for lines in ([], ["", "  "]):
        assert "empty" in refused_file(capsys, loader, write(tmp_path, *lines, name=name))
    assert "directory" in refused_file(capsys, loader, tmp_path)


# ---- the split ---------------------------------------------------------------------------------


def test_the_split_is_the_same_in_every_process_and_version():
    assert [i for i in range(60) if is_held_out(f"question {i}")] == [7, 29, 35, 37, 49]
    assert is_held_out("é") is False
    assert 0.09 < sum(is_held_out(f"question {i}") for i in range(20_000)) / 20_000 < 0.11


@given(st.text(min_size=1), st.text(), st.text())
def test_the_split_depends_on_the_first_user_turn_alone(first, a, b):
    records = [
        {"prompt": first, "completion": a},
        {"prompt": first, "chosen": a, "rejected": b},
        {"prompt": first, "completions": [a, b], "ranks": [1, 2], "labeler": b},
        {"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": a}]},
        {"messages": [SAY, {"role": "user", "content": first}, {"role": "user", "content": b}]},
    ]
    found = [recognise(record) for record in records]
    assert {first_user_turn(r.get("messages") or r["prompt"]) for r in found} == {first}
    example = Example([("user", first), ("assistant", a), ("user", b)], b)
    feedback = Example([("user", first)], a, [a, b], [1, 2], b)
    assert example.first_turn == feedback.first_turn == first
    assert is_held_out(first) is is_held_out(str(first))


@pytest.mark.parametrize("opening", ["", "\n\nAssistant: hi"])
def test_both_sides_of_an_hh_pair_and_its_text_are_in_one_split(tmp_path, opening):
    path = write(tmp_path, {"chosen": opening + HH + " a2", "rejected": opening + HH + " b2"})
    [(key, _)] = read("texts", path)
    [demonstration], (_, [pair]) = read("demonstrations", path), load_feedback([path])
    assert key == demonstration.first_turn == pair.first_turn == "q1"


ANSWER, WORSE = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
UNDER = {  # a question under a system text, in every place that one may stand
    "messages": lambda s, q: {"messages": [{"role": "system", "content": s}, q, ANSWER]},
    "developer": lambda s, q: {"messages": [{"role": "developer", "content": s}, q, ANSWER]},
    "system": lambda s, q: {"system": s, "prompt": q["content"], "completion": "a"},
    "system_prompt": lambda s, q: {"system_prompt": s, "messages": [q, ANSWER]},
    "chat prompt": lambda s, q: {
        "prompt": [{"role": "system", "content": s}, q],
        "completion": "a",
    },
    "preamble": lambda s, q: {"chosen": f"{s}\n\nHuman: {q['content']}\n\nAssistant: a"},
    "history": lambda s, q: {
        "system": s,
        "history": [[q["content"], "a"]],
        "instruction": f"go on as {s}",
        "output": "b",
    },
}


@pytest.mark.parametrize("place", UNDER)
def test_one_question_under_several_system_texts_is_on_one_side(tmp_path, place):
    asked = [{"role": "user", "content": f"Question {i}?"} for i in range(200)]
    voices = ("Answer as a pirate.", "Be brief.", "Be a poet.", "Answer politely.", "One word.")
    path = write(tmp_path, *(UNDER[place](voice, q) for q in asked for voice in voices))
    train, val = split_held_out(load_demonstrations([path]), [])
    keys = [{e.first_turn for e in part} for part in (train, val)]
    assert not keys[0] & keys[1] and keys[0] | keys[1] == {q["content"] for q in asked}
    assert {len(part) % len(voices) for part in (train, val)} == {0}
    assert {key for key, _ in read("texts", path)} == keys[0] | keys[1]
    prompts = read("prompts", path)
    assert len(prompts) == 1000  # they are prompts of their own
    assert {e.first_turn for e in prompts} == keys[0] | keys[1]


def test_judgements_of_one_question_under_several_system_texts_are_on_one_side(tmp_path):
    systems = [[{"role": "system", "content": s}] if s else [] for s in ("", "Be brief.", "Rhyme.")]
    dialogues = [[*s, {"role": "user", "content": "q1"}] for s in systems]
    pairs = [{"chosen": [*d, ANSWER], "rejected": [*d, WORSE]} for d in dialogues]
    _, examples = load_feedback([write(tmp_path, *pairs)])
    assert [e.first_turn for e in examples] == ["q1"] * 3


def test_where_the_system_alone_asks_that_is_the_question(tmp_path):
    """Also beside another answer: or one prompt would be on both sides."""
    asking = {"role": "system", "content": "Tell me a story."}
    path = write(tmp_path, *({"messages": [asking, answer]} for answer in (ANSWER, WORSE)))
    examples = load_demonstrations([path])
    assert {e.first_turn for e in examples} == {"Tell me a story."}


def test_examples_split_by_their_prompt_unless_held_out_ones_are_given(capsys):
    examples = [Example([("user", str(i % 50)), SAID], f"f:{i}") for i in range(200)]
    train, val = split_held_out(examples, [])
    assert sorted(e.source for e in train + val) == sorted(e.source for e in examples)
    assert not {e.first_turn for e in train} & {e.first_turn for e in val}
    assert all(is_held_out(e.first_turn) for e in val)
    assert split_held_out(train, val[:1]) == (train, val[:1])
    assert "--val_data" in refused(capsys, split_held_out, train[:1], [])


@pytest.mark.parametrize("n", [10, 20, 30, 57, 99])
def test_of_few_prompts_a_tenth_is_held_out_and_not_what_chance_makes_of_it(n):
    """Of 30 numbered questions the hash alone takes 1 to 6, depending on where they begin."""
    for first in range(0, 400, 40):
        examples = [Example([("user", f"question {first + i}"), SAID], "") for i in range(n)]
        train, val = split_held_out(examples, [])
        assert len(val) == n // 10
        held_out = {e.first_turn for e in val}
        by_hash = {e.first_turn for e in examples if is_held_out(e.first_turn)}
        assert held_out <= by_hash or by_hash <= held_out


@pytest.mark.parametrize("n", [2, 3, 9, 25, 150])
def test_of_few_prompts_some_are_held_out_and_most_are_not(n):
    """Also where the hash would take all of them, or none; always the same ones."""
    texts = list(map(str, range(2000)))
    for side in (False, True):
        asked = [t for t in texts if is_held_out(t) == side][:n]
        examples = [Example([("user", t), SAID], t) for t in asked for _ in range(2)]
        train, val = split_held_out(examples, [])
        assert len({e.first_turn for e in val}) == max(1, n // 10) and len(train + val) == 2 * n
        assert not {e.first_turn for e in train} & {e.first_turn for e in val}
        again = split_held_out(examples[::-1], [])
        assert {e.first_turn for e in again[1]} == {e.first_turn for e in val}


def test_written_records_are_read_back(tmp_path):
    records = [{"prompt": "é\n\u2028", "completion": "🦊"}, {"prompt": "", "completion": "x"}]
    path = write_records(tmp_path / "new/folder/a.jsonl", iter(records))
    assert [record for _, record in read_records([path])] == records
