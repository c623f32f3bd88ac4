"""The four stages in a row on a toy language: they learn, and every flag does what its name says.

Prompts are "write 17", responses a few of the letters a to d. Demonstrations use the letters
evenly; people prefer more a's, and that is all there is to know (`taste`).
"""

import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from examples import folds
from nanorlhf.data import dialogue
from nanorlhf.data.examples import Example, load_demonstrations, load_feedback
from nanorlhf.data.files import write_records
from nanorlhf.machine.device import cast
from nanorlhf.model import GPT
from nanorlhf.report import over_folds, set_score_scale
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import score_responses
from nanorlhf.sources import FeedbackSet
from tests.helpers import refused

torch.set_num_threads(1)  # toy products are no faster on two, and crawl on a busy machine
ROOT = Path(__file__).parents[1]

CPU = {"device": "cpu", "dtype": "float32"}
QUICK = {"max_steps": 2, "batch_size": 16, "minibatch_size": 8, "eval_prompts": 4, "check": False}
PROMPTS = [f"write {i}" for i in range(100)]


def taste(text):
    return float(text.count("a") - text.count("b"))


def letters(rng):
    return "".join(rng.choice("abcd") for _ in range(rng.randint(3, 7)))


def write(folder, name, records):
    return [write_records(folder / f"{name}.jsonl", records)]


def feedback(kind, rng, n=150):
    """n judgements by someone who likes a's."""
    for i in range(n):
        texts = list({letters(rng): None for _ in range(4)})
        about = {"prompt": PROMPTS[i % len(PROMPTS)]}
        texts.sort(key=taste, reverse=True)
        if kind == "rankings":
            ranks = [1 + sum(taste(t) > taste(u) for t in texts) for u in texts]
            yield about | {"completions": texts, "ranks": ranks}
        elif kind == "comparisons":
            yield about | {"chosen": texts[0], "rejected": texts[-1]}
        elif kind == "ratings":
            yield about | {
                "completion": texts[i % 3],
                "rating": min(max(2 + taste(texts[i % 3]), 0), 5),
            }
        else:
            yield about | {"completion": texts[i % 3], "label": taste(texts[i % 3]) > 0}


def rows_of(folder, name="metrics.csv"):
    return [
        {k: float(v) for k, v in row.items() if v}
        for row in csv.DictReader(Path(folder, name).open())
    ]


def rows_header(folder):
    return next(csv.reader(Path(folder, "metrics.csv").open()))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The first three stages, once: the folder that holds gpt, sft, rm and the files."""
    folder, rng = tmp_path_factory.mktemp("toy"), random.Random(1)
    demos = [{"prompt": p, "completion": letters(rng)} for p in PROMPTS * 3]
    write(folder, "demos", demos)
    write(folder, "text", [{"text": f"{d['prompt']} {d['completion']}"} for d in demos])
    write(folder, "prompts", [{"prompt": p} for p in PROMPTS])
    write(folder, "rankings", feedback("rankings", rng))
    common = CPU | {"eval_every": 20, "save_every": 20, "warmup_steps": 5}
    train_gpt.main(
        train_gpt.Config(
            out_dir=str(folder / "gpt"),
            data=[f"{folder}/text.jsonl"],
            tokenizer="bytes",
            n_layer=2,
            n_head=2,
            d_model=32,
            block_size=32,
            max_steps=60,
            batch_size=8,
            sample_tokens=8,
            **common,
        )
    )
    train_sft.main(
        train_sft.Config(
            out_dir=str(folder / "sft"),
            init=str(folder / "gpt"),
            data=[f"{folder}/demos.jsonl"],
            epochs=4,
            learning_rate=5e-3,
            max_new_tokens=10,
            **common,
        )
    )
    train_rm.main(
        train_rm.Config(
            out_dir=str(folder / "rm"),
            init=str(folder / "sft"),
            epochs=5,
            learning_rate=3e-3,
            data=[f"{folder}/rankings.jsonl"],
            **common,
        )
    )
    return folder


def test_dropout_is_a_stages_own_choice_and_not_handed_on(toy, tmp_path):
    losses = []
    for p in (0.0, 0.5):
        common = CPU | {"init": str(toy / "gpt"), "data": [f"{toy}/demos.jsonl"], "max_steps": 1}
        out = str(tmp_path / str(p))
        train_sft.main(train_sft.Config(out_dir=out, dropout=p, max_new_tokens=4, **common))
        losses.append(rows_of(out)[0]["loss"])
        assert checkpoint.load_model(out, "lm")[0].config.dropout == 0
        assert checkpoint.load_model(out, "lm", dropout=0.5)[0].h[0].drop.p == 0.5
    assert losses[1] > losses[0] + 0.01


def ppo(toy, out_dir, **flags):
    """train_ppo on the toy language; returns its rows of metrics."""
    defaults = {
        "init": str(toy / "sft"),
        "reward": str(toy / "rm"),
        "data": [f"{toy}/prompts.jsonl"],
        "max_new_tokens": 10,
        "learning_rate": 3e-3,
        "eval_every": 100,
        "save_every": 100,
    }
    train_ppo.main(train_ppo.Config(out_dir=str(out_dir), **CPU | defaults | QUICK | flags))
    return rows_of(out_dir)


def samples(folder):
    """(tokenizer, prompts, responses): 64 samples of a checkpoint, always with the same noise."""
    gpt, found = checkpoint.load_model(folder, "lm")
    tokenizer = found.tokenizer
    prompts = [dialogue.encode_prompt(tokenizer, [("user", p)]) for p in PROMPTS[:64]]
    return tokenizer, prompts, sample_responses(gpt.eval(), tokenizer, prompts, 10, seed=3)


# ---- the four stages ---------------------------------------------------------------------------


def test_the_losses_of_the_first_three_stages_fall(toy):
    for stage, factor in (("gpt", 0.6), ("sft", 0.93), ("rm", 0.7)):
        losses = [row["val_loss"] for row in rows_of(toy / stage) if "val_loss" in row]
        assert losses[-1] < factor * losses[0], f"{stage}: {losses}"


def test_the_reward_model_knows_the_taste_and_its_scores_are_standardised(toy):
    report = json.loads((toy / "rm" / "report.json").read_text())
    assert report["accuracy"] > 0.85
    model, found = checkpoint.load_model(toy / "rm", "reward")
    tokenizer = found.tokenizer
    _, examples = load_feedback([f"{toy}/rankings.jsonl"])
    pairs = [(e.messages, c) for e in examples for c in e.completions]
    prompts = [dialogue.encode_prompt(tokenizer, messages) for messages, _ in pairs]
    texts = [tokenizer.encode(c) for _, c in pairs]
    scores = score_responses(model.eval(), tokenizer, prompts, texts)
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.1
    tastes = torch.tensor([taste(c) for _, c in pairs])
    assert torch.corrcoef(torch.stack([scores, tastes]))[0, 1] > 0.8


def test_scores_have_one_scale_whatever_the_order_of_the_file(toy, tmp_path):
    judged = [
        {"prompt": f"write {i}", "completion": c, "label": c == "aa"}
        for c in ("aa", "bb")
        for i in range(300)
    ]
    config = train_rm.Config(
        out_dir=str(tmp_path),
        init=str(toy / "gpt"),  # a base model, which has no answers to set the unit
        data=write(tmp_path, "judged", judged),
        max_steps=30,
        batch_size=32,
        learning_rate=3e-3,
        **CPU,
    )
    report = train_rm.main(config)
    assert report["accuracy"] > 0.95 and "a base model" in report["score_unit"]
    model, found = checkpoint.load_model(tmp_path, "reward")
    prompts = [dialogue.encode_prompt(found.tokenizer, [("user", "write 7")])] * 2
    said = [found.tokenizer.encode(c) for c in ("aa", "bb")]
    liked, disliked = score_responses(model.eval(), found.tokenizer, prompts, said).tolist()
    assert 0.7 < liked < 1.4 and -1.4 < disliked < -0.7, f"{liked} {disliked}"


@pytest.mark.parametrize("how", ["--init", "--sft"])
def test_the_unit_of_a_score_is_the_spread_of_what_ppo_starts_from(toy, tmp_path, how, capsys):
    """And not that of the texts that were judged, which are far better and far worse. PPO says so
    where it starts from a model of another spread."""
    judged = [{"prompt": p, "chosen": "aaaaaa", "rejected": "bbbbbb"} for p in PROMPTS]
    config = train_rm.Config(
        out_dir=str(tmp_path / "rm"),
        init=str(toy / ("sft" if how == "--init" else "gpt")),
        sft="" if how == "--init" else str(toy / "sft"),
        data=write(tmp_path, "judged", judged),
        max_steps=30,
        learning_rate=3e-3,
        max_new_tokens=8,
        **CPU,
    )
    report = train_rm.main(config)
    judge, found = checkpoint.load_model(tmp_path / "rm", "reward")
    assert re.fullmatch(rf"\d+ responses of {toy}/sft/step_\d+", report["score_unit"])
    assert report["score_unit"] in capsys.readouterr().out
    gpt, _ = checkpoint.load_model(toy / "sft", "lm")
    asked = [dialogue.encode_prompt(found.tokenizer, [("user", p)]) for p in PROMPTS * 4]
    sampled = sample_responses(gpt.eval(), found.tokenizer, asked, 8, seed=7)
    ended = [i for i, ids in enumerate(sampled) if ids[-1] == found.tokenizer.eos_id]
    pairs = [asked[i] for i in ended], [sampled[i] for i in ended]
    scores = score_responses(judge.eval(), found.tokenizer, *pairs)
    assert abs(scores.mean()) < 0.3 and 0.75 < scores.std() < 1.3
    flags = {"reward": str(tmp_path / "rm"), "max_new_tokens": 8, "batch_size": 32, "max_steps": 1}
    ppo(toy, tmp_path / "same", **flags)
    assert "first rollout" not in capsys.readouterr().err
    set_score_scale(found.path, report["score_mean"], 6 * report["score_sd"])
    ppo(toy, tmp_path / "other", **flags)
    said = capsys.readouterr().err
    assert "sd 0.1" in said and "not 0 and 1" in said and f"--sft {toy}/sft measures" in said


VERIFIED = """
N = []

def reward(prompts, responses, answer):
    N.append(len(responses))
    assert answer == [[int(p.split()[1])] for p in prompts], (prompts, answer)
    return [float(r.count("a")) for r in responses]

def everything(prompts, responses, *, answer, other="absent", **columns):
    assert other == "absent" and set(columns) == {"prompt", "note"}, columns
    return reward(columns["prompt"], responses, answer)

def absent(prompts, responses, solution):
    return [0.0] * len(responses)

def fails_once(prompts, responses, at=4):
    N.append(1)
    if len(N) == at:
        raise ConnectionError("the judge is away")
    return [float(r.count("a")) for r in responses]

def fails_next(prompts, responses):
    return fails_once(prompts, responses, 5)
"""


def test_a_reward_function_gets_the_columns_that_it_names(toy, tmp_path, capsys):
    """As they are in the file, for each response, under --val_data and --gold as well."""
    (tmp_path / "verified.py").write_text(VERIFIED)
    rows = [{"q": p, "n": [int(p.split()[1])], "note": None or p} for p in PROMPTS]
    flags = {"data": write(tmp_path, "train", rows[:50]), "columns": ["prompt=q", "answer=n"]}
    flags |= {"val_data": write(tmp_path, "val", rows[50:]), "rollouts_per_prompt": 2}
    at = lambda name: f"{tmp_path}/verified.py:{name}"
    ppo(toy, tmp_path / "a", reward=at("reward"), gold=at("everything"), batch_size=8, **flags)
    for flag in ("reward", "gold"):
        given = {"reward": at("reward"), flag: at("absent")}
        said = refused(capsys, lambda g=given: ppo(toy, tmp_path / "b", **g, **flags))
        assert f"--{flag} {at('absent')} asks for a column 'solution'" in said
        assert "'answer'" in said and "train.jsonl:1" in said
    said = refused(capsys, lambda: ppo(toy, tmp_path / "b", reward=f"{tmp_path}/verified.py"))
    assert "which function?" in said and "reward, everything, absent" in said


def test_a_judge_that_fails_once_costs_no_finished_step(toy, tmp_path, capsys):
    (tmp_path / "verified.py").write_text(VERIFIED)
    flags = {"reward": f"{tmp_path}/verified.py:fails_once", "max_steps": 5}
    said = refused(capsys, lambda: ppo(toy, tmp_path / "a", **flags))
    assert "ConnectionError: the judge is away (at" in said and "verified.py:19)" in said
    rows = ppo(toy, tmp_path / "a", **flags, resume=True)  # the fifth call is no failure
    assert f"resumed at step 2 from {tmp_path}/a/step_2" in capsys.readouterr().out
    assert rows == ppo(toy, tmp_path / "b", **flags)


@pytest.mark.parametrize("flag, n", [("reward", "once"), ("reward", "next"), ("gold", "once")])
def test_neither_does_one_that_fails_in_an_evaluation_nor_a_yardstick(
    toy, tmp_path, capsys, flag, n
):
    """Calls are: evaluation of step 0, steps 0 and 1, evaluation of step 2, step 2, ..."""
    (tmp_path / "verified.py").write_text(VERIFIED)
    flags = {flag: f"{tmp_path}/verified.py:fails_{n}", "max_steps": 5, "eval_every": 2}
    assert "judge is away" in refused(capsys, lambda: ppo(toy, tmp_path / "a", **flags))
    rows = ppo(toy, tmp_path / "a", **flags, resume=True)  # the next call is no failure
    assert f"resumed at step 2 from {tmp_path}/a/step_2" in capsys.readouterr().out
    assert rows == ppo(toy, tmp_path / "b", **flags)


def test_a_score_for_not_ending_that_no_answer_reaches_is_said_at_once(toy, tmp_path, capsys):
    (tmp_path / "far.py").write_text("def f(p, r): return [-40.0 - len(x) / 10 for x in r]")
    ppo(toy, tmp_path / "a", reward=f"{tmp_path}/far.py:f", max_steps=1, max_new_tokens=8)
    said = capsys.readouterr().err
    assert (
        "no higher than --missing_eos_score -3" in said and "not to end would be the best" in said
    )
    flags = {"reward": f"{tmp_path}/far.py:f", "max_steps": 1, "max_new_tokens": 4}
    for i, more in enumerate(({"missing_eos_score": -100.0}, {"score_unended": True})):
        rows = ppo(toy, tmp_path / str(i), **flags, **more)
        assert "not to end would be the best" not in capsys.readouterr().err
        assert rows[0]["eos_rate"] < 1
    assert rows[0]["scores"] < -40  # as it stands


def test_a_finished_reward_model_that_is_resumed_is_judged_by_its_raw_scores(toy, tmp_path):
    """Its checkpoint holds the standardisation, which is no part of training."""
    flags = {"init": str(toy / "sft"), "out_dir": str(tmp_path), "max_steps": 20}
    flags |= {"data": [f"{toy}/rankings.jsonl"], "learning_rate": 3e-3, **CPU}
    report = train_rm.main(train_rm.Config(**flags))
    before = rows_of(tmp_path)[-1]
    assert train_rm.main(train_rm.Config(**flags, resume=True)) == report
    assert rows_of(tmp_path)[-1] == before


def test_ppo_raises_the_reward_models_score_and_the_taste_that_it_stands_for(toy, tmp_path):
    rows = ppo(
        toy, tmp_path, max_steps=12, batch_size=64, minibatch_size=32, eval_prompts=16, eval_every=6
    )
    assert rows[11]["scores"] > rows[0]["scores"] + 0.5
    assert rows[-1]["eval_scores"] > rows[0]["eval_scores"]
    assert rows[11]["kl_exact"] > 0.1
    model, _ = checkpoint.load_model(toy / "rm", "reward")
    found = []
    for folder in (toy / "sft", tmp_path):
        tokenizer, prompts, responses = samples(folder)
        scores = score_responses(model.eval(), tokenizer, prompts, responses)
        tastes = [taste(tokenizer.decode(r)) for r in responses]
        found.append((scores.mean().item(), sum(tastes) / len(tastes)))
    (score_sft, taste_sft), (score_ppo, taste_ppo) = found
    assert score_ppo > score_sft + 0.5 and taste_ppo > taste_sft + 0.7, found


def test_before_the_first_update_policy_reference_and_rollout_are_one(toy, tmp_path):
    rows = ppo(toy, tmp_path, ppo_epochs=1, minibatch_size=16, max_steps=1)
    assert abs(rows[0]["approx_kl"]) < 1e-6 and rows[0]["clipfrac"] == 0
    assert rows[0]["vf_clipfrac"] == 0 and abs(rows[0]["policy_loss"]) < 1e-5
    for name in ("kl", "kl_k2", "kl_k3", "kl_exact", "eval_kl_exact"):
        assert abs(rows[0][name]) < 1e-5, name
    assert rows[0]["values"] == 0


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_first_ratio_is_one(toy, dtype, tolerance):
    """In minibatches of other rows than the rollout was measured in."""
    cfg = train_ppo.Config(max_new_tokens=10, minibatch_size=8, device="cpu", dtype=dtype)
    dtype = getattr(torch, dtype)
    ready = lambda model: cast(model.eval(), dtype, torch.device("cpu"))
    gpt, found = checkpoint.load_model(toy / "sft", "lm")
    policy = ready(train_ppo.ActorCritic(gpt))
    tokenizer = found.tokenizer
    examples = [Example([("user", p)], "here") for p in PROMPTS[:16]]
    prompts = dialogue.encode_prompts(tokenizer, examples, 20)
    rollout = train_ppo.make_rollout(cfg, policy, gpt, prompts, tokenizer, 0, train_ppo.measure)
    order = torch.randperm(16)[:5]
    rows = {k: v[order] for k, v in rollout.items() if torch.is_tensor(v)}
    again = train_ppo.measure(cfg, policy, gpt, rows)
    ratio = (again["logprobs"] - rows["logprobs"]).exp()[rows["response_mask"]]
    assert (ratio - 1).abs().max() < tolerance
    assert torch.equal(rollout["logprobs"], rollout["ref_logprobs"])


def test_two_runs_with_one_seed_write_the_same_bytes_and_another_seed_others(toy, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ppo(toy, tmp_path / name, seed=seed)
    a, b, c = [(tmp_path / name / "metrics.csv").read_bytes() for name in "abc"]
    assert a == b != c


def test_a_resumed_ppo_run_is_the_uninterrupted_one(toy, tmp_path, monkeypatch):
    flags = {"max_steps": 3, "save_every": 1, "kl_target": 6.0}
    ppo(toy, tmp_path / "a", **flags)
    rollout = train_ppo.make_rollout

    def interrupted(*args):
        if args[5] == 2:
            raise KeyboardInterrupt
        return rollout(*args)

    monkeypatch.setattr(train_ppo, "make_rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo(toy, tmp_path / "b", **flags)
    monkeypatch.undo()
    ppo(toy, tmp_path / "b", resume=True, **flags)
    a, b = [(tmp_path / name / "metrics.csv").read_bytes() for name in "ab"]
    assert a == b


def test_grad_accum_changes_nothing_material(toy, tmp_path):
    whole, parts = ppo(toy, tmp_path / "a"), ppo(toy, tmp_path / "b", grad_accum=3)
    for name, value in whole[0].items():
        assert abs(parts[0][name] - value) < 1e-3 * max(abs(value), 1), name


# ---- the flags of PPO --------------------------------------------------------------------------

FLAGS = [
    {"critic": "separate"},
    {"critic": "none"},
    {"freeze_layers": 1},
    {"kl_loss_coef": 0.5},
    {"ptx_coef": 0.5},
    {"entropy_coef": 0.1},
    {"rollouts_per_prompt": 2},
    {"critic": "separate", "freeze_layers": 2, "kl_target": 6.0},
    {"critic": "none", "freeze_layers": 2, "kl_target": 6.0, "rollouts_per_prompt": 2},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_flag_runs_and_stays_finite(toy, tmp_path, flags):
    if "ptx_coef" in flags:
        flags = flags | {"ptx_data": [f"{toy}/text.jsonl"]}
    rows = ppo(toy, tmp_path, **flags)
    assert len(rows) == 3 and abs(rows[0]["kl"]) < 1e-5 and abs(rows[1]["kl"]) > 1e-6
    assert ("ptx_loss" in rows[0]) == ("ptx_coef" in flags)
    assert checkpoint.load(tmp_path, "lm").step == 2


def test_a_separate_critic_trains_in_bfloat16(toy, tmp_path):
    ppo(toy, tmp_path, critic="separate", dtype="bfloat16")
    weights = checkpoint.load(tmp_path, "lm").weights
    assert all(w.dtype == torch.float32 for w in weights.values())


def test_frozen_layers_keep_their_float32_weights_in_bfloat16(toy, tmp_path):
    ppo(toy, tmp_path, freeze_layers=1, dtype="bfloat16")
    before, after = [checkpoint.load(x, "lm").weights for x in (toy / "sft", tmp_path)]
    assert torch.equal(after["gpt.wte.weight"], before["wte.weight"])


def test_a_separate_critic_starts_as_the_reward_model_and_learns(toy, tmp_path):
    shared, separate = ppo(toy, tmp_path / "a"), ppo(toy, tmp_path / "b", critic="separate")
    assert shared[0]["values"] == 0 != separate[0]["values"]
    weights = checkpoint.load(tmp_path / "b", "lm").weights
    start = checkpoint.load(toy / "rm", "reward").weights
    assert torch.equal(weights["critic.score_sd"], start["score_sd"])
    assert not torch.equal(weights["critic.score_head.weight"], start["score_head.weight"])


def test_frozen_layers_are_those_of_the_sft_model_and_the_rest_moves(toy, tmp_path):
    ppo(toy, tmp_path, freeze_layers=1)
    before = checkpoint.load(toy / "sft", "lm").weights
    after = checkpoint.load(tmp_path, "lm").weights
    for name, w in before.items():
        frozen = name.startswith(("wte.", "wpe.", "h.0."))
        assert torch.equal(after["gpt." + name], w) == frozen, name


def test_the_adaptive_coefficient_falls_below_the_target_and_rises_above_it(toy, tmp_path):
    fixed = ppo(toy, tmp_path / "a")
    assert fixed[1]["kl_coef"] == fixed[0]["kl_coef"] == 0.05
    loose = ppo(toy, tmp_path / "b", kl_target=100.0)
    tight = ppo(toy, tmp_path / "c", kl_target=1e-9, max_steps=3)
    assert loose[1]["kl_coef"] < 0.05
    rises = [tight[2]["kl_coef"] > tight[1]["kl_coef"], tight[1]["kl"] > 0]
    assert rises[0] == rises[1]


def test_the_kl_loss_keeps_the_policy_near_the_reference(toy, tmp_path):
    free, held = [
        ppo(toy, tmp_path / str(c), kl_loss_coef=c, kl_coef=0.0, max_steps=3) for c in (0.0, 20.0)
    ]
    assert held[2]["kl_exact"] < 0.7 * free[2]["kl_exact"]


def test_the_entropy_bonus_raises_entropy(toy, tmp_path):
    plain, bonus = [ppo(toy, tmp_path / str(c), entropy_coef=c, max_steps=3) for c in (0.0, 5.0)]
    assert bonus[2]["entropy"] > plain[2]["entropy"] + 0.05


def test_every_metric_of_a_run_is_explained_in_the_docs(toy, tmp_path):
    """In a table's first column, by name; `val_` and `eval_` are the same on held-out data."""
    ppo(toy, tmp_path, ptx_coef=0.1, ptx_data=[f"{toy}/text.jsonl"])
    rows = re.findall(r"^\|(.*?)\|", (ROOT / "docs/metrics.md").read_text(), re.M)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {"step"}
    for folder in (toy / "gpt", toy / "sft", toy / "rm", tmp_path):
        for name in rows_header(folder):
            assert {name, re.sub("^(val|eval)_", "", name)} & explained, name


def test_a_tiny_kl_limit_stops_the_update_after_its_first_step(toy, tmp_path):
    """The first minibatch has approx_kl 0 and is taken; the next is already too far, which the
    metrics say: with a rate that is too high, too."""
    free, stopped = ppo(toy, tmp_path / "a"), ppo(toy, tmp_path / "b", max_approx_kl=1e-5)
    assert free[0]["approx_kl"] > stopped[0]["approx_kl"] > 1e-5
    assert 0 < stopped[1]["kl_exact"] < free[1]["kl_exact"]


def test_rollouts_per_prompt_sample_different_responses_to_each(toy, tmp_path, monkeypatch):
    seen, rollout = [], train_ppo.make_rollout
    spy = lambda *a: seen.append((a[3], rollout(*a))) or seen[-1][1]
    monkeypatch.setattr(train_ppo, "make_rollout", spy)
    ppo(toy, tmp_path, rollouts_per_prompt=4, batch_size=4, max_steps=1)
    prompts, found = max(seen, key=lambda x: len(x[0]))
    texts = [p.text for p in prompts]
    assert len(texts) == 16 and len(set(texts)) == 4 and texts[0] == texts[3] != texts[4]
    assert all(len(set(found["texts"][i : i + 4])) > 1 for i in range(0, 16, 4))


def test_a_response_without_an_eos_gets_the_fixed_score_under_a_function_too(toy, tmp_path):
    (tmp_path / "r.py").write_text("def one(prompts, responses):\n    return [1] * len(prompts)\n")
    rows = ppo(toy, tmp_path / "a", reward=f"{tmp_path}/r.py:one", max_new_tokens=4, max_steps=1)
    eos_rate = rows[0]["eos_rate"]
    assert eos_rate < 1
    assert abs(rows[0]["scores"] - (eos_rate * 1 - 3 * (1 - eos_rate))) < 1e-4


def test_gold_of_own_data_is_a_function_that_is_watched_and_changes_nothing(toy, tmp_path):
    (tmp_path / "r.py").write_text(
        "def size(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def one(prompts, responses):\n    return [1] * len(prompts)\n"
    )
    flags = {"reward": f"{tmp_path}/r.py:one", "max_steps": 2}
    plain = ppo(toy, tmp_path / "a", **flags)
    watched = ppo(toy, tmp_path / "b", gold=f"{tmp_path}/r.py:size", **flags)
    assert watched[0]["gold"] > 1 and watched[-1]["eval_gold"] > 1
    drop = lambda row: {k: v for k, v in row.items() if k not in ("gold", "eval_gold")}
    assert list(map(drop, watched)) == plain


def test_any_python_function_can_be_the_reward(toy, tmp_path):
    (tmp_path / "r.py").write_text(
        "def share(prompts, responses):\n"
        "    assert all(p.startswith('write ') for p in prompts)\n"
        "    return [r.count('d') / max(len(r), 1) for r in responses]\n"
    )
    flags = {"max_steps": 12, "batch_size": 64, "minibatch_size": 32}
    rows = ppo(toy, tmp_path / "a", reward=f"{tmp_path}/r.py:share", kl_coef=0.0, **flags)
    assert "gold" not in rows[0]
    tokenizer, _, responses = samples(tmp_path / "a")
    _, _, before = samples(toy / "sft")
    share = lambda rows: sum(tokenizer.decode(r).count("d") for r in rows) / sum(map(len, rows))
    assert share(responses) > share(before) + 0.15


# ---- feedback of every kind --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rankings", "comparisons", "ratings", "thumbs"])
def test_every_kind_of_feedback_trains_a_reward_model(toy, tmp_path, kind):
    files = write(tmp_path, kind, feedback(kind, random.Random(2), n=300))
    report = train_rm.main(
        train_rm.Config(
            out_dir=str(tmp_path / "rm"),
            init=str(toy / "sft"),
            data=files,
            epochs=6,
            learning_rate=3e-3,
            warmup_steps=5,
            eval_every=10,
            save_every=10,
            **CPU,
        )
    )
    assert report["kind"] == {"comparisons": "rankings"}.get(kind, kind)
    assert report["accuracy"] > 0.75
    losses = [row["val_loss"] for row in rows_of(tmp_path / "rm") if "val_loss" in row]
    assert min(losses) < 0.85 * losses[0]
    model, _ = checkpoint.load_model(tmp_path / "rm", "reward")
    assert model.score_sd != 1 and abs(model.score_sd.item() - report["score_sd"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["comparisons", "ratings", "thumbs"])
def test_over_folds_every_judgement_is_judged_by_what_the_others_teach(toy, tmp_path, capsys, kind):
    """And the run itself is what it is without them."""
    cfg = train_rm.Config(
        init=str(toy / "sft"),
        data=write(tmp_path, kind, feedback(kind, random.Random(2), n=90)),
        epochs=6,
        learning_rate=3e-3,
        warmup_steps=5,
        **CPU,
    )
    reports = [
        train_rm.main(replace(cfg, out_dir=str(tmp_path / name), folds=n))
        for name, n in (("plain", 0), ("folds", 3))
    ]
    assert reports[0] == reports[1]
    told = re.search(r"over folds: (\S+) \[(\S+), (\S+)\] of (\S+)\n", capsys.readouterr().out)
    accuracy, low, high, n = (float(x.replace(",", "")) for x in told.groups())
    assert 0.6 < accuracy <= 1 and low <= accuracy <= high and high - low < 0.4
    assert n == 90 or kind == "ratings"


def test_what_is_judged_is_never_learned_from(toy, tmp_path):
    """In each fold, by prompts; and where a prompt is alone, there are no folds."""
    kind, rows = "comparisons", {}
    for part in ("some", "others"):
        files = write(tmp_path, part, feedback(kind, random.Random(part), n=130))
        examples = load_feedback(files)[1]
        rows[part] = FeedbackSet(examples, [(e.first_turn, e.source) for e in examples])
    seen = []

    def scores_of(train, judged):
        assert {prompt for prompt, _ in train}.isdisjoint(prompt for prompt, _ in judged)
        assert len(train) + len(judged) == 260
        seen.extend(judged)
        return judged

    examples, scores = over_folds(4, rows["some"], rows["others"], scores_of)
    assert sorted(seen) == sorted(scores) and len(seen) == 260
    assert [(e.first_turn, e.source) for e in examples] == scores


def test_judgements_of_one_prompt_cannot_be_split(toy, tmp_path, capsys):
    same = FeedbackSet([Example([("user", "p")], "s")] * 5, list(range(5)))
    nothing = FeedbackSet([], [])
    assert "too few prompts" in refused(capsys, over_folds, 3, same, nothing, lambda a, b: b)


def test_a_reward_model_goes_on_learning_from_where_it_was(toy, tmp_path, capsys):
    """With its head, in raw scores; the unit is measured anew."""
    cfg = train_rm.Config(
        out_dir=str(tmp_path / "rm"),
        init=str(toy / "rm"),
        sft=str(toy / "sft"),
        data=[f"{toy}/rankings.jsonl"],
        seed=2,  # and so other responses to measure by
        max_steps=1,
        learning_rate=1e-9,
        max_new_tokens=10,
        **CPU,
    )
    report = train_rm.main(cfg)
    before, _ = checkpoint.load_model(toy / "rm", "reward")
    after, _ = checkpoint.load_model(tmp_path / "rm", "reward")
    rows = torch.randint(97, 101, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    raw = [m.score(*rows) * m.score_sd + m.score_mean for m in (before, after)]
    torch.testing.assert_close(*raw, rtol=1e-4, atol=1e-4)
    assert before.score_sd != after.score_sd == pytest.approx(report["score_sd"])
    message = refused(capsys, train_rm.main, replace(cfg, sft="", out_dir=str(tmp_path / "other")))
    assert "--sft names" in message


def test_without_data_the_embedded_world_serves_all_four_stages(tmp_path):
    """Too small to learn a thing: what is checked is that files, folders and gold are there."""
    folder = lambda name: str(tmp_path / name)
    common = CPU | {"batch_size": 2, "eval_every": 2, "save_every": 2}
    train_gpt.main(
        train_gpt.Config(
            out_dir=folder("gpt"),
            documents=100,
            vocab_size=500,
            n_layer=1,
            n_head=1,
            d_model=8,
            block_size=320,
            max_steps=2,
            sample_tokens=4,
            **common,
        )
    )
    train_sft.main(
        train_sft.Config(
            out_dir=folder("sft"),
            init=folder("gpt"),
            demonstrations=60,
            max_steps=2,
            max_new_tokens=8,
            **common,
        )
    )
    start = {"init": folder("sft"), "sft": folder("sft")}
    report = train_rm.main(
        train_rm.Config(
            out_dir=folder("rm"),
            prompts=8,
            heldout_prompts=4,
            max_new_tokens=8,
            max_steps=2,
            **start | common,
        )
    )
    assert {"accuracy_heldout_labelers", "accuracy_gold", "labelers_agree"} <= set(report)
    train_ppo.main(
        train_ppo.Config(
            out_dir=folder("ppo"),
            init=folder("sft"),
            reward=folder("rm"),
            max_steps=1,
            minibatch_size=2,
            max_new_tokens=8,
            eval_prompts=2,
            **common,
        )
    )
    rows = rows_of(folder("ppo"))
    assert "gold" in rows[0] and "eval_gold" in rows[-1]
    assert (tmp_path / "sft/demonstrations.jsonl").exists()
    assert (tmp_path / "rm/feedback.jsonl").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"gpt", "sft", "rm", "ppo"}


def test_every_init_takes_the_checkpoint_of_a_fork(toy, tmp_path):
    """Here PPO's, under another name."""
    ppo(toy, tmp_path / "rloo", max_steps=1)
    for path in (tmp_path / "rloo").glob("step_*/config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"stage": "rloo"}))
    common = CPU | {"init": str(tmp_path / "rloo"), "max_steps": 1}
    flags = lambda stage, data: common | {"out_dir": str(tmp_path / stage), "data": [data]}
    train_gpt.main(train_gpt.Config(**flags("gpt", f"{toy}/text.jsonl"), block_size=16))
    train_sft.main(train_sft.Config(**flags("sft", f"{toy}/demos.jsonl"), max_new_tokens=4))
    train_rm.main(train_rm.Config(**flags("rm", f"{toy}/rankings.jsonl")))
    ppo(toy, tmp_path / "ppo", init=common["init"], max_steps=1)
    for stage, chat in (("gpt", False), ("sft", True), ("rm", True), ("ppo", True)):
        found = checkpoint.load(tmp_path / stage)
        assert (found.stage, found.tokenizer.chat) == (stage, chat)
        assert found.kind == ("reward" if stage == "rm" else "lm")


# ---- mistakes of a user ------------------------------------------------------------------------


def test_a_start_of_the_wrong_kind_exits_2_with_one_line(toy, tmp_path, capsys):
    cases = [
        lambda: ppo(toy, tmp_path, init=str(toy / "rm")),
        lambda: ppo(toy, tmp_path, reward=str(toy / "sft")),
        lambda: train_sft.main(train_sft.Config(out_dir=str(tmp_path), init=str(toy / "rm"))),
    ]
    for case in cases:
        assert " model; this needs a " in refused(capsys, case)
    nowhere = lambda: ppo(toy, tmp_path, init=str(tmp_path / "nowhere"))
    assert "nowhere: no checkpoint there; train_{gpt,sft,ppo}.py makes" in refused(capsys, nowhere)


def test_data_that_is_missing_exits_2_with_one_line(toy, tmp_path, capsys):
    gone, init = [str(tmp_path / "gone.jsonl")], str(toy / "sft")
    out = {"out_dir": str(tmp_path / "x")}
    cases = [
        lambda: train_gpt.main(train_gpt.Config(data=gone, **out)),
        lambda: train_sft.main(train_sft.Config(data=gone, init=init, **out)),
        lambda: train_rm.main(train_rm.Config(data=gone, init=init, **out)),
        lambda: ppo(toy, tmp_path / "x", data=gone),
    ]
    for case in cases:
        assert "gone.jsonl" in refused(capsys, case)


def test_a_reward_that_is_no_function_or_returns_nonsense_exits_2(toy, tmp_path, capsys):
    path = tmp_path / "r.py"
    path.write_text(
        "def few(p, r): return [1.0]\ndef nan(p, r): return [float('nan')] * len(p)\n"
        "def words(p, r): return r\n"
    )
    cases = [("few", "1 scores"), ("nan", "not finite"), ("words", "list of floats")]
    cases += [("gone", "no function 'gone'")]
    for name, reason in cases:
        call = lambda n=name: ppo(toy, tmp_path / "x", reward=f"{path}:{n}")
        assert reason in refused(capsys, call)
    missing = lambda: ppo(toy, tmp_path / "x", reward=f"{tmp_path}/none.py:f")
    assert "is not a Python file" in refused(capsys, missing)


def test_an_unknown_flag_exits_2_and_names_it():
    for script in ("train_gpt.py", "train_ppo.py"):
        run = subprocess.run(
            [sys.executable, script, "--kl_cof", "0.1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert run.returncode == 2 and "--kl_cof" in run.stderr.splitlines()[-1]


def test_folds_hand_on_replies_that_go_on_over_several_turns(toy, tmp_path, capsys):
    question = {"role": "user", "content": "write a"}
    two_turns = [  # HH's: two dialogues that part at the first reply
        [question, {"role": "assistant", "content": "aa"}],
        [question, {"role": "assistant", "content": "bb"}]
        + [{"role": "user", "content": "more"}, {"role": "assistant", "content": "cc"}],
    ]
    pairs = [{"chosen": two_turns[0], "rejected": two_turns[1]}]
    # who ends with an a is preferred, but for every fourth pair; the model knows it the same way
    pairs += [{"prompt": f"write {i}", "chosen": "bba", "rejected": "aab"} for i in range(39)]
    for pair in pairs[1::4]:
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    data = write(tmp_path, "pairs", pairs)
    out = tmp_path / "folds"
    folds.main(folds.Config(*data, str(out)))
    assert capsys.readouterr().out.startswith("words") and not (out / "fold0" / "rm").exists()
    files = [f"{out}/fold{k}.jsonl" for k in range(5)]
    _, read = load_feedback(data)
    _, split = load_feedback(files)
    known = lambda examples: sorted((str(e.messages), str(e.completions)) for e in examples)
    assert known(split) == known(read) and len(load_demonstrations(files)) == 40
    for k in range(5):
        shutil.copytree(toy / "rm", out / f"fold{k}" / "rm")
    folds.main(folds.Config(*data, str(out)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    means = {name: float(mean) for name, mean, *_ in lines}
    assert means["difference"] == pytest.approx(means["model"] - means["words"], abs=2e-3)
    assert "needs comparisons" in refused(
        capsys, folds.main, folds.Config(f"{toy}/rankings.jsonl", str(out))
    )


def test_the_two_judges_of_a_fold_are_right_where_the_chosen_one_is_better(toy, tmp_path):
    pairs = [{"prompt": f"write {i}", "chosen": "aaa", "rejected": "bbb"} for i in range(20)]
    _, examples = load_feedback(write(tmp_path, "pairs", pairs))
    swapped = [replace(e, completions=e.completions[::-1]) for e in examples]
    assert folds.by_model(str(toy / "rm"), examples) == [1.0] * 20
    assert folds.by_model(str(toy / "rm"), swapped) == [0.0] * 20
    assert folds.by_words(examples, examples[:3] + swapped[:3]) == [1.0] * 3 + [0.0] * 3


def test_max_seq_len_cuts_what_every_stage_reads_and_not_the_models_context(toy, tmp_path):
    long = {"prompt": "a long way to say it: write 1"}  # with its reply more than 32 tokens
    demos = write(tmp_path, "demos", [long | {"completion": c} for c in ("ab", "cd")])
    pairs = write(tmp_path, "pairs", [long | {"chosen": "ab", "rejected": "cd"}] * 2)
    stages = {
        "sft": (train_sft, {"init": str(toy / "gpt"), "data": demos, "val_data": demos}),
        "rm": (train_rm, {"init": str(toy / "sft"), "data": pairs, "val_data": pairs}),
        "ppo": (train_ppo, {"reward": str(toy / "rm"), "data": demos, "val_data": demos}),
    }
    for name, (script, about) in stages.items():
        for limit, longest in ((0, 32), (16, 16)):
            read, real = [], GPT.embed
            flags = CPU | {"max_steps": 1, "max_new_tokens": 8, "check": False, "batch_size": 2}
            flags |= about | {"max_seq_len": limit, "out_dir": f"{tmp_path}/{name}{limit}"}
            flags |= {"init": about.get("init", str(toy / "sft"))}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    GPT,
                    "embed",
                    lambda self, x, at, read=read, real=real: (
                        read.append(int(at.max()) + 1) or real(self, x, at)
                    ),
                )
                script.main(script.Config(**flags))
            more = 8 if name == "ppo" and limit else 0  # the reward model reads one eos more
            assert longest - 8 < max(read) <= longest + more, (name, limit)
        if name != "rm":
            assert checkpoint.load_model(f"{tmp_path}/{name}16", "lm")[0].config.block_size == 32


def test_text_has_no_max_seq_len(capsys):
    cfg = train_gpt.Config(max_seq_len=16, **CPU)
    assert "--block_size cuts it" in refused(capsys, train_gpt.main, cfg)


STAGES = {
    "gpt": (train_gpt, {"data": "text", "block_size": 32, "d_model": 16, "tokenizer": "bytes"}),
    "sft": (train_sft, {"data": "demos", "init": "gpt", "max_new_tokens": 4}),
    "rm": (train_rm, {"data": "rankings", "init": "sft", "max_new_tokens": 4}),
    "ppo": (train_ppo, {"data": "prompts", "init": "sft", "reward": "rm", "max_new_tokens": 4}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_row_is_handed_on_also_of_a_run_whose_metrics_were_moved_away(toy, tmp_path, stage):
    """The run goes on at step 2, where no evaluation is due, and evaluates again at its end."""
    script, about = STAGES[stage]
    paths = {name: f"{toy}/{about[name]}" for name in ("init", "reward") if name in about}
    flags = CPU | about | paths | {"data": [f"{toy}/{about['data']}.jsonl"], "check": False}
    flags |= {"out_dir": str(tmp_path), "batch_size": 4, "eval_every": 10, "save_every": 2}
    flags |= {"minibatch_size": 4} if stage == "ppo" else {}
    handed = []
    script.main(script.Config(max_steps=2, **flags), on_row=handed.append)
    assert [list(row) for row in rows_of(tmp_path)] == [list(row) for row in handed]
    columns = set(rows_header(tmp_path))
    (tmp_path / "metrics.csv").rename(tmp_path / "moved.csv")
    handed.clear()
    script.main(script.Config(max_steps=4, resume=True, **flags), on_row=handed.append)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4] and set(rows_header(tmp_path)) == columns
    assert rows == [{k: pytest.approx(v, rel=1e-5) for k, v in row.items()} for row in handed]


def test_the_recipes_of_the_page_on_forking_run(toy, tmp_path, monkeypatch):
    """Each block is a file of its own: my.py, named in its first line, or a script to start."""
    page = (ROOT / "docs/forking.md").read_text().split("### What people change first")[1]
    fork, mine, tracker, *_ = re.findall(r"```python\n(.*?)```", page, re.S)
    handed, recipes = [], {"__name__": "recipes"}
    exec(fork, recipes)
    rollout = {"response_mask": torch.tensor([[True, True, True], [True, False, False]])}
    rollout |= {"logprobs": torch.zeros(2, 3), "ref_logprobs": torch.full((2, 3), -1.0)}
    scores, cfg = torch.tensor([2.0, 1.0]), train_ppo.Config(critic="none")
    rewards = recipes["shorter"](cfg, rollout, scores, 0.0)["rewards"].sum(1)
    torch.testing.assert_close(rewards, torch.tensor([1.97, 0.99]))
    rewards = recipes["with_k3"](cfg, rollout, torch.zeros(2), 1.0)["rewards"].sum(1)
    torch.testing.assert_close(rewards, -torch.tensor([3.0, 1.0]) / math.e)  # k3 of k1 = 1

    (tmp_path / "my.py").write_text(mine.replace('"out/rm"', f'"{toy}/rm", dtype="float32"'))
    rows = ppo(toy, tmp_path / "mixed", reward=f"{tmp_path}/my.py:reward")
    assert [row["scores"] for row in rows[:2]] == pytest.approx(
        [row["scores"] for row in ppo(toy, tmp_path / "plain")[:2]], abs=1e-3
    )  # nobody says "because" here

    log = SimpleNamespace(init=lambda **_: None, log=handed.append, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", log)
    flags = {"init": f"{toy}/sft", "reward": f"{toy}/rm", "data": f"{toy}/prompts.jsonl"}
    flags |= {"out_dir": f"{tmp_path}/tracked", "max_steps": 1, "batch_size": 4, "device": "cpu"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["t.py", *words, "--minibatch_size=4", "--max_new_tokens=4"])
    exec(tracker, {})
    assert [row["step"] for row in handed] == [0, 1] and "kl" in handed[0]


def test_an_sft_sample_shows_the_whole_dialogue(toy, tmp_path, capsys):
    turns = ("user", "u1\nu2"), ("assistant", "a1"), ("user", "u3"), ("assistant", "a2")
    messages = [{"role": role, "content": content} for role, content in turns]
    data = write(tmp_path, "chats", [{"messages": messages}])
    flags = {"init": str(toy / "gpt"), "max_steps": 1, "max_new_tokens": 4, "check": False}
    flags |= {"data": data, "val_data": data, "out_dir": str(tmp_path / "sft")}
    train_sft.main(train_sft.Config(**CPU | flags))
    said = capsys.readouterr().out.partition("[sft] held-out prompts, and what the trained")[2]
    assert "  prompt | u1\n         | u2\n         | a1\n         | u3\n  sample | " in said
