"""What tests of many rooms need."""

from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch


def stand_in_for_cuda_graphs(monkeypatch, replay):
    """A CUDA graph that calls replay(). Returns a list with something in it while a step is being
    recorded, which runs nothing."""
    recording = []

    @contextmanager
    def record(graph):
        recording.append(graph)
        yield
        recording.clear()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    monkeypatch.setattr(torch.cuda, "graph", record)
    return recording


def refused(capsys, call, *args, **kwargs):
    """The one line on stderr of a call that ends with status 2, as a user's mistake does."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def one_thread():
    """A fixture: a second thread makes log_softmax of a few numbers 1000 times slower on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words(cfg):
    """The flags that a Config stands for, as they are typed."""
    typed, usual = [], asdict(type(cfg)())
    for flag, value in asdict(cfg).items():
        if value == usual[flag]:
            continue  # some defaults are idle beside other flags, and refused where they are typed
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            typed += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return typed
