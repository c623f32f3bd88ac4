"""The template, and what becomes of texts that are too long for the context."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data import dialogue
from nanorlhf.data.examples import Example
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused

BYTES = byte_tokenizer()
EOS, USER, ASSISTANT = BYTES.eos_id, BYTES.user_id, BYTES.assistant_id
Q, SAID = [("user", "q")], ("assistant", "a")


# ---- the template ------------------------------------------------------------------------------


def test_the_template_is_exact_and_the_loss_is_on_the_assistant_and_its_eos():
    messages = [("user", "hi"), ("assistant", "yo"), ("user", "é"), ("assistant", "")]
    ids, is_loss = BYTES.dialogue(messages)
    h, i, y, o, *e = b"hiyo\xc3\xa9"
    assert ids == [USER, h, i, ASSISTANT, y, o, EOS, USER, *e, ASSISTANT, EOS]
    assert is_loss == [False] * 4 + [True] * 3 + [False] * 4 + [True]


def test_a_prompt_ends_where_the_assistant_speaks_and_a_pair_with_its_eos():
    turns = [("user", "q"), ("assistant", "a"), ("user", "r")]
    prompt = [USER, ord("q"), ASSISTANT, ord("a"), EOS, USER, ord("r"), ASSISTANT]
    assert dialogue.encode_prompt(BYTES, turns) == prompt
    mask = [False] * 3 + [True] * 2 + [False] * 3
    pair = [*prompt, ord("s"), EOS], [*mask, True, True]
    assert dialogue.encode_pair(BYTES, turns, "s") == pair
    assert dialogue.encode_pair(BYTES, turns, "") == ([*prompt, EOS], [*mask, True])


TURN = st.tuples(
    st.sampled_from(["user", "assistant"]), st.sampled_from(["", "x", "<|endoftext|>", "<|user|>"])
)


@given(st.lists(TURN, min_size=1, max_size=5))
def test_nothing_of_the_user_is_in_the_loss_and_every_assistant_eos_is(messages):
    ids, is_loss = BYTES.dialogue(messages)
    assert len(ids) == len(is_loss)
    learned = [i for i, loss in zip(ids, is_loss) if loss]
    said = [[*BYTES.encode(text), EOS] for role, text in messages if role == "assistant"]
    assert learned == sum(said, [])
    assert ids.count(EOS) == len(said)  # text that spells a special token is plain text
    assert ids.count(USER) + ids.count(ASSISTANT) == len(messages)


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
        assert "leaves no room" in refused(capsys, dialogue.room_for_prompts, *flags)


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
        whole = BYTES.dialogue(messages)
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
    long = Example(Q, "f:1", ["a", "b" * 7], [1, 2], "")
    short = Example(Q, "f:2", ["a", "bb", ""], [2, 1, 3], "")
    longest = Example(Q, "f:3", ["a", "b" * 6], [1, 2], "")
    rows = dialogue.encode_feedback(BYTES, [long, short, longest], 8)
    ids = [dialogue.encode_pair(BYTES, Q, text)[0][-8:] for text in ("a", "bb", "", "b" * 6)]
    short = ids[:3], [2, 3, 1], [2, 1, 3], "f:2"
    assert rows == [short, ([ids[0], ids[3]], [2, 7], [1, 2], "f:3")]
    assert "1 of 7 completions dropped" in capsys.readouterr().err


def test_feedback_that_fits_nowhere_exits_2():
    long = Example(Q, "f:1", ["a", "b" * 9], [1, 2], "")
    with pytest.raises(SystemExit) as stop:
        dialogue.encode_feedback(BYTES, [long], 8)
    assert stop.value.code == 2


def test_prompts_are_cut_from_the_left_and_keep_their_text():
    examples = [Example([("user", "abcdef")], "f:1"), Example([*Q, SAID, *Q], "f:2")]
    a, b = dialogue.encode_prompts(BYTES, examples, 5)
    assert a.ids == [*b"cdef", ASSISTANT] and (a.text, a.source) == ("abcdef", "f:1")
    assert b.ids == [ord("a"), EOS, USER, ord("q"), ASSISTANT] and b.text == "q\na\nq"
