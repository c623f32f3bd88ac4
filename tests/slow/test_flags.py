"""No flag does nothing: every field that a script or a fork offers is read in some run of it."""

import dataclasses
import json
import sys
from dataclasses import replace

import pytest

import train_gpt
import train_ppo
import train_rm
import train_sft
from experiments import train_dpo, train_lora, train_rft, train_rloo
from nanorlhf.data import world
from nanorlhf.data.files import write_records
from tests.sweeps import accidents

COPIES = {"replace", "_replace", "asdict", "_asdict_inner", "__post_init__", "__eq__"}


def recorded(cfg):
    """(the same config, the set of its fields that are read from now on), copies of it included."""
    seen = set()

    class Recorder(type(cfg)):
        def __getattribute__(self, name):
            if sys._getframe(1).f_code.co_name not in COPIES:
                seen.add(name)
            return object.__getattribute__(self, name)

    copy = replace(cfg)
    copy.__class__ = Recorder
    return copy, seen


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: [(main, config), ...]}: tiny runs in the embedded world, and of files."""
    at = tmp_path_factory.mktemp("flags")
    stages = {name: replace(c, check=True) for name, c in accidents.configs(at, at).items()}
    stages = {name: replace(c, max_steps=2, eval_every=2) for name, c in stages.items()}
    for name in ("gpt", "sft", "rm"):
        accidents.STAGES[name].main(stages[name])
    asked = world.prompts("train", 30, 1)
    file = lambda name, rows: [str(write_records(at / f"{name}.jsonl", rows))]
    text = {"data": file("text", [{"text": "some words " * 200}] * 30)}
    prompts = {"data": file("prompts", [{"q": p} for p in asked]), "columns": ["prompt=q"]}
    replies = {"data": file("replies", [{"prompt": p, "completion": "so it was"} for p in asked])}
    feedback = {"data": [f"{at}/rm/feedback.jsonl"]}
    few = {"device": "cpu", "eval_every": 2, "save_every": 2, "batch_size": 4}
    ppo = few | {"reward": [f"{at}/rm"], "minibatch_size": 4, "max_new_tokens": 8, "max_steps": 1}
    ppo |= {"init": f"{at}/sft", "eval_prompts": 2}
    lora = {"out_dir": f"{at}/lora"}
    rft = few | {"out_dir": f"{at}/rft", "init": f"{at}/sft", "reward": f"{at}/rm", "best_of": 40}
    rft |= {"prompts": 10, "max_new_tokens": 60}
    adapted = {"init": f"{at}/sft", "sft": f"{at}/sft", **feedback, **few, **lora}
    return {
        "gpt": [
            (train_gpt.main, stages["gpt"]),
            (train_gpt.main, replace(stages["gpt"], init=f"{at}/gpt", out_dir=f"{at}/g", **text)),
        ],
        "sft": [
            (train_sft.main, stages["sft"]),
            (train_sft.main, replace(stages["sft"], max_steps=0, **replies)),
        ],
        "rm": [
            (train_rm.main, replace(stages["rm"], out_dir=f"{at}/rm2")),
            (train_rm.main, replace(stages["rm"], out_dir=f"{at}/r", max_steps=0, **feedback)),
        ],
        "ppo": [
            (train_ppo.main, replace(stages["ppo"], ptx_coef=0.1)),
            (train_ppo.main, train_ppo.Config(f"{at}/p", **ppo | prompts)),
        ],
        "lora": [
            (
                train_lora.main,
                train_lora.Config(init=f"{at}/gpt", demonstrations=60, **few, **lora),
            ),
            (train_lora.main, train_lora.Config(init=f"{at}/gpt", **replies, **few, **lora)),
        ],
        "lora rm": [
            (train_lora.main, train_lora.RMConfig(**adapted)),
            (train_lora.main, replace(train_lora.RMConfig(**adapted), data=[], prompts=40)),
        ],
        "lora ppo": [(train_lora.main, train_lora.PPOConfig(f"{at}/lp", **ppo | prompts))],
        "dpo": [
            (train_dpo.main, train_dpo.Config(f"{at}/dpo", init=f"{at}/sft", **few, **feedback))
        ],
        "rft": [
            (train_rft.main, train_rft.Config(**rft)),
            (train_rft.main, train_rft.Config(**rft | prompts)),
        ],
        "rloo": [(train_rloo.main, train_rloo.Config(f"{at}/rloo", **ppo | prompts))],
    }


NAMES = ["gpt", "sft", "rm", "ppo", "lora", "lora rm", "lora ppo", "dpo", "rft", "rloo"]


@pytest.mark.parametrize("name", NAMES)
def test_every_field_that_is_offered_is_read(runs, name):
    read = set()
    for main, cfg in runs[name]:
        cfg, seen = recorded(cfg)
        main(cfg)
        read |= seen
    assert {field.name for field in dataclasses.fields(cfg) if field.init} <= read


def test_a_field_that_nobody_reads_would_be_found():
    @dataclasses.dataclass
    class Config(train_dpo.Config):
        idle: int = 3

    cfg, seen = recorded(Config())
    assert replace(cfg, beta=1.0).beta == 1.0 and json.dumps(dataclasses.asdict(cfg))
    assert seen & {"beta", "idle"} == {"beta"}
