"""The doctor names what is wrong with a run, and is silent about a healthy one.

Most runs here are real and small: stories are 3 to 7 letters of a to d, as in test_stages.py, and
PPO is paid for a's by a function. Each is made sick in one way.
"""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import rollout
from nanorlhf.config import TrainConfig
from nanorlhf.data.files import write_records
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.run import checkpoint
from nanorlhf.run.doctor import ADVICE, Doctor
from nanorlhf.run.log import Log
from nanorlhf.run.metrics import read_rows
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import doctor as tool
from tests.run.test_selfcheck import own_ratio, score_on_every_token

ROOT = Path(__file__).parents[2]

BROKEN = {"non-finite value"}
CPU = {"device": "cpu", "dtype": "float32"}
JUDGES = """
def taste(prompts, responses):
    return [(r.count("a") - 1.25) / 1.1 for r in responses]

def huge(prompts, responses):
    return [1000 * x for x in taste(prompts, responses)]

def alike(prompts, responses):
    return [1.0 for r in responses]

def long(prompts, responses):
    return [float(len(r)) for r in responses]

def measure_in_all_things(prompts, responses):
    return [-abs(r.count("a") - 2.0) for r in responses]
"""


def letters(rng, least=3):
    return "".join(rng.choice("abcd") for _ in range(rng.randint(least, 7)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with an SFT checkpoint, prompts, demonstrations and judges."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(1)
    (folder / "judges.py").write_text(JUDGES)
    demos = [{"prompt": f"write {i % 100}", "completion": letters(rng)} for i in range(600)]
    write_records(folder / "demos.jsonl", demos)
    torch.manual_seed(1)
    tokenizer = byte_tokenizer()
    config = GPTConfig(tokenizer.vocab_size, 32, 1, 2, 32)
    cfg = TrainConfig(out_dir=str(folder / "gpt"))
    (folder / "gpt").mkdir()
    checkpoint.save(cfg, "gpt", 1, GPT(config).state_dict(), {}, tokenizer, config, best=1)
    sft(folder, folder / "sft", epochs=2, batch_size=16)
    return folder


def sft(toy, out_dir, **flags):
    defaults = {
        "data": [f"{toy}/demos.jsonl"],
        "init": str(toy / "gpt"),
        "max_new_tokens": 4,
        "learning_rate": 1e-2,
        "eval_every": 20,
        "warmup_steps": 5,
    }
    train_sft.main(train_sft.Config(out_dir=str(out_dir), **CPU | defaults | flags))
    return findings(out_dir)


def ppo(toy, out_dir, judge="taste", gold="", **flags):
    defaults = {
        "init": str(toy / "sft"),
        "data": [f"{toy}/demos.jsonl"],
        "max_new_tokens": 10,
        "reward": f"{toy}/judges.py:{judge}",
        "gold": gold and f"{toy}/judges.py:{gold}",
        "learning_rate": 4e-3,
        "max_steps": 12,
        "batch_size": 64,
        "minibatch_size": 64,
        "kl_coef": 0.6,
        "eval_prompts": 4,
        "eval_every": 100,
        "save_every": 100,
    }
    train_ppo.main(train_ppo.Config(out_dir=str(out_dir), **CPU | defaults | flags))
    return findings(out_dir)


def rm(toy, out_dir, noisy):
    """A reward model of 800 comparisons by someone who likes a's, or who says of each two texts the
    one thing and the other."""
    rng, records = random.Random(2), []
    for i in range(400 if noisy else 800):
        pair = sorted((letters(rng), letters(rng)), key=lambda text: text.count("a"))
        for worse, better in (pair, pair[::-1]) if noisy else (pair,):
            records.append({"prompt": f"write {i % 100}", "rejected": worse, "chosen": better})
    path = write_records(Path(out_dir).parent / "pairs.jsonl", records)
    cfg = train_rm.Config(
        out_dir=str(out_dir),
        init=str(toy / "sft"),
        data=[path],
        epochs=2,
        batch_size=20,
        learning_rate=3e-3,
        eval_every=10,
        **CPU,
    )
    train_rm.main(cfg)
    return findings(out_dir)


def findings(folder):
    return {finding.name for finding in tool.examine(str(folder))}


def check(found, wanted, companions=()):
    """The names wanted are found, and beside them only what comes with that illness."""
    assert set(wanted) <= found <= {*wanted, *companions}, found


def recorded(name):
    _, rows = read_rows(ROOT / "tests/recorded" / f"{name}.csv")
    return [{k: float(x) for k, x in row.items()} for row in rows]


def names_of(rows, flags=None):
    doctor = Doctor(flags or {}, rows[-1]["step"])
    return [finding.name for row in rows for finding in doctor.read(row)]


# ---- runs of the embedded world at its usual size, seed 11; columns that no rule reads left out

RECORDED = {
    "healthy": [],  # train_ppo.py
    "healthy_60": [],  # --max_steps 60
    "healthy_gpt": [],
    "healthy_rm": [],
    # --kl_coef 0 --max_steps 60
    "no_penalty": ["reward up, audit down", "KL running away", "values explain nothing"],
    # --learning_rate 3e-3
    "high_rate": ["updates too large", "KL running away", "length drifting", "entropy collapse"],
    # --learning_rate 3e-2, a hundred times the default
    "very_high_rate": [
        "KL running away",
        "updates too large",
        "scores all alike",
        "entropy collapse",
        "eos rate falling",
        "reward flat",
    ],
    # --missing_eos_score 3 --max_new_tokens 72
    "paid_not_to_end": ["eos rate falling", "reward up, audit down"],
    "high_penalty": ["values explain nothing", "KL stuck at 0"],  # --kl_coef 5
    # --learning_rate 1e-6
    "low_rate": ["clipfrac stuck at 0", "values explain nothing", "KL stuck at 0"],
    # --reward with 100 times the world's gold
    "scores_times_100": [
        "advantage scale off",
        "KL running away",
        "values explain nothing",
        "reward flat",
        "eos rate falling",
    ],
    # --reward with one score for all, --kl_coef 0
    "flat_scores": ["scores all alike", "KL running away"],
    "few_comparisons": ["train/validation gap"],  # train_rm.py --prompts 30 --epochs 40
    "shuffled_labels": ["reward model at chance"],
    "gpt_high_rate": ["loss not falling"],  # train_gpt.py --learning_rate 0.6
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_is_named_correctly(name):
    assert names_of(recorded(name)) == RECORDED[name]


def test_there_is_a_recording_of_each_and_no_other():
    assert {p.stem for p in (ROOT / "tests/recorded").iterdir()} == set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_is_said_of_a_run_that_is_too_short_to_tell(name):
    assert names_of(recorded(name)[:4]) == []


@given(data=st.data(), factor=st.sampled_from((-1000, -10, -1, 0, 0.1, 10, 1000)))
def test_one_row_of_noise_is_never_a_finding(data, factor):
    """Where it would not be one without the noise."""
    name = data.draw(st.sampled_from(("healthy", "healthy_60")))
    rows = recorded(name)
    i = data.draw(st.integers(1, len(rows) - 1))
    rows[i] = {k: x if k == "step" else x * factor for k, x in rows[i].items()}
    assert names_of(rows) == []


@given(st.sets(st.sampled_from(sorted(recorded("no_penalty")[0].keys() - {"step"}))))
def test_a_forks_missing_columns_silence_rules_and_never_stop_a_run(missing):
    rows = [{k: x for k, x in r.items() if k not in missing} for r in recorded("no_penalty")]
    found = names_of(rows)
    assert set(found) <= set(RECORDED["no_penalty"])
    if not missing & {"kl", "length"}:
        assert "KL running away" in found


def test_every_finding_is_of_some_test_and_its_advice_is_about_flags_that_exist():
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in ADVICE)
    stages = (train_gpt, train_sft, train_rm, train_ppo)
    known = {name for stage in stages for name in stage.Config.__dataclass_fields__}
    for advice in ADVICE.values():
        assert set(re.findall(r"--(\w+)", advice)) <= known and "\nTry: " in advice
        assert all(len(line) <= 98 for line in advice.splitlines())


# ---- real runs, small, each sick in one way ----------------------------------------------------


@pytest.mark.slow
def test_a_healthy_run_is_silent(toy, tmp_path, capsys):
    assert findings(toy / "sft") == ppo(toy, tmp_path) == rm(toy, tmp_path / "rm", False) == set()
    assert "warning" not in capsys.readouterr().err


SLOW_VALUES = "values explain nothing"  # hardly any small run is long enough for them
SICK = {
    "a learning rate that is far too high": (
        {"learning_rate": 0.2, "kl_coef": 0.0, "max_steps": 8},
        ["updates too large"],
        ["KL running away", "scores all alike", SLOW_VALUES],
    ),
    "no learning rate": (
        {"learning_rate": 0.0},
        ["clipfrac stuck at 0", "KL stuck at 0", SLOW_VALUES],
        [],
    ),
    "rewards in thousands": (
        {"judge": "huge", "max_steps": 6},
        ["advantage scale off"],
        ["reward flat", "length drifting", "KL running away", "eos rate falling", SLOW_VALUES],
    ),
    "a bonus for not ending": (
        {"judge": "long", "missing_eos_score": 20.0, "kl_coef": 0.0},
        ["eos rate falling"],
        ["length drifting", "entropy collapse", SLOW_VALUES, "advantage scale off"],
    ),
    "a judge who can be fooled": (
        {"gold": "measure_in_all_things", "kl_coef": 0.0},
        ["reward up, audit down"],
        ["entropy collapse", SLOW_VALUES],
    ),
}


@pytest.mark.parametrize("sickness", SICK)
def test_what_ails_a_ppo_run_is_named(toy, tmp_path, sickness):
    flags, wanted, companions = SICK[sickness]
    check(ppo(toy, tmp_path, **flags), wanted, companions)


@pytest.mark.slow
def test_without_a_value_function_nothing_is_said_of_values(toy, tmp_path):
    said = [ppo(toy, tmp_path / c, critic=c, learning_rate=0.0) for c in ("shared", "none")]
    assert said[0] - said[1] == {SLOW_VALUES} and said[1] < said[0]
    huge = {"judge": "huge", "max_steps": 6, "critic": "none"}
    assert not {"advantage scale off", SLOW_VALUES} & ppo(toy, tmp_path / "huge", **huge)


def test_sampling_colder_than_scoring_is_named(toy, tmp_path, monkeypatch):
    """A fork's mistake: the temperature reaches generate() and not the log-probabilities."""
    generate = rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *args: generate(*args[:-1], 0.5))
    check(
        ppo(toy, tmp_path, kl_coef=0.0, check=False),  # which would end it at once
        ["sampling and scoring differ"],
        ["entropy collapse", SLOW_VALUES, "reward flat"],
    )


OFTEN = ["KL running away", "reward flat", "length drifting", "entropy collapse", SLOW_VALUES]


def test_old_logprobs_of_the_updates_own_are_named_and_no_rate_is_blamed(
    toy, tmp_path, monkeypatch
):
    own_ratio(monkeypatch)
    check(ppo(toy, tmp_path / "a", check=False), ["ratio always 1"], OFTEN)
    # one step is taken at a ratio of 1, whoever measures it
    one_step = {"ppo_epochs": 1, "batch_size": 64, "minibatch_size": 64}
    check(ppo(toy, tmp_path / "b", check=False, **one_step), [], OFTEN)


def test_a_ratio_of_exactly_1_is_no_finding_where_nothing_moves():
    row = {"kl": 0.0, "approx_kl": 0.0, "clipfrac": 0.0, "learning_rate": 1.0}
    for exact, wanted in ((0.0, "clipfrac stuck at 0"), (3.0, "ratio always 1")):
        assert wanted in names_of([row | {"step": i, "kl_exact": exact} for i in range(8)])
    rows = [row | {"step": i, "kl_exact": 3.0, "approx_kl": float(i < 2)} for i in range(30)]
    assert "ratio always 1" not in names_of(rows)  # it has learned and come to rest


def test_a_score_at_every_token_is_named(toy, tmp_path, monkeypatch):
    """Whatever else it looks like."""
    score_on_every_token(monkeypatch)
    often = [*OFTEN, "eos rate falling", "advantage scale off", "updates too large"]
    found = ppo(toy, tmp_path, check=False, max_steps=8)
    check(found, ["score at every token"], often)


REWARDS = {  # at 60 tokens, KL 4 nats, --kl_coef 0.1: (score, --kl_loss_coef, rewards, a finding?)
    "ours": (1.0, 9.0, 1 - 0.1 * 4 - 9 * 4, False),
    "GRPO's, the penalty in the loss alone": (1.0, 9.0, 1 - 0.1 * 4, False),
    "a fork's, three times the score": (1.0, 0.0, 3 - 0.1 * 4, False),
    "a fork's, the other estimate of KL": (1.0, 0.0, 1 - 0.1 * 6, False),
    "the score at every token": (1.0, 0.5, 60 - 0.1 * 4 - 0.5 * 4, True),
    "a bad score at every token": (-1.0, 0.0, -60 - 0.1 * 4, True),
}


@pytest.mark.parametrize("case", REWARDS)
def test_only_rewards_of_many_times_the_score_are_a_finding(case):
    score, kl_loss_coef, rewards, wanted = REWARDS[case]
    flags, row = {"kl_loss_coef": kl_loss_coef}, {"kl": 4.0, "kl_exact": 4.0, "kl_coef": 0.1}
    row |= {"length": 60.0, "scores": score, "scores_sd": 0.5, "rewards": rewards}
    rows = [row | {"step": i} for i in range(5)]
    assert names_of(rows[:4], flags) == []
    assert names_of(rows, flags) == ["score at every token"] * wanted
    nothing = {"scores": 0.0, "scores_sd": 0.0, "rewards": -0.4 * (1 + 1e-6)}
    assert names_of([r | nothing for r in rows]) == ["scores all alike"]


@pytest.mark.slow
def test_a_reward_model_of_contradictions_is_named(toy, tmp_path):
    check(rm(toy, tmp_path / "rm", True), ["reward model at chance"], ["loss not falling"])


def test_of_two_held_out_judgements_no_finding_is_made():
    row = {"val_loss": 0.7, "val_accuracy": 0.5, "loss": 0.1}
    for weight, wanted in ((2, set()), (60, {"loss not falling", "reward model at chance"})):
        doctor = Doctor({}, 10)
        rows = [row | {"step": i, "val_weight": weight} for i in range(11)]
        assert {f.name for r in rows for f in doctor.read(r)} == wanted


def test_where_returns_do_not_vary_there_is_nothing_to_explain():
    """No value function is needed to predict 0, and none is blamed. A metric that is inf is."""
    row = {"kl": 0.1, "kl_exact": 0.1, "scores": 1.0, "scores_sd": 0.0}
    for explained in (math.nan, -9.0):
        doctor = Doctor({}, 30)
        rows = [row | {"step": i, "explained_variance": explained} for i in range(30)]
        said = {f.name for r in rows for f in doctor.read(r)}
        assert "scores all alike" in said and not {"values explain nothing", *BROKEN} & said
    for bad in ({"explained_variance": math.inf}, {"values": math.nan}):
        assert BROKEN == {f.name for f in Doctor({}, 9).read({"step": 0} | bad)}


@pytest.mark.slow
def test_a_few_examples_read_many_times_are_named(toy, tmp_path):
    few = [{"prompt": f"write {i}", "completion": letters(random.Random(i))} for i in range(120)]
    path = write_records(tmp_path / "few.jsonl", few)
    check(sft(toy, tmp_path / "sft", data=[path], epochs=30), ["train/validation gap"])


# ---- during a run, and afterwards --------------------------------------------------------------


def test_a_run_warns_once_of_each_finding_and_a_resumed_one_not_again(tmp_path, capsys):
    rows, cfg = recorded("no_penalty"), TrainConfig(out_dir=str(tmp_path))
    warnings = lambda: re.findall("warning: (.*): .* at step", capsys.readouterr().err)
    log = Log(cfg, 0, 60)
    for row in rows[:20]:
        log.row(int(row["step"]), {k: x for k, x in row.items() if k != "step"})
    assert warnings() == ["reward up, audit down", "KL running away"]
    log = Log(cfg, 15, 60)  # from a checkpoint before KL ran away
    for row in rows[15:]:
        log.row(int(row["step"]), {k: x for k, x in row.items() if k != "step"})
    assert warnings() == ["KL running away", "values explain nothing"]
    assert findings(tmp_path) == set(RECORDED["no_penalty"])


def test_a_value_that_is_not_finite_is_a_finding_at_once(tmp_path, capsys):
    log = Log(TrainConfig(out_dir=str(tmp_path)), 0, 10)
    log.row(0, {"loss": 1.0, "margin": math.inf})
    log.row(1, {"loss": math.nan})
    assert capsys.readouterr().err.count("non-finite value: margin inf at step 0") == 1
    assert findings(tmp_path) == {"non-finite value"}
