"""Rows of many lengths -> batches: padding, groups of like length, the order of an epoch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import Example
from nanorlhf.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
PAD = BYTES.pad_id
Q, SAID = [("user", "q")], ("assistant", "a")


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


@pytest.mark.parametrize("width, is_known", [(6, True), (3, True), (5, False), (2, False)])
def test_a_tensor_of_an_unknown_width_is_not_cut_in_silence(width, is_known):
    """It may be one that a fork puts into the rollout: no lengths say what is real in it."""
    batch = {"tokens": torch.zeros(2, 6), "response_mask": torch.ones(2, 3).bool()}
    batch |= {"n_tokens": torch.tensor([2, 6]), "n_response": torch.tensor([1, 3])}
    batch["of a fork"] = torch.zeros(2, width)
    if is_known:
        assert len(list(batches.by_length(batch, 1))) == 1
    else:
        with pytest.raises(AssertionError, match=rf"of a fork is {width} wide"):
            list(batches.by_length(batch, 1))


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


@given(st.integers(1, 40), st.integers(1, 99), st.integers(0, 9), st.integers(0, 5))
def test_a_full_batch_runs_on_into_the_next_epoch(n, batch_size, seed, first):
    """Laid end to end the batches are whole epochs, each with every example once."""
    steps = [batches.full_batch(n, batch_size, seed, i) for i in range(first + 3)]
    assert {len(b) for b in steps} == {batch_size}
    laid = np.concatenate(steps)
    for epoch in range(len(laid) // n):
        part = laid[epoch * n : (epoch + 1) * n]
        assert (part == batches.epoch_batch(n, n, seed, epoch)).all()
        assert sorted(part) == list(range(n))
    if n % batch_size == 0:  # nothing runs on
        assert (steps[first] == batches.epoch_batch(n, batch_size, seed, first)).all()


@given(st.integers(0, 60), st.integers(1, 60), st.integers(0, 9))
def test_at_most_n_are_drawn_from_everywhere(size, n, seed):
    items = [f"item {i}" for i in range(size)]
    found = batches.drawn(items, n, seed)
    assert len(set(found)) == len(found) == min(n, size)
    assert found == sorted(found, key=items.index)  # their order is kept
    assert found == batches.drawn(items, n, seed)
    assert batches.drawn(list(range(1000)), 10, seed)[-1] > 500


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
    one = [[1, 2], [3]], [2, 1], [1, 2], "f:1"
    other = [[4], [5, 6, 7], [8]], [1, 2, 1], [2, 1, 2], "f:2"
    rows = [one, other]
    batch = batches.feedback_batch(rows, [1, 0], PAD)
    assert batch["present"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["target"].tolist() == [[2, 1, 2], [1, 2, 0]]  # 0: absent
    assert batch["tokens"][0].tolist() == [[4, PAD, PAD], [5, 6, 7], [8, PAD, PAD]]
    assert batch["tokens"][1].tolist() == [[1, 2, PAD], [3, PAD, PAD], [PAD] * 3]
    assert (batch["mask"] == (batch["tokens"] != PAD)).all()
    assert batch["n_completion"].tolist() == [[1, 3, 1], [2, 1, 0]]
    assert batch["n_answer"].tolist() == [[1, 2, 1], [2, 1, 0]]
    assert batch["weight"].tolist() == [1, 1] and batch["source"] == ["f:2", "f:1"]


def test_only_prompts_with_an_ordered_pair_or_a_number_have_weight():
    tied, ranked = [([[1], [2]], [1, 1], ranks, "f:1") for ranks in ([1, 1], [2, 1])]
    assert batches.feedback_batch([tied, ranked], [0, 1], PAD)["weight"].tolist() == [0, 1]
    rated = [([[1]], [1], [2.5], "f:1"), ([[2]], [1], [0.0], "f:2")]
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
