"""The choice of device and precision. (tests/test_device.py tries the models on one.)"""

from types import SimpleNamespace

import pytest
import torch

from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.model import RewardModel
from tests.helpers import refused
from tests.test_engine import CPU, make_config, make_gpt


def test_an_explicit_dtype_is_taken_and_auto_is_one_of_the_two(tmp_path):
    for name in ("float32", "bfloat16"):
        assert pick_dtype(make_config(tmp_path, dtype=name), CPU) == getattr(torch, name)
    auto = pick_dtype(make_config(tmp_path, dtype="auto"), CPU)
    assert auto in (torch.float32, torch.bfloat16)
    assert pick_dtype(make_config(tmp_path, dtype="auto"), torch.device("mps")) == torch.float32


@pytest.mark.parametrize("capability, dtype", [(7, "float32"), (8, "bfloat16"), (9, "bfloat16")])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32_and_that_is_said(
    capability, dtype, tmp_path, monkeypatch, capsys
):
    """A T4 has compute capability 7.5; PyTorch's own rule is asked, of a stand-in."""
    properties = SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for _ in range(2):
        cfg = make_config(tmp_path, dtype="auto")
        assert pick_dtype(cfg, torch.device("cuda")) == getattr(torch, dtype)
    said = capsys.readouterr().out
    assert said.count("does not multiply bfloat16") == (dtype == "float32")


@pytest.mark.parametrize("name", ["tpu", "cuda:77", "nonsense"])
def test_a_device_that_is_not_there_exits_2(tmp_path, capsys, name):
    assert f"--device {name}: " in refused(capsys, pick_device, make_config(tmp_path, device=name))
    assert pick_device(make_config(tmp_path)) == CPU


def test_cast_leaves_buffers_in_float32():
    model = cast(RewardModel(make_gpt()), torch.bfloat16, CPU)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.score_mean.dtype == model.score_sd.dtype == torch.float32
