"""`bench`: its figures are what they say. No test here looks at how long anything took."""

import json
from pathlib import Path

import pytest
import torch

from nanorlhf.config import from_cli
from nanorlhf.measure import stages, timing
from nanorlhf.measure import workloads as w
from nanorlhf.tools import bench
from tests.helpers import refused

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
FIXED = bench.MFU_SIZES
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


def llama(folder, is_tied=True):
    """The flags for a Llama of about these sizes, whose config.json is in the folder."""
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
    return {"init": str(folder), "n_layer": 2, "n_head": 4}


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_last_line_is_json_with_every_figure(capsys):
    bench.main(config())
    found = last_line(capsys)
    assert set(ASKED) <= set(found)
    assert {name for name in ASKED if found[name] is not None} == {"mfu_512", "decode_bandwidth"}
    assert found["mfu"] > 0 and found["flat_fp32"] > 0 and found["flat_bf16"] > 0


def test_a_folder_gives_the_sizes(capsys, tmp_path):
    cfg = config(init=llama(tmp_path)["init"], what=["gen", "ppo"], dtype=["float32"])
    bench.main(cfg)
    out = capsys.readouterr().out
    assert f"{tmp_path}, 2 layers x 16, 4 heads, vocabulary 64" in out
    assert json.loads(out.splitlines()[-1])["decode_bandwidth"] > 0
    assert "no config.json there" in refused(capsys, bench.main, config(init="nowhere"))


def test_mfu_512_is_of_one_size_for_all(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bench, "train", lambda cfg, *_: seen.append(cfg) or {"mfu": 0.5})
    monkeypatch.setattr(bench, "MFU_SIZES", FIXED)
    bench.mfu_512(config(init=llama(tmp_path)["init"]), torch.bfloat16, CPU, {})
    assert seen[0].init == "" and seen[0].d_model == 512


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


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--rows 5", "--d_model 17", "--repeats 0", "--device meta"])
def test_what_makes_no_sense_ends_it(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(from_cli(bench.Config, flags.split()))
    assert stop.value.code == 2 and capsys.readouterr().out == ""


def test_without_the_repository_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    assert "train_ppo.py: not there" in refused(capsys, bench.main, config())
