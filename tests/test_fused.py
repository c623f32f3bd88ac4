"""fused.py: the fast path of the loss is `functional.lm_loss`, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanorlhf import fused
from nanorlhf.functional import lm_loss
from nanorlhf.fused import HeadLoss, head_loss


def setting(seed, B=2, T=5, D=3, V=7, dtype=torch.float64):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (B, T))


def oracle(hidden, weight, targets, mask=None):
    mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    return lm_loss(F.linear(hidden, weight), targets, mask)


def both(run, *args):
    hidden, weight = args[:2]
    return run(*args), *torch.autograd.grad(3 * run(*args), (hidden, weight))


@given(st.integers(0, 99), st.integers(0, 12), st.booleans(), st.floats(1, 300))
def test_loss_and_gradients_are_those_of_the_plain_loss(seed, rows, masked, scale):
    """For any number of logits at once, and however sure the model is."""
    hidden, weight, targets = setting(seed)
    mask = torch.rand(targets.shape) < 0.6 if masked else None
    hidden = (hidden * scale).detach().requires_grad_()
    before, HeadLoss.AT_ONCE = HeadLoss.AT_ONCE, rows * len(weight)
    found = both(head_loss, hidden, weight, targets, mask)
    HeadLoss.AT_ONCE = before
    for a, b in zip(found, both(oracle, hidden, weight, targets, mask)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_nothing_is_a_loss_of_0_and_no_gradient_and_of_one_position_its_loss(n, dtype):
    hidden, weight, targets = setting(0, dtype=dtype)
    mask = torch.arange(10).view(2, 5) < n
    loss = head_loss(hidden, weight, targets, mask)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, oracle(hidden, weight, targets, mask))
    loss.backward()
    assert bool(hidden.grad.any()) == bool(weight.grad.any()) == (n > 0)


@pytest.mark.parametrize(
    "rows, sizes", [(0, [1] * 10), (1, [1] * 10), (3, [3, 3, 3, 1]), (99, [10])]
)
def test_no_more_logits_exist_at_once_than_are_allowed(rows, sizes, monkeypatch):
    """But those of one position, if need be."""
    seen, linear = [], F.linear
    monkeypatch.setattr(HeadLoss, "AT_ONCE", rows * 7)
    monkeypatch.setattr(fused.F, "linear", lambda h, w: seen.append(len(h)) or linear(h, w))
    head_loss(*setting(0))
    assert seen == sizes


@pytest.mark.parametrize("n, size", [(1, 64), (63, 64), (64, 64), (65, 128), (100, 100)])
def test_masked_positions_are_filled_up_to_a_round_number(n, size, monkeypatch):
    """Shapes that come again are fast. Without a mask there is nothing to be done about them."""
    seen, linear = [], F.linear
    monkeypatch.setattr(fused.F, "linear", lambda h, w: seen.append(len(h)) or linear(h, w))
    mask = torch.arange(100).view(2, 50) < n if n < 100 else None
    head_loss(*setting(0, T=50), mask)
    assert seen == [size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_less_precision_the_logsumexp_is_float32s(dtype):
    """The loss is that of the rounded logits, to float32's precision; gradients to bfloat16's."""
    hidden, weight, targets = setting(1, B=4, T=64, D=32, V=500, dtype=dtype)
    found, wanted = (both(f, hidden, weight, targets) for f in (head_loss, oracle))
    assert found[0].dtype == torch.float32 and abs(found[0] - wanted[0]) < 1e-4
    for a, b in zip(found[1:], wanted[1:]):
        assert a.dtype == dtype
        assert (a - b).norm() < (1e-5 if dtype == torch.float32 else 0.01) * b.norm()


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    hidden, weight, targets = setting(2)
    monkeypatch.setattr(fused.torch, "mm", None)  # a call would be an error
    assert head_loss(hidden.detach(), weight, targets).isfinite()


def test_a_frozen_head_costs_no_gradient_and_changes_no_other():
    hidden, weight, targets = setting(3)
    wanted = torch.autograd.grad(head_loss(hidden, weight, targets), hidden)[0]
    loss = head_loss(hidden, weight.detach(), targets)
    assert loss.grad_fn.next_functions[0][0].saved_tensors[1] is None  # HeadLoss's own d_weight
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], wanted)
