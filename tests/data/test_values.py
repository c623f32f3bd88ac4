"""What a cell of a record becomes."""

from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.shapes import opening
from nanorlhf.data.values import as_messages, turns

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": st.sampled_from(["", "a", "b\n\nc"]),
            "weight": st.sampled_from([0, 1]),
        }
    ),
    max_size=6,
).map(lambda messages: [*messages, {"role": "user", "content": "and?"}])


@given(st.text())
def test_an_opening_and_its_rest_are_the_text(text):
    start, rest = opening(text)
    words = text.split()
    assert start + rest == text
    assert len(start.split()) == min(len(words), 8, max(1, len(words) // 4))
    assert len(opening(text + " word" * 40)[0].split()) == 8


@given(MESSAGES)
def test_turns_that_are_written_are_read_as_the_same_turns(messages):
    dialogue = turns(messages)
    again = turns(as_messages(dialogue))
    assert again == dialogue


def test_a_turn_without_loss_is_written_with_weight_0_and_the_system_with_its_role():
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "weight": 0, "content": "go away"},
        {"role": "user", "content": "why?"},
    ]
    assert as_messages(turns(messages)) == messages
