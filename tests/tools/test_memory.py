"""tools/memory.py: its figures are the rehearsal's, and the advice is true."""

import dataclasses
import json

import pytest

from nanorlhf.measure.rehearsal import BATCH_SIZE, predict
from nanorlhf.model import GPTConfig
from nanorlhf.tools import memory
from tests.helpers import refused

SIZES = GPTConfig(300, block_size=64, n_layer=2, n_head=2, d_model=32)
STAGES = tuple(BATCH_SIZE)


def config(**flags):
    small = {"device": "cuda", "dtype": "float32", "memory_gb": 1.0, "batch_size": 8}
    small |= {"prompt_tokens": 16, "max_new_tokens": 24, "minibatch_size": 8, "eval_prompts": 8}
    return memory.Config(**small | flags)


def peak(stage, sizes=SIZES, **flags):
    return predict(config(**flags), stage, sizes)["peak"]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_advice_makes_it_fit_and_says_nothing_needless(stage):
    cfg = config(batch_size=16, minibatch_size=16)
    before = peak(stage, batch_size=16, minibatch_size=16)
    flags, after = memory.make_fit(cfg, stage, SIZES, 0.6 * before)
    assert flags and after <= 0.6 * before
    assert predict(dataclasses.replace(cfg, **flags), stage, SIZES)["peak"] == after
    for name in flags:
        fewer = {k: v for k, v in flags.items() if k != name}
        assert predict(dataclasses.replace(cfg, **fewer), stage, SIZES)["peak"] > 0.6 * before


def test_the_defaults_are_the_scripts():
    import train_gpt
    import train_ppo
    import train_rm
    import train_sft

    for stage, script in zip(STAGES, (train_gpt, train_sft, train_rm, train_ppo)):
        theirs = script.Config()
        assert BATCH_SIZE[stage] == theirs.batch_size
        for field in dataclasses.fields(memory.Config):
            only_here = field.name in ("init", "batch_size")
            if field.name in theirs.__dataclass_fields__ and not only_here:
                assert getattr(memory.Config(), field.name) == getattr(theirs, field.name)


def test_the_command_prints_a_row_per_stage_and_flags_to_type(tmp_path, capsys):
    (tmp_path / "weights.pt").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model": dataclasses.asdict(SIZES)}))
    cfg = config(init=str(tmp_path), memory_gb=0.0025, stages=["gpt", "sft"])
    advice = memory.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.split(" ")[0] in STAGES]
    assert len(rows) == 2 and advice
    assert {row.split()[0] for row in rows if "does not fit" in row} == {s for s, *_ in advice}
    for stage, flags, peak in advice:
        (line,) = [line for line in lines if line.startswith(f"train_{stage}.py")]
        assert ("fits with" in line) == (peak <= memory.USABLE * 0.0025 * 2**30)
        assert all(f"--{name}" in line for name in flags)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"init": "nowhere"}, "nowhere"),
        ({"grad_accum": 0}, "--grad_accum"),
        ({"batch_size": -1}, "--batch_size"),
        ({"stages": []}, "--stages"),
        ({"max_new_tokens": 1020}, "1024 tokens"),
        ({"freeze_layers": 13}, "12 blocks"),
    ],
)
def test_bad_input_exits_2(flags, named, capsys):
    assert named in refused(capsys, memory.main, config(**{"init": "gpt2"} | flags))
