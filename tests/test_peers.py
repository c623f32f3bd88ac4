"""experiments/peers.py: others' programs, timed beside ours where they are there."""

import json
import os

import pytest

from experiments import peer_trl, peers
from nanorlhf.tools import bench
from tests.helpers import refused
from tests.tools import test_bench

small = test_bench.small  # the fixture with its toy sizes
PEERS = {"nanogpt": os.environ.get("NANOGPT", ""), "trl": os.environ.get("TRL_PATH", "")}


def config(**flags):
    return peers.Config(**vars(test_bench.config(dtype="auto")) | flags)


def last_line(capsys, **flags):
    peers.main(config(**flags))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("flag", ["nanogpt", "trl"])
def test_a_folder_without_its_peer_ends_it_before_anything_is_timed(flag, capsys, tmp_path):
    assert f"--{flag} {tmp_path}: no " in refused(
        capsys, peers.main, config(**{flag: str(tmp_path)})
    )


def test_trl_has_to_be_there_for_the_algorithms(capsys):
    assert "trl/__init__.py" in refused(capsys, peer_trl.main, peer_trl.Config())


def test_nanogpt_is_not_timed_beside_another_architecture(tmp_path, capsys):
    cfg = config(nanogpt=str(tmp_path), **test_bench.llama(tmp_path))
    assert "leave out --init" in refused(capsys, peers.main, cfg)


def test_a_peer_that_is_not_there_is_named_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "main", lambda cfg: {"train_share": 0.5})
    peers.main(config())
    *named, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"mfu_512": 0.5}
    assert [line.split()[0] for line in named] == ["train", "gen", "ppo"]
    assert "model is not given" in named[0] and "transformers" in named[1] and "trl" in named[2]


def test_a_ratio_above_one_is_ours_faster(capsys):
    assert peers.ratio("x", [1.0, 1.0, 2.0], [3.0, 5.0, 4.0]) == 4.0
    assert "turn by turn 2.00 to 5.00" in capsys.readouterr().out


def test_mfu_512_is_of_one_size_for_all(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(bench, "main", lambda cfg: seen.append(cfg) or {"train_share": 0.5})
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    peers.main(config(**test_bench.llama(tmp_path)))
    assert (seen[0].init, seen[0].d_model, seen[0].dtype) == ("", 512, "bfloat16")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_runs_beside(family, capsys, tmp_path):
    pytest.importorskip("transformers")
    init = {"gpt2": {}, "llama": test_bench.llama(tmp_path)}[family]
    figures = last_line(capsys, what=["gen"], **init)
    assert figures.keys() == {"gen_fp32", "gen_bf16"} and min(figures.values()) > 0


@pytest.mark.skipif(not PEERS["nanogpt"], reason="NANOGPT: a checkout of nanoGPT")
def test_nanogpt_runs_beside(capsys, monkeypatch):
    monkeypatch.setattr(bench, "main", lambda cfg: {"train_share": 0.5})
    figures = last_line(capsys, what=["train"], nanogpt=PEERS["nanogpt"])
    assert figures.keys() == {"train_fp32", "train_bf16", "mfu_512"} and min(figures.values()) > 0


@pytest.mark.skipif(not PEERS["trl"], reason="TRL_PATH: a folder with TRL 1.10")
def test_trl_runs_beside(capsys):
    figures = last_line(capsys, what=["ppo"], trl=PEERS["trl"])
    assert figures.keys() == {"ppo_fp32", "ppo_bf16", "ppo_separate_bf16"}
    assert min(figures.values()) > 0
