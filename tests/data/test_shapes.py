"""Other people's files: every published shape is recognised, every broken one named."""

import csv
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.examples import (
    load_demonstrations,
    load_feedback,
    load_prompts,
    read,
    read_texts,
    recognise,
    standing,
)
from nanorlhf.data.shapes import SHAPES
from nanorlhf.data.values import LeftOut, Misfit, as_turns, turns
from tests.helpers import refused

FIXTURES = Path(__file__).parents[1] / "fixtures"
USER, SAID = (lambda text: ("user", text)), (lambda text: ("assistant", text))


def raw(name):
    """The records of a fixture, read by the standard library alone."""
    text = (FIXTURES / name).read_text()
    if name.endswith(".csv"):
        return list(csv.DictReader(text.splitlines()))
    return json.loads(text) if text[0] == "[" else [json.loads(x) for x in text.splitlines()]


def demonstrations(name):
    return [e.messages for e in load_demonstrations([FIXTURES / name])]


def prompts(name):
    return [e.messages for e in load_prompts([FIXTURES / name])]


def feedback(name):
    kind, examples = load_feedback([FIXTURES / name])
    return kind, [(e.messages, e.completions, e.target) for e in examples]


SHAPE_OF = {  # every fixture has the columns, types and nesting of a published data set
    "alpaca.json": ("Alpaca", "sft"),
    "alpaca_hub.jsonl": ("Alpaca", "sft"),
    "alpaca_preference.json": ("comparisons", "rankings"),
    "arena_140k.jsonl": ("Chatbot Arena", "rankings"),
    "arena_human.jsonl": ("Chatbot Arena", "rankings"),
    "beavertails.jsonl": ("BeaverTails", "thumbs"),
    "dolly.jsonl": ("Dolly", "sft"),
    "gsm8k.jsonl": ("prompt, completion", "sft"),
    "helpsteer.jsonl": ("HelpSteer", "ratings"),
    "helpsteer2.jsonl": ("HelpSteer", "ratings"),
    "helpsteer3.jsonl": ("HelpSteer3", "rankings"),
    "hh_rlhf.jsonl": ("HH-RLHF", "rankings"),
    "imdb.csv": ("judged text", "thumbs"),
    "imdb.jsonl": ("judged text", "thumbs"),
    "lm_text.jsonl": ("text", "gpt"),
    "messages.jsonl": ("messages", "sft"),
    "nectar.jsonl": ("OpenAssistant, Nectar", "rankings"),
    "oasst.jsonl": ("OpenAssistant, Nectar", "rankings"),
    "oasst_guanaco.jsonl": ("text", "sft"),
    "openai_messages.jsonl": ("messages", "sft"),
    "openai_preferences.jsonl": ("OpenAI preferences", "rankings"),
    "orca_dpo_pairs.jsonl": ("comparisons", "rankings"),
    "pku_saferlhf.jsonl": ("PKU-SafeRLHF", "rankings"),
    "prompt_completion.jsonl": ("prompt, completion", "sft"),
    "prompt_completion_chat.jsonl": ("prompt, completion", "sft"),
    "prompts.jsonl": ("prompts", "ppo"),
    "prompts_chat.jsonl": ("prompts", "ppo"),
    "sharegpt.json": ("ShareGPT", "sft"),
    "shp.jsonl": ("SHP", "rankings"),
    "spreadsheet.csv": ("a spreadsheet", "rankings"),
    "stack_exchange_preferences.jsonl": ("Stack Exchange", "rankings"),
    "tldr_comparisons.jsonl": ("TL;DR comparisons", "rankings"),
    "tldr_comparisons_raw.jsonl": ("TL;DR comparisons", "rankings"),
    "tldr_filtered.jsonl": ("TL;DR", "sft"),
    "trl_preference.jsonl": ("comparisons", "rankings"),
    "trl_preference_chat.jsonl": ("comparisons of dialogues", "rankings"),
    "trl_preference_chat_explicit.jsonl": ("comparisons of dialogues", "rankings"),
    "ultrachat_200k.jsonl": ("messages", "sft"),
    "ultrafeedback.jsonl": ("UltraFeedback", "rankings"),
    "ultrafeedback_binarized.jsonl": ("comparisons of dialogues", "rankings"),
    "unpaired_preference.jsonl": ("likes and dislikes", "thumbs"),
    "unpaired_preference_chat.jsonl": ("likes and dislikes", "thumbs"),
    "webgpt.jsonl": ("WebGPT", "rankings"),
    "wildchat.jsonl": ("WildChat, LMSYS-Chat", "sft"),
}


def test_every_fixture_is_listed_and_every_published_shape_has_one():
    assert {p.name for p in FIXTURES.iterdir()} == set(SHAPE_OF)
    ours = {"rankings", "ratings"}  # our own files: see test_examples.py
    assert {shape.name for shape in SHAPES} - ours == {shape for shape, _ in SHAPE_OF.values()}


@pytest.mark.parametrize("name", SHAPE_OF)
def test_a_published_shape_is_recognised_without_a_flag(name, capsys):
    shape, use = SHAPE_OF[name]
    rows = list(read([FIXTURES / name], "", lambda source, record: record))
    n = len(raw(name)) - ("left out" in capsys.readouterr().err)
    assert {found["shape"].name for found in rows} == {shape}
    assert len(rows) == (3 if name == "oasst.jsonl" else n)  # prompts, among nine messages
    if use not in ("gpt", "ppo", "sft"):
        kind, examples = load_feedback([FIXTURES / name])
        assert kind == use and len(examples) == len(rows) - (name == "oasst.jsonl")
        assert all(e.messages[-1][0] == "user" for e in examples)
    if use not in ("gpt", "ppo"):
        assert len(load_demonstrations([FIXTURES / name], disliked="learn")) == len(rows)
    if use != "gpt":
        assert all(e.messages[-1][0] == "user" for e in load_prompts([FIXTURES / name]))
    assert len(list(read_texts([FIXTURES / name]))) == len(rows)


# ---- what each becomes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, beside, answer",
    [
        ("alpaca.json", "input", "output"),
        ("alpaca_hub.jsonl", "input", "output"),
        ("dolly.jsonl", "context", "response"),
    ],
)
def test_an_input_or_context_stands_behind_the_instruction(name, beside, answer):
    for r, messages in zip(raw(name), demonstrations(name), strict=True):
        ask = r["instruction"] + ("\n\n" + r[beside] if r[beside] else "")
        assert messages == [USER(ask), SAID(r[answer])]
    assert name == "alpaca_hub.jsonl" or {bool(r[beside]) for r in raw(name)} == {True, False}


def test_sharegpt_speakers_are_user_and_assistant_and_empty_records_are_left_out(capsys):
    role = {"human": "user", "gpt": "assistant"}
    found = demonstrations("sharegpt.json")
    assert "1 records with nothing in them left out" in capsys.readouterr().err
    first, second, third, _ = (r["conversations"] for r in raw("sharegpt.json"))
    assert found[0] == [(role[m["from"]], m["value"]) for m in first]
    system, ask, said = (m["value"] for m in second)
    assert found[1] == [("system", system), USER(ask), SAID(said)]
    assert found[2] == [(role[m["from"]], m["value"]) for m in third]


def test_messages_win_over_a_prompt_column():
    plain, chat = demonstrations("messages.jsonl")
    a, b = (r["messages"] for r in raw("messages.jsonl"))
    assert plain == [(m["role"], m["content"]) for m in a]
    assert chat == [(m["role"], m["content"]) for m in b]
    assert prompts("messages.jsonl")[1] == chat[:-1]


def test_guanaco_texts_are_dialogues():
    assert demonstrations("oasst_guanaco.jsonl")[1] == [
        USER("What is a punt?"),
        SAID("A flat boat pushed with a pole.\n\nIt has no keel."),
        USER("Is it hard to steer?"),
        SAID("At first, yes."),
    ]


def test_tldr_takes_the_chosen_summary_and_openais_prompt():
    name = "tldr_comparisons.jsonl"
    for r, (messages, (chosen, rejected), _) in zip(raw(name), feedback(name)[1], strict=True):
        assert chosen == r["summaries"][r["choice"]]["text"].strip()
        assert rejected == r["summaries"][1 - r["choice"]]["text"].strip()
        about = r["info"]
        if about["post"]:
            title = f"SUBREDDIT: r/{about['subreddit']}\n\nTITLE: {about['title']}"
            assert messages == [USER(f"{title}\n\nPOST: {about['post']}\n\nTL;DR:")]
        else:
            assert messages[0][1].endswith(f"ARTICLE: {about['article']}\n\nTL;DR:")
    assert {r["choice"] for r in raw(name)} == {0, 1}
    assert {e.labeler for e in load_feedback([FIXTURES / name])[1]} == {
        r["worker"] for r in raw(name)
    }


@pytest.mark.parametrize(
    "name, asked, index, replies",
    [
        ("shp.jsonl", "history", "labels", ("human_ref_B", "human_ref_A")),
        ("pku_saferlhf.jsonl", "prompt", "better_response_id", ("response_0", "response_1")),
    ],
)
def test_the_chosen_reply_is_the_one_of_the_index(name, asked, index, replies):
    """SHP prefers A where its label is 1. Of PKU's the better counts, and not the safer."""
    for r, (messages, pair, ranks) in zip(raw(name), feedback(name)[1], strict=True):
        chosen, rejected = replies[r[index]], replies[1 - r[index]]
        assert (messages, pair, ranks) == ([USER(r[asked])], [r[chosen], r[rejected]], [1, 2])
        assert name != "shp.jsonl" or (r["score_A"] > r["score_B"]) == (chosen == "human_ref_A")
    assert name != "shp.jsonl" or {r[index] for r in raw(name)} == {0, 1}
    assert name == "shp.jsonl" or any(r[index] != r["safer_response_id"] for r in raw(name))


@pytest.mark.parametrize(
    "name, answers, text, score",
    [
        ("ultrafeedback.jsonl", "completions", "response", "fine-grained_score"),
        ("stack_exchange_preferences.jsonl", "answers", "text", "pm_score"),
    ],
)
def test_answers_are_ranked_by_their_score_and_ties_stay(name, answers, text, score):
    records = [r for r in raw(name) if len(r[answers]) > 1]
    for r, (_, completions, ranks) in zip(records, feedback(name)[1], strict=True):
        scores = {answer[text]: answer[score] for answer in r[answers]}
        for c, rank in zip(completions, ranks):
            assert rank == 1 + sum(scores[d] > scores[c] for d in completions)
    best = max(records[0][answers], key=lambda answer: answer[score])[text]
    assert demonstrations(name)[0][-1] == SAID(best)


@pytest.mark.parametrize(
    "scores, ranks",
    [([3, 5], [2, 1]), ([3, None, 5], [2, 1]), ([3, math.nan], [1]), ([None], [1]), ([], None)],
)
def test_answers_without_a_score_are_left_out_but_for_one_alone(scores, ranks):
    answers = [{"text": str(i), "pm_score": score} for i, score in enumerate(scores)]
    record = {"question": "q", "answers": answers}
    if ranks:
        assert recognise(record)["target"] == ranks
    else:
        with pytest.raises(LeftOut):
            recognise(record)


def test_a_single_answer_can_be_learned_and_is_no_ranking(tmp_path, capsys):
    answers = [[{"text": x, "pm_score": 1} for x in texts] for texts in ("ab", "c")]
    rows = [json.dumps({"question": "q", "answers": some}) + "\n" for some in answers]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows))
    assert [e.messages[-1] for e in load_demonstrations([path])] == [SAID("a"), SAID("c")]
    assert len(load_feedback([path])[1]) == 1
    assert "1 rankings of a text with itself, or alone, left out" in capsys.readouterr().err


def test_helpsteer_ratings_are_stretched_to_5_and_its_prompts_may_have_turns():
    for name in ("helpsteer.jsonl", "helpsteer2.jsonl"):
        for r, (_, said, [rating]) in zip(raw(name), feedback(name)[1], strict=True):
            assert (said, rating) == ([r["response"]], r["helpfulness"] * 1.25)
    assert feedback("helpsteer2.jsonl")[1][0][0] == [
        USER("What is a bowline?"),
        SAID("A knot that makes a loop which does not slip."),
        USER("How do I tie it?"),
    ]


@pytest.mark.parametrize("name", ["imdb.csv", "imdb.jsonl"])
def test_a_judged_text_is_an_opening_to_go_on_with_and_a_like(name):
    for r, (messages, [rest], [label]) in zip(raw(name), feedback(name)[1], strict=True):
        assert messages[0][1] + rest == r["text"] and label == int(r["label"])
    for name in ("unpaired_preference.jsonl", "unpaired_preference_chat.jsonl"):
        assert [t for *_, [t] in feedback(name)[1]] == [float(r["label"]) for r in raw(name)]


@pytest.mark.parametrize(
    "name",
    [
        "trl_preference_chat.jsonl",
        "ultrafeedback_binarized.jsonl",
        "trl_preference_chat_explicit.jsonl",
    ],
)
def test_the_prompt_of_two_dialogues_is_what_they_share(name):
    for r, (messages, replies, _) in zip(raw(name), feedback(name)[1], strict=True):
        for reply, side in zip(replies, ("chosen", "rejected")):
            said = [content for _, content in [*messages, *as_turns(reply)]]
            before = turns(r["prompt"]) if "explicit" in name else []
            assert said == [content for _, content in before + turns(r[side])]


def test_a_dialogue_as_chosen_wins_over_a_prompt_that_lacks_its_first_turns():
    ask, say, again = (
        {"role": role, "content": role[0] + str(i)}
        for i, role in enumerate(("user", "assistant", "user"))
    )
    replies = [[ask, say, again, {"role": "assistant", "content": text}] for text in "xy"]
    record = {"prompt": again["content"], "chosen": replies[0], "rejected": replies[1]}
    assert recognise(record)["prompt"] == turns([ask, say, again])


def test_orca_pairs_put_the_system_before_the_question():
    for r, (messages, *_) in zip(raw("orca_dpo_pairs.jsonl"), feedback("orca_dpo_pairs.jsonl")[1]):
        assert messages == turns(
            [{"role": "system", "content": r["system"]}, {"role": "user", "content": r["question"]}]
        )


def test_arena_keeps_ties_the_judge_and_turns_that_differ_from_the_first_answer_on():
    kind, found = feedback("arena_human.jsonl")
    deep, fruit, sing = raw("arena_human.jsonl")
    assert found[0][0] == [USER("How deep is a well?")]
    for side, reply in zip("ab", found[0][1]):
        assert [*found[0][0], *reply] == turns(deep[f"conversation_{side}"])
    assert [ranks for *_, ranks in found] == [[2, 1], [1, 2], [1, 1]]
    judges = [e.labeler for e in load_feedback([FIXTURES / "arena_human.jsonl"])[1]]
    assert judges == [deep["judge"], fruit["judge"], sing["judge"]]
    _, [first, tie] = feedback("arena_140k.jsonl")
    assert first == ([USER("What is tin?")], ["A soft metal.", "A box."], [1, 2])
    assert tie[2] == [1, 1]


def test_a_spreadsheet_says_who_won():
    kind, found = feedback("spreadsheet.csv")
    wells = ([USER("How deep is a well?")], ["Ten steps, or more.", "No."], [1, 2])
    assert kind == "rankings" and found[0] == wells
    assert found[1:] == [
        ([USER("Who sings?")], ["A box.", "Birds sing."], [2, 1]),
        ([USER("What is tin?")], ["A metal.", "A soft metal."], [1, 1]),
    ]


SHEETS = ("question", "answer_a", "answer_b"), ("prompt", "response_a", "response_b")


@pytest.mark.parametrize("columns", SHEETS)
@pytest.mark.parametrize(
    "words, target",
    [("a A 1 1.0 answer_a Response_A model_a", [1, 2]), ("b B 2 2.0 answer_b", [2, 1])],
)
def test_a_winner_is_read_however_people_write_it(columns, words, target):
    for winner in [*words.split(), f" {words.split()[0]} ", target.index(1) + 1]:
        record = dict(zip(columns, ("q", "x", "y"))) | {"winner": winner, "labeler": "ann"}
        read = recognise(record)
        assert (read["target"], read["completions"], read["labeler"]) == (target, ["x", "y"], "ann")
        assert read["messages"][-1][1] == "xy"[target.index(1)]
        assert not record.keys() - read["shape"].columns.values() - {"labeler"}


@pytest.mark.parametrize("winner", ["", 0, "c", "0", "both", 3, "a b"])
def test_a_winner_that_is_none_is_refused(winner):
    record = {"question": "q", "answer_a": "x", "answer_b": "y", "winner": winner}
    with pytest.raises(Misfit, match="'winner' must be one of a, b, 1, 2, tie"):
        recognise(record)


def test_two_scores_or_their_difference_rank_two_replies():
    found = feedback("helpsteer3.jsonl")[1]
    for r, (messages, replies, ranks) in zip(raw("helpsteer3.jsonl"), found, strict=True):
        assert messages == turns(r["context"])
        assert replies == [r["response1"], r["response2"]]
        preference = r["overall_preference"]  # below 0 is for the first
        assert ranks[0] - ranks[1] == (preference > 0) - (preference < 0)
    assert {r["overall_preference"] for r in raw("helpsteer3.jsonl")} == {-3, 1, 0}
    [(asked, replies, ranks), (*_, tie)] = feedback("webgpt.jsonl")[1]
    first = raw("webgpt.jsonl")[0]
    assert asked == [USER(first["question"]["full_text"])]
    assert replies == [first["answer_0"], first["answer_1"]] and (ranks, tie) == ([2, 1], [1, 1])


def test_nectars_rank_1_is_the_best_and_its_marked_prompts_are_turns():
    floats, _ = feedback("nectar.jsonl")[1]
    asked = [USER("What floats?"), SAID("Wood does."), USER("And stone?")]
    assert floats == (asked, ["Pumice floats.", "No.", "Most stone sinks."], [1, 3, 2])


def test_openassistants_rank_0_is_the_best_and_no_answer_is_learned_twice():
    text = {r["message_id"]: r["text"] for r in raw("oasst.jsonl")}
    first, spring = feedback("oasst.jsonl")[1]
    assert first == ([USER(text["m1"])], [text["m2"], text["m3"]], [2, 1])
    path = [USER(text["m1"]), ("unlearned", text["m3"]), USER(text["m6"])]
    assert spring == (path, [text["m7"], text["m8"], text["m9"]], [3, 1, 2])
    learned = [said for m in demonstrations("oasst.jsonl") for who, said in m if who == "assistant"]
    assert learned == [text["m3"], text["m5"], text["m8"]]


@pytest.mark.parametrize(
    "row, says",
    [({"parent_id": "m9"}, "parent 'm9' is not in the file"), ({"parent_id": "m1"}, "a circle")],
)
def test_a_message_without_its_tree_is_refused(tmp_path, capsys, row, says):
    about = {"message_id": "m1", "message_tree_id": "m0", "role": "prompter", "text": "q"}
    (tmp_path / "a.jsonl").write_text(json.dumps(about | row) + "\n")
    assert says in refused(capsys, load_prompts, [tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    "name",
    "helpsteer helpsteer2 helpsteer3 shp pku_saferlhf beavertails orca_dpo_pairs trl_preference "
    "trl_preference_chat unpaired_preference unpaired_preference_chat".split(),
)
def test_a_copy_in_csv_is_read_as_the_records_are(tmp_path, name):
    """As Dataset.to_csv writes it: numbers are texts, and lists are what Python shows of them."""
    records = raw(f"{name}.jsonl")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        to = csv.DictWriter(file, records[0])
        to.writeheader()
        to.writerows(records)
    kind, examples = load_feedback([tmp_path / "a.csv"])
    found = kind, [(e.messages, e.completions, e.target) for e in examples]
    assert found == feedback(f"{name}.jsonl")


def test_ranks_that_are_texts_are_numbers(tmp_path):
    records = raw("nectar.jsonl")
    for answer in (answer for record in records for answer in record["answers"]):
        answer["rank"] = str(answer["rank"])
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = [e.target for e in load_feedback([tmp_path / "a.jsonl"])[1]]
    assert found == [target for *_, target in feedback("nectar.jsonl")[1]]


def test_scores_that_are_no_numbers_are_no_empty_records(tmp_path, capsys):
    record = raw("ultrafeedback.jsonl")[0]
    for completion in record["completions"]:
        completion["fine-grained_score"] = "high"
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    said = refused(capsys, load_feedback, [tmp_path / "a.jsonl"])
    assert "answers has a number 'fine-grained_score'" in said


def test_openais_preferences_and_messages_are_read_with_their_developer_parts_and_weights():
    name = "openai_preferences.jsonl"
    asked, (chosen, rejected), _ = feedback(name)[1][0]
    assert asked == [("system", "Be brief."), USER("What is a fjord?")]
    first = raw(name)[0]
    assert chosen == first["preferred_output"][0]["content"]
    assert rejected == first["non_preferred_output"][0]["content"]
    assert demonstrations("openai_messages.jsonl")[0] == [
        ("system", "Answer in one word."),
        USER("What is this?\nIt has a sail."),
        ("unlearned", "Boat."),
        USER("Bigger."),
        SAID("Ship."),
    ]


def test_beavertails_unsafe_replies_are_disliked_and_not_learned_unasked(tmp_path, capsys):
    path = [FIXTURES / "beavertails.jsonl"]
    assert [target for *_, target in feedback("beavertails.jsonl")[1]] == [[1.0], [0.0]]
    assert "beavertails.jsonl:2" in refused(capsys, load_demonstrations, path)
    [safe] = load_demonstrations(path, disliked="skip")
    assert safe.source.endswith(":1") and "1 disliked replies left" in capsys.readouterr().err
    assert len(load_demonstrations(path, disliked="learn")) == 2


# ---- what is refused ---------------------------------------------------------------------------

BROKEN = [  # name, content, what the message says
    ("a.csv", b'prompt,completion\nq,a\nq,"a\n', "CSV"),
    ("a.csv", b"prompt,completion\nq,a,b\n", "cells"),
    ("a.csv", b"prompt,completion\n", "it is empty, or has blank lines or a header alone"),
    ("a.json", b"[]", "no records"),
    ("a.jsonl", b" \n\n", "it is empty, or has blank lines or a header alone"),
    ("a.json", b'[{"prompt": "q"', "JSON"),
    ("a.json", b"[1]", "found int"),
    ("a.parquet", b"PAR1 no parquet", "a.parquet: "),
    (
        "a.jsonl",
        b'{"a": 1, "b": 2}',
        "'a', 'b' fit no known shape: name them, as in --columns prompt=",
    ),
    ("a.jsonl", b'{"prompt": null, "completion": null}', "columns none fit"),
    (
        "a.jsonl",
        b'{"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0}',
        "expected 2",
    ),
    ("a.jsonl", b'{"info": 3, "summaries": [], "choice": 0}', "TL;DR"),
    ("a.jsonl", b'{"history": "q", "human_ref_A": "", "human_ref_B": "", "labels": 2}', "found 2"),
    ("a.jsonl", b'{"instruction": "q", "completions": [3]}', "UltraFeedback"),
    ("a.jsonl", b'{"chosen": [{"role": "user", "content": "q"}], "rejected": "x"}', "'rejected'"),
    (
        "a.jsonl",
        b'{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], '
        b'"rejected": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]}',
        "share no prompt",
    ),
    (
        "a.jsonl",
        b'{"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}',
        "must end in a user turn",
    ),
    ("a.jsonl", b'{"conversations": "hi"}', "conversations"),
    ("a.jsonl", b'{"messages": [{"role": ["user"], "content": "q"}]}', "messages"),
    ("a.jsonl", b'{"text": "t", "label": 2}', ""),
]


@pytest.mark.parametrize("name, content, reason", BROKEN)
def test_a_broken_file_is_one_clear_line_and_exit_2(tmp_path, capsys, name, content, reason):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    load = load_demonstrations if reason else load_feedback
    error = refused(capsys, load, [path])
    assert error.startswith(f"error: {path}") and reason in error, error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: (
        st.lists(x, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text"]), x, max_size=3
        )
    ),
    max_leaves=6,
)
KEYS = sorted({name for shape in SHAPES for name in shape.columns.values()})


@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5), st.sampled_from(SHAPES))
def test_no_record_gives_a_traceback(noise, shape):
    """Whatever stands under the names that are looked for: an example, or a misfit."""
    record = dict.fromkeys(shape.columns.values(), "x") | noise
    try:
        recognise(record)
    except (Misfit, LeftOut):
        pass


def test_judgements_stand_until_they_are_taken_back_and_nothing_else_waits():
    """They come last, without what is noted beside them; other records pass as they are."""
    said = lambda id, who, **more: {"judgement_id": id, "labeler": who, "seconds": 1} | more
    rows = [
        said("1", "ann", ranks=1),
        {"text": "t", "seed": 3},
        said("1", "bob", ranks=2),
        said("1", "ann", undone=True),
        said("2", "ann", skipped=True),
        said("1", "ann", ranks=3),
        said("9", "eve", undone=True),
    ]
    found = list(standing((i, row) for i, row in enumerate(rows)))
    kept = lambda who, ranks: {"labeler": who, "ranks": ranks}
    assert found == [(1, {"text": "t", "seed": 3}), (2, kept("bob", 2)), (5, kept("ann", 3))]
    whole = list(standing(((i, row) for i, row in enumerate(rows)), keep=True))
    assert whole == [(i, rows[i]) for i in (1, 2, 5)]
