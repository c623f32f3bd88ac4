"""What the benchmark runs costs what it is said to cost: against a count of what runs."""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import model
from nanorlhf.measure import timing
from nanorlhf.measure import workloads as w
from tests.tools import test_bench
from tests.tools.test_bench import CPU, config

small = test_bench.small  # the fixture with its toy sizes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_attention_nothing_is_read_and_as_much_is_written(family, monkeypatch, tmp_path):
    called, real = [], model.attention
    monkeypatch.setattr(model, "attention", lambda *args: called.append(1) or real(*args))
    sizes = test_bench.llama(tmp_path) if family == "llama" else {"n_layer": 2}
    work = w.generation(config(**sizes), torch.float32, CPU, 3, 9)
    found = w.without_attention(work)()
    assert found.shape == (4, 3) and not called
    assert not torch.equal(found, work()) and len(called) == 3 * 2  # and it is back


def formula(q, k, v, bias, dropout):
    """Attention in two products, which the counter sees whatever the kernel would be."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def counted(work):
    with patch.object(model, "attention", formula), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def vectors(cfg):
    """Parameters that are added and not multiplied with: biases and norms."""
    return cfg.n_layer * 13 * cfg.d_model + 2 * cfg.d_model


def test_training_flops_are_the_counted_products():
    cfg = config(n_layer=2)
    found = counted(w.training(cfg, torch.float32, CPU))
    tokens = cfg.batch_size * cfg.seq_len
    assert w.training_flops(cfg) == found + 6 * vectors(cfg) * tokens
    N = sum(
        p.numel()
        for n, p in model.GPT(w.gpt_config(cfg, 9)).named_parameters()
        if n != "wpe.weight"
    )
    assert w.parameters(cfg) == N
    assert w.training_flops(cfg) == tokens * (6 * N + 12 * 2 * cfg.d_model * cfg.seq_len)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_llamas_flops_and_bytes_are_the_counted_ones(is_tied, tmp_path):
    cfg = config(**test_bench.llama(tmp_path, is_tied))
    tokens, D, F, E = 4 * 16, 16, 24, 8  # four heads, and two of keys and values
    vectors = 2 * (2 * D) + D  # the norms of two blocks, and the last
    found = counted(w.training(cfg, torch.float32, CPU))
    assert w.training_flops(cfg) == found + 6 * vectors * tokens
    block = 2 * D * 4 * E + 2 * D * 2 * E + 3 * D * F
    assert w.parameters(cfg) == 64 * D + 2 * block + vectors
    cached = 2 * 2 * 2 * E * cfg.rows * (6 + 7)  # keys and values; layers; heads; for 2 tokens
    assert w.generation_bytes(cfg, torch.bfloat16, 3) == 2 * (3 * w.parameters(cfg) + cached)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo_flops_are_the_counted_products_of_each_phase(critic, monkeypatch):
    # 63 positions and 8 rows: both are computed in multiples of 8
    lengths = {"prompt_tokens": 55, "max_new_tokens": 8, "rows": 8}
    cfg, found = config(d_model=64, n_layer=2, vocab_size=512, **lengths), Counter()

    def counting(names, device):
        def wrap(name, function):
            def wrapper(*args):
                with FlopCounterMode(display=False) as counter:
                    result = function(*args)
                found[name] += counter.get_total_flops()
                return result

            return wrapper

        names.update({name: wrap(name, names[name]) for name in timing.PHASES})
        return {}

    monkeypatch.setattr(w, "phase_clock", counting)
    with patch.object(model, "attention", formula):
        w.ppo(cfg, torch.float32, CPU, critic)()
    for name, flops in w.ppo_flops(cfg, critic).items():
        assert flops == pytest.approx(found[name], rel=0.05), name


def test_a_ppo_iteration_has_every_phase_and_full_responses(monkeypatch):
    cfg, shapes, real = config(), [], w.load_stage

    def load(name):
        stage = real(name)
        make_rollout = stage.make_rollout

        def rollout(*args):
            found = make_rollout(*args)
            shapes.append((found["response_mask"].shape, bool(found["response_mask"].all())))
            return found

        stage.make_rollout = rollout
        return stage

    monkeypatch.setattr(w, "load_stage", load)
    phases = w.ppo(cfg, torch.bfloat16, CPU, "shared")()
    assert set(phases) == set(timing.PHASES) and min(phases.values()) > 0
    assert shapes == [((cfg.rows, cfg.max_new_tokens), True)]


def test_generation_writes_every_token_and_counts_what_it_reads():
    cfg = config(n_layer=1)
    responses = w.generation(cfg, torch.float32, CPU, 3, 9)()
    assert responses.shape == (4, 3) and responses.max() < cfg.vocab_size
    # three tokens read all weights; the second and the third, 6 and 7 cached positions of 4 rows
    cached = 2 * 16 * 4 * (6 + 7)
    assert w.generation_bytes(cfg, torch.bfloat16, 3) == 2 * (3 * w.parameters(cfg) + cached)
