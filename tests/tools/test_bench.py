"""`bench`: its figures are what they say. No test here looks at how long anything took."""

import importlib
import json
import os
import sys
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorlhf import model
from nanorlhf.config import from_cli
from nanorlhf.measure import peers, stages, timing
from nanorlhf.measure import workloads as w
from nanorlhf.tools import bench

CPU = torch.device("cpu")
ASKED = (
    "train_bf16",
    "train_fp32",
    "gen_bf16",
    "gen_fp32",
    "ppo_bf16",
    "ppo_fp32",
    "ppo_separate_bf16",
    "mfu_512",
    "decode_bandwidth",
)
SIZES = {"n_layer": 1, "d_model": 16, "n_head": 2, "vocab_size": 64, "batch_size": 4, "seq_len": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0)
    monkeypatch.setattr(w, "COPY_BYTES", 2**16)
    monkeypatch.setattr(w, "matmul_rows", lambda device: 64)
    monkeypatch.setattr(bench, "MFU_SIZES", SIZES)
    monkeypatch.setattr(bench, "LENGTHS", (4, 8))


def config(**flags):
    sizes = {"rows": 4, "prompt_tokens": 5, "max_new_tokens": 6, "ppo_epochs": 2, "minibatches": 2}
    return bench.Config(**SIZES | sizes | {"device": "cpu", "repeats": 2} | flags)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_json_with_every_figure(capsys):
    bench.main(config())
    found = last_line(capsys)
    assert set(ASKED) <= set(found)
    assert {name for name in ASKED if found[name] is not None} == {"mfu_512", "decode_bandwidth"}
    assert found["mfu"] > 0 and found["flat_fp32"] > 0 and found["flat_bf16"] > 0


@pytest.mark.parametrize("least, passes", [(1e-9, True), (1e9, False)])
def test_require_fails_exactly_where_a_figure_is_below(least, passes, capsys, monkeypatch):
    monkeypatch.setitem(bench.REQUIRED, "cpu", {"mfu": least, "gen_fp32": 4.0})
    cfg = config(what=["train"], dtype=["float32"], require=True)
    if passes:
        bench.main(cfg)
    else:
        with pytest.raises(SystemExit) as stop:
            bench.main(cfg)
        assert stop.value.code == 1
    out = capsys.readouterr().out
    assert ("BELOW" not in out) == passes and "gen_fp32          not measured" in out
    assert json.loads(out.splitlines()[-1])["mfu"] > 0


def test_require_with_nothing_measured_fails():
    assert bench.below({"mfu": None}, {"mfu": 0.5}) == ["mfu"]
    assert bench.below({"mfu": float("nan")}, {"mfu": 0.5}) == ["mfu"]


def test_every_requirement_is_a_figure():
    assert all(set(required) <= set(bench.FIGURES) for required in bench.REQUIRED.values())


# ---- what the figures mean ---------------------------------------------------------------------


def runs_of(**seconds):
    runs = {}
    for name, times in seconds.items():
        name = name.replace("_", " ")
        runs[name] = timing.Timed(None, CPU)
        runs[name].seconds = times
    return runs


def test_a_ratio_above_one_is_ours_faster():
    runs = runs_of(ours=[1.0, 1.0, 2.0], theirs=[3.0, 5.0, 4.0])
    assert timing.ratio(runs["ours"], runs["theirs"]) == (4.0, 2.0, 5.0)
    assert timing.compare(runs, "ours", "theirs", "x") == {"x": 4.0}
    assert timing.compare(runs, "ours", "absent", "x") == {}


def test_half_the_time_is_twice_the_share_of_a_limit(monkeypatch):
    cfg, found = config(), []
    for seconds in (1.0, 0.5):
        runs = runs_of(ours=[seconds], matrix_product=[1e-3], copy=[1e-3])
        monkeypatch.setattr(bench, "race", lambda *args, runs=runs: runs)
        train = bench.train(cfg, torch.float32, CPU, {})
        found.append(train | bench.generate(cfg, torch.float32, CPU, {}))
    slow, fast = found
    for name in ("mfu", "decode_bandwidth"):
        assert fast[name] == pytest.approx(2 * slow[name])
    assert slow["mfu"] == pytest.approx(1e-3 * w.training_flops(cfg) / (2 * 64 * 16 * 64))


def test_a_rest_that_grows_with_the_text_lowers_flat(monkeypatch, capsys):
    seconds = {
        "4": [4.0],
        "4_without_attention": [4.0],  # a token's rest takes 1 s, its attention none
        "8": [20.0],
        "8_without_attention": [12.0],  # 1.5 s and 1 s
    }
    runs = runs_of(**seconds)
    runs |= {T: runs[str(T)] for T in (4, 8)}
    monkeypatch.setattr(bench, "race", lambda *args: runs)
    assert bench.lengths(config(), torch.float32, CPU, {}) == {"flat_fp32": 1 / 1.5}
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.split() == ["8", "2500000", "1000000", "1500000"]


def test_without_attention_nothing_is_read_and_as_much_is_written(monkeypatch):
    called, real = [], model.attention
    monkeypatch.setattr(model, "attention", lambda *args: called.append(1) or real(*args))
    work = w.generation(config(n_layer=2), torch.float32, CPU, 3, 9)
    found = w.without_attention(work)()
    assert found.shape == (4, 3) and not called
    assert not torch.equal(found, work()) and len(called) == 3 * 2  # and it is back


def test_whatever_is_compared_runs_in_turns(capsys):
    calls, first = [], []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    runs = timing.race("turns", works, 3, CPU)
    for i in range(0, 9, 3):
        turn = calls[-9:][i : i + 3]
        first.append(turn[0])
        assert sorted(turn) == ["a", "b", "c"]
    assert first == ["a", "b", "c"] and all(len(run.seconds) == 3 for run in runs.values())


# ---- costs, against a count of what runs -------------------------------------------------------


def formula(q, k, v, bias, dropout):
    """Attention in two products, which the counter sees whatever the kernel would be."""
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


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_ppo_flops_are_the_counted_products_of_each_phase(critic, monkeypatch):
    lengths = {"prompt_tokens": 55, "max_new_tokens": 8}  # 63 positions: 64 are computed
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


# ---- peers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vs", ["nobody", "trl", "trl=/nowhere", "nanogpt", "hf,nanogpt=/nowhere"])
def test_a_peer_that_is_not_there_ends_it_before_anything_is_timed(vs, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(config(vs=vs))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "error: --vs" in err


def test_a_package_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stop:
        peers.parse("hf")
    assert stop.value.code == 2 and "transformers cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--rows 5", "--d_model 17", "--repeats 0", "--device meta"])
def test_what_makes_no_sense_ends_it(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(from_cli(bench.Config, flags.split()))
    assert stop.value.code == 2 and capsys.readouterr().out == ""


def test_without_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stop:
        bench.main(config())
    assert stop.value.code == 2 and "train_ppo.py: not there" in capsys.readouterr().err


def vs(capsys, what, name):
    bench.main(config(what=[what], vs=name))
    out, err = capsys.readouterr()
    assert "not to be quoted" in err
    return json.loads(out.splitlines()[-1])


def test_hugging_face_runs_beside(capsys):
    pytest.importorskip("transformers")
    found = vs(capsys, "gen", "hf")
    assert found["gen_fp32"] > 0 and found["gen_bf16"] > 0


@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT: a checkout of nanoGPT")
def test_nanogpt_runs_beside(capsys):
    found = vs(capsys, "train", f"nanogpt={os.environ['NANOGPT']}")
    assert found["train_fp32"] > 0 and found["train_bf16"] > 0


@pytest.mark.skipif("TRL_PATH" not in os.environ, reason="TRL_PATH: a folder with TRL 1.10")
def test_trl_runs_beside(capsys):
    found = vs(capsys, "ppo", f"trl={os.environ['TRL_PATH']}")
    assert min(found[f"ppo_{name}"] for name in ("fp32", "bf16", "separate_bf16")) > 0


def test_the_peers_are_not_imported_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    bench.main(config(what=["limits"], dtype=["float32"]))
    assert last_line(capsys)["gen_fp32"] is None
