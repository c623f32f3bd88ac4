"""Other people's programs, timed beside ours where they are installed."""

import importlib
import json
import os
import sys

import pytest

from nanorlhf.measure import peers
from nanorlhf.tools import bench
from tests.helpers import refused
from tests.tools import test_bench
from tests.tools.test_bench import config, last_line

small = test_bench.small  # the fixture with its toy sizes


@pytest.mark.parametrize("vs", ["nobody", "trl", "trl=/nowhere", "nanogpt", "hf,nanogpt=/nowhere"])
def test_a_peer_that_is_not_there_ends_it_before_anything_is_timed(vs, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(config(vs=vs))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and "error: --vs" in err


def test_nanogpt_is_not_timed_beside_another_architecture(tmp_path, capsys):
    (tmp_path / "model.py").touch()
    cfg = config(vs=f"nanogpt={tmp_path}", init=test_bench.llama(tmp_path)["init"])
    assert "leave out --init" in refused(capsys, bench.main, cfg)


def test_a_package_that_is_not_installed_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers cannot be imported" in refused(capsys, peers.parse, "hf")


def vs(capsys, what, name, **flags):
    bench.main(config(what=[what], vs=name, **flags))
    out, err = capsys.readouterr()
    assert "not to be quoted" in err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_runs_beside(family, capsys, tmp_path):
    pytest.importorskip("transformers")
    init = {"gpt2": "", "llama": test_bench.llama(tmp_path)["init"]}[family]
    found = vs(capsys, "gen", "hf", init=init)
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
