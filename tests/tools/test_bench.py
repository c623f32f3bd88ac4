"""`bench`: its figures are what they say. No test here looks at how long anything took."""

import json
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import model
from nanorlhf.config import from_cli
from nanorlhf.machine import python_file
from nanorlhf.tools import bench
from tests.helpers import refused

CPU = torch.device("cpu")
SIZES = {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": 64, "batch_size": 4, "seq_len": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "COPY_BYTES", 2**16)
    monkeypatch.setattr(bench, "PRODUCT_ROWS", 64)


def config(**flags):
    sizes = {"rows": 4, "prompt_tokens": 5, "max_new_tokens": 6, "ppo_epochs": 2}
    sizes |= {"minibatch_size": 2, "repeats": 2, "dtype": "float32"}
    return bench.Config(**SIZES | sizes | {"device": "cpu"} | flags)


def llama(folder, is_tied=True):
    """The flag for a Llama of about these sizes, whose config.json is in the folder."""
    sizes = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 16,
        "head_dim": 8,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }
    Path(folder, "config.json").write_text(json.dumps(sizes))
    return {"init": str(folder)}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_last_line_is_json_with_every_row(family, tmp_path, capsys):
    bench.main(config(**llama(tmp_path) if family == "llama" else {}))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = "train gen rollout measuring scoring update product copy".split()
    assert last.keys() == {f"{row}_{unit}" for row in rows for unit in ("seconds", "share")}
    shares = last["product_share"], last["copy_share"]
    assert min(last.values()) > 0 and shares == pytest.approx((1, 1))


def test_half_the_time_is_twice_the_share_of_a_limit(monkeypatch):
    cfg, figures = config(what=["train", "gen"]), []
    for seconds in (1.0, 0.5):
        runs = {"train": [seconds], "gen": [seconds], "product": [1e-3], "copy": [1e-3]}
        monkeypatch.setattr(bench, "turns", lambda *args, runs=runs: iter([runs] * 2))
        figures.append(bench.main(cfg))
    slow, fast = figures
    for row in ("train_share", "gen_share"):
        assert fast[row] == pytest.approx(2 * slow[row])
    flops = bench.costs(cfg, bench.sizes_of(cfg), torch.float32)["product"]["train"]
    assert slow["train_share"] == pytest.approx(1e-3 * flops / (2 * 64 * 16 * 64))


def test_whatever_is_compared_runs_in_turns():
    calls = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    *_, rows = islice(bench.turns(works, CPU), 3)
    assert calls == list("abc") * 4  # one turn warms up
    assert [len(seconds) for seconds in rows.values()] == [3, 3, 3]


# ---- costs: against a count of what runs -------------------------------------------------------


def formula(q, k, v, bias, dropout):
    """Attention in two products, which the counter sees whatever the kernel would be."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def counted(work):
    with patch.object(model, "attention", formula), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["gpt2", "tied", "untied"])
def test_costs_are_the_counted_products(family, tmp_path):
    """But for biases and norms, which are no products, and are small at these sizes. 63 positions
    and 8 rows: both are computed in multiples of 8."""
    flags = {"d_model": 64, "n_layer": 2, "vocab_size": 512, "rows": 8, "minibatch_size": 4}
    flags |= {"prompt_tokens": 55, "max_new_tokens": 8}
    if family != "gpt2":
        flags = {"rows": 8, "minibatch_size": 4, "prompt_tokens": 55, "max_new_tokens": 8}
        flags |= llama(tmp_path, family == "tied")
    cfg = config(**flags)
    sizes = bench.sizes_of(cfg)
    costs = bench.costs(cfg, sizes, torch.float32)["product"]
    works = bench.training(cfg, sizes, torch.float32, CPU)
    works |= bench.ppo(cfg, sizes, torch.float32, CPU)
    for row, work in works.items():
        flops = counted(work)
        if row != "rollout":
            assert costs[row] == pytest.approx(flops, rel=0.06), row


@pytest.mark.parametrize("family, heads, width", [("gpt2", 2, 8), ("llama", 2, 8)])
def test_decoding_reads_all_weights_for_each_token_and_the_cache(family, heads, width, tmp_path):
    cfg = config(n_layer=2, max_new_tokens=3, **llama(tmp_path) if family == "llama" else {})
    sizes = bench.sizes_of(cfg)
    blocks = sum(p.numel() for p in sizes.build().h.parameters())
    # the second and the third token read 6 and 7 cached positions of 4 rows, in two layers
    cached = 2 * 2 * heads * width * 4 * (6 + 7)
    read = 2 * (3 * (blocks + 64 * 16) + cached)
    assert bench.costs(cfg, sizes, torch.bfloat16)["copy"]["gen"] == read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_response_is_of_full_length(dtype, monkeypatch):
    cfg = config()
    sizes, masks = bench.sizes_of(cfg), []
    script = python_file.load_script("train_ppo")
    real = script.make_rollout
    seen = lambda *args: masks.append((rollout := real(*args))["response_mask"]) or rollout
    monkeypatch.setattr(script, "make_rollout", seen)
    bench.ppo(cfg, sizes, dtype, CPU)["rollout"]()
    assert masks[0].shape == (cfg.rows, cfg.max_new_tokens) and masks[0].all()
    texts = bench.generation(cfg, sizes, dtype, CPU)["gen"]()
    assert [len(ids) for ids in texts] == [cfg.max_new_tokens] * cfg.rows


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--d_model 17", "--repeats 0", "--init nowhere", "--rows 0"])
def test_what_makes_no_sense_ends_it(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(from_cli(bench.Config, flags.split()))
    assert stop.value.code == 2 and capsys.readouterr().out == ""


def test_without_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(python_file, "ROOT", tmp_path)
    assert "train_gpt.py: not there" in refused(capsys, bench.main, config())
