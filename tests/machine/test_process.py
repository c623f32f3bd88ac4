"""One process and its machine: the lock on a folder, signals, streams, memory that is kept."""

import os
import platform
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanorlhf.machine import durable, process

ROOT = Path(__file__).parents[2]


def test_a_second_process_cannot_have_the_folder(tmp_path):
    """(That a killed one gives it back is what every resumed run of accidents.py needs.)"""
    durable.lock(tmp_path)
    durable.lock(tmp_path)  # this process may
    code = "import sys; from nanorlhf.machine import durable; durable.lock(sys.argv[1])"
    second = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(second, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "another run is writing there" in done.stderr


def test_a_second_signal_ends_at_once_but_not_its_own_echo(monkeypatch, capsys):
    monkeypatch.setattr(process, "_heard", [])
    process.hear(signal.SIGINT, None)
    process.hear(signal.SIGINT, None)  # from the terminal and from torchrun
    assert len(process._heard) == 1 and "once more" in capsys.readouterr().err
    process._heard[0] = (signal.SIGINT, process._heard[0][1] - 2)
    with pytest.raises(SystemExit) as end:
        process.hear(signal.SIGINT, None)
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_only_a_program_of_ours_listens(monkeypatch):
    """In a notebook or a test SIGINT stays what it was, and SIGHUP under nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process.listen()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, process.interrupted)
        process.listen()
        assert signal.getsignal(signal.SIGTERM) is process.hear
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGHUP, terminal)


RUN = """
import sys, time
from nanorlhf import config
from nanorlhf.machine import process
signals = config.from_cli(config.TrainConfig, [])
process.listen()
end = time.monotonic() + float(sys.argv[1])
while not process.heard() and time.monotonic() < end:
    print("step", flush=True)
    print("warning", file=sys.stderr)
    time.sleep(0.01)
print("saves")
open(sys.argv[2], "w").write("saved")
raise SystemExit(128 + process.heard() if process.heard() else 0)
"""


def test_a_run_whose_terminal_is_closed_saves_and_ends(tmp_path):
    saved, argv = tmp_path / "saved", [sys.executable, "-c", RUN, "60", str(tmp_path / "saved")]
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        os.chdir(ROOT)
        os.execv(argv[0], argv)
    assert b"step" in os.read(terminal, 99)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path, closed):
    """As in `train_gpt.py | head`."""
    argv = [sys.executable, "-c", RUN, "0.3", str(tmp_path / "saved")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(argv, cwd=ROOT, text=True, **pipes)
    assert getattr(run, closed).readline() in ("step\n", "warning\n")
    getattr(run, closed).close()
    said = (run.stderr if closed == "stdout" else run.stdout).read()
    assert run.wait() == 0 and "Error" not in said
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_program_with_its_outputs_closed_runs(tmp_path):
    argv = [sys.executable, "-c", RUN, "0.1", str(tmp_path / "saved")]
    closed = ["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *argv]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_each_line_is_in_a_file_as_it_is_printed(tmp_path, flags):
    """Also if the interpreter ends without another word."""
    code = (
        "import os, sys; from nanorlhf.config import TrainConfig, from_cli; sys.argv = ['x']\n"
        "from_cli(TrainConfig); print('step 1 \\ud800'); print('step', 2); os._exit(0)"
    )
    with (tmp_path / "log").open("w") as file:
        subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "log").read_text() == "step 1 \\ud800\nstep 2\n"


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("n_parameters, is_kept", [(1e6, True), (1e9, False)])
def test_freed_tensors_are_kept_for_a_small_model_and_handed_back_for_a_large_one(
    n_parameters, is_kept
):
    code = f"""
import torch
from nanorlhf.machine.process import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
keep_freed_memory({n_parameters})
blocks = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
full = resident()
del blocks
print(round(full - resident()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    handed_back = int(done.stdout)  # MiB of 128
    assert handed_back < 16 if is_kept else handed_back > 112
