"""What a cell of a record becomes."""

from hypothesis import given
from hypothesis import strategies as st

from nanorlhf.data.shapes import opening


@given(st.text())
def test_an_opening_and_its_rest_are_the_text(text):
    start, rest = opening(text)
    words = text.split()
    assert start + rest == text
    assert len(start.split()) == min(len(words), 8, max(1, len(words) // 4))
    assert len(opening(text + " word" * 40)[0].split()) == 8
