"""Memory that is counted is memory that is there."""

import gc

import pytest
import torch

from nanorlhf.measure.rehearsal import META
from nanorlhf.measure.tracker import Heap, Tracker
from nanorlhf.model import GPT
from tests.tools.test_memory import SIZES

KB = 2**10


def test_the_tracker_counts_storages_once_and_until_they_die():
    with META, Tracker(heap=False) as tracker:
        a = torch.zeros(4, 256)
        assert tracker.live == 4 * KB
        b = a.view(256, 4)[3:].t()
        assert tracker.live == 4 * KB
        del a
        assert tracker.live == 4 * KB  # b needs it
        c = b.contiguous().add_(1)
        assert tracker.live == 4 * KB + 4 * KB  # 253 * 16 bytes, rounded up to 512
        del b
        assert tracker.live == 4 * KB
        (c * 2).sum()
        assert tracker.live == 4 * KB
        assert tracker.peaks == {"start": 4 * KB + 4 * KB + 512}


def test_the_tracker_counts_what_backward_needs_and_frees_it():
    with META, Tracker(heap=False) as tracker:
        x = torch.zeros(256, 4, requires_grad=True)
        y = x.exp().exp().sum()
        assert tracker.live == 3 * 4 * KB + 512  # x, and both results, which exp's backward needs
        y.backward()
        assert tracker.live == 2 * 4 * KB + 512  # x and its gradient
        assert x.grad.shape == x.shape


def test_calls_that_are_remembered_give_the_shapes_of_those_that_are_made():
    with META, Tracker(heap=False) as tracker:
        for _ in range(2):
            x = torch.zeros(3, 5, 7)
            assert (x.transpose(1, 2) + 1).shape == (3, 7, 5)
            assert torch.cat([x, x], 1).shape == (3, 10, 7) and x.softmax(-1).stride() == x.stride()
            assert [t.shape for t in x.max(1)] == [(3, 7), (3, 7)] and x.max(1)[
                1
            ].dtype == torch.long
            assert x.bfloat16().dtype == torch.bfloat16 and x.float() is x
            assert x[torch.ones(3, 5, dtype=torch.bool)].shape == (15, 7)
            known = len(tracker.known)
        assert len(tracker.known) == known > 5


def test_the_tracker_agrees_with_a_real_model():
    """Tensors that really exist, found by the garbage collector, against those that do not."""
    real = GPT(SIZES)
    kept = []
    save = lambda x: kept.append(x) or x
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = real(torch.zeros(4, 20, dtype=torch.long)).sum()
    gc.collect()
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    for p in real.parameters():
        storages[p.untyped_storage()._cdata] = p.nbytes
    with META, Tracker(heap=False) as tracker:
        model = GPT(SIZES)
        found = model(torch.zeros(4, 20, dtype=torch.long)).sum()
        grown = tracker.live
    assert loss.shape == found.shape
    assert sum(storages.values()) == pytest.approx(grown, rel=0.1)  # rounding and attention


def test_the_heap_fills_holes_and_keeps_what_it_cannot_fill():
    heap = Heap()
    begin = heap.top
    a, b, c = (heap.take(size) - begin for size in (100, 50, 10))
    assert (a, b, c, heap.top - begin) == (0, 100, 150, 160)
    heap.give(begin + a, 100)
    heap.give(begin + b, 50)
    assert heap.take(40) == begin + 100  # the smallest hole that holds it
    assert heap.take(100) == begin and heap.top == begin + 160
    assert heap.take(20) == begin + 160  # the 10 that are left of b do not do
    heap.give(begin + 160, 20)
    assert heap.top == begin + 160
    assert heap.take(10) == begin + 140
