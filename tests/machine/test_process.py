"""One process and its machine: the lock on a folder, signals, memory that is handed back."""

import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf import config
from nanorlhf.machine import process

ROOT = Path(__file__).parents[2]


def test_a_second_process_cannot_have_the_folder(tmp_path):
    """(That a killed one gives it back is what every resumed run of accidents.py needs.)"""
    process.lock(tmp_path)
    process.lock(tmp_path)  # this process may
    code = "import sys; from nanorlhf.machine import process; process.lock(sys.argv[1])"
    second = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "another run is writing there" in done.stderr


def test_a_second_signal_ends_at_once_but_not_its_own_echo(monkeypatch, capsys):
    monkeypatch.setattr(process, "_heard", [])
    process._hear(signal.SIGINT, None)
    process._hear(signal.SIGINT, None)  # from the terminal and from torchrun
    assert len(process._heard) == 1 and "once more" in capsys.readouterr().err
    process._heard[0] = (signal.SIGINT, process._heard[0][1] - 2)
    with pytest.raises(SystemExit) as end:
        process._hear(signal.SIGINT, None)
    assert end.value.code == 130


def test_only_a_program_of_ours_listens(monkeypatch):
    """In a notebook or a test SIGINT stays what it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process.listen()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, config.interrupted)
        process.listen()
        assert signal.getsignal(signal.SIGTERM) is process._hear
        process.deafen()
        assert signal.getsignal(signal.SIGINT) is config.interrupted
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("n_parameters, is_kept", [(1e6, True), (1e9, False)])
def test_freed_tensors_are_kept_for_a_small_model_and_handed_back_for_a_large_one(
    n_parameters, is_kept
):
    code = f"""
import torch
from nanorlhf.machine.process import keep_freed_memory, kept_below
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
keep_freed_memory(kept_below({n_parameters}))
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
full = resident()
del blocks
print(round(full - resident()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    handed_back = int(done.stdout)  # MiB of 128
    assert handed_back < 16 if is_kept else handed_back > 112
