"""The ladder: the four stages, those of them that are there, and any other model as a rung."""

import json
import math

import pytest
import torch

from nanorlhf.bpe import train_bpe
from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.data.files import write_records
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import evaluate
from tests.helpers import refused

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
DEFAULT = "demonstrations base base_fewshot sft best_of_4 best_of_16 ppo".split()
KEYS = """model gold gold_ci win_rate_vs_sft win_rate_ci reward_model reward_model_ci kl eos_rate
length grammatical lm_loss n_prompts sample""".split()


def save(folder, stage, model, tokenizer=TOKENIZER, chat=True):
    """A checkpoint of one step and its curve, as a stage or a fork leaves it."""
    folder.mkdir(parents=True)
    gpt = getattr(model, "gpt", model)
    cfg, details = TrainConfig(out_dir=str(folder)), {"chat": chat}
    checkpoint.save(cfg, stage, 1, model.state_dict(), {}, tokenizer, gpt.config, details=details)
    (folder / "metrics.csv").write_text("step,val_loss,val_accuracy,scores,kl\n0,2,0.5,1,0\n")
    return folder


def make_gpt(seed, tokenizer=TOKENIZER):
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(tokenizer.vocab_size, block_size=200, n_layer=1, n_head=1, d_model=8))
    for p in gpt.parameters():  # far from each other
        torch.nn.init.normal_(p, std=0.3)
    return gpt


def make_judge(seed):
    judge = RewardModel(make_gpt(seed))
    judge.score_sd.fill_(0.5)  # as train_rm.py measures it
    return judge


STAGES = {
    "gpt": lambda folder: save(folder, "gpt", make_gpt(1), chat=False),
    "sft": lambda folder: save(folder, "sft", make_gpt(2)),
    "rm": lambda folder: save(folder, "rm", make_judge(3)),
    "ppo": lambda folder: save(folder, "ppo", ActorCritic(make_gpt(4))),
}


@pytest.fixture
def out(tmp_path):
    for stage, make in STAGES.items():
        make(tmp_path / "out" / stage)
    return tmp_path / "out"


@pytest.fixture
def fork(tmp_path):
    return save(tmp_path / "forks" / "rloo", "rloo", ActorCritic(make_gpt(5)))


def ladder(out, *models, more=()):
    """{rung: its row} of the command, in the order of the table."""
    flags = "--prompts 5 --best_of_prompts 2 --max_new_tokens 12 --device cpu --dtype float32"
    more = [*more, "--models", *map(str, models)]
    rows = evaluate.main(from_cli(evaluate.Config, ["--out", str(out), *flags.split(), *more]))
    assert json.loads((out / "ladder.json").read_text()) == rows
    assert all(list(row) == KEYS for row in rows)
    for row in rows:
        texts = (out / "ladder" / f"{row['model']}.jsonl").read_text().splitlines()
        assert len(texts) == row["n_prompts"]
    assert (out / "ladder.png").stat().st_size > 5000
    return {row["model"]: row for row in rows}


def test_the_four_stages_are_seven_rungs_with_all_their_numbers(out, capsys):
    rows = ladder(out)
    assert list(rows) == DEFAULT
    blank = {name: [k for k, v in row.items() if v is None] for name, row in rows.items()}
    assert blank == {
        "demonstrations": ["kl", "lm_loss"],
        "base": ["kl"],
        "base_fewshot": ["kl"],
        "sft": ["win_rate_vs_sft", "win_rate_ci"],
        "best_of_4": [],
        "best_of_16": [],
        "ppo": [],
    }
    assert rows["sft"]["kl"] == 0 < rows["ppo"]["kl"]
    assert rows["best_of_4"]["kl"] == math.log(4) - 3 / 4
    assert rows["best_of_16"]["lm_loss"] == rows["sft"]["lm_loss"] != rows["ppo"]["lm_loss"]
    assert [row["n_prompts"] for row in rows.values()] == [5, 5, 5, 5, 2, 2, 5]
    assert "all pairs of 16 SFT samples" in capsys.readouterr().out


def test_a_fork_is_a_rung_more_and_leaves_the_others_as_they_are(out, fork):
    plain, rows = ladder(out), ladder(out, fork, f"again={out}/ppo")
    assert list(rows) == [*DEFAULT, "rloo", "again"]
    assert {name: rows[name] for name in DEFAULT} == plain
    assert rows["again"] == rows["ppo"] | {"model": "again"}
    assert rows["rloo"]["kl"] > 0 and None not in rows["rloo"].values()


def test_a_base_model_among_the_models_is_prompted_as_the_base_is(out, tmp_path):
    base = save(tmp_path / "mine", "pretrained", make_gpt(1), chat=False)
    rows = ladder(out, base)
    assert rows["mine"] == rows["base"] | {"model": "mine"}


LOST = {  # rungs, and keys of the others
    "gpt": ({"base", "base_fewshot"}, set()),
    "sft": ({"sft", "best_of_4", "best_of_16"}, {"win_rate_vs_sft", "win_rate_ci", "kl"}),
    "rm": ({"best_of_4", "best_of_16"}, {"reward_model", "reward_model_ci"}),
    "ppo": ({"ppo"}, set()),
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_depends_on_a_missing_stage_is_left_out_and_all_else_is_as_it_was(
    out, fork, capsys, stage
):
    whole = ladder(out, fork)
    (out / stage).rename(out / "elsewhere")
    capsys.readouterr()
    rows = ladder(out, fork)
    (said,) = [x for x in capsys.readouterr().out.splitlines() if "left out" in x]
    assert said.startswith(f"{out}/{stage}: no checkpoint there; ")
    rungs, keys = LOST[stage]
    assert list(rows) == [name for name in whole if name not in rungs]
    for name, row in rows.items():
        assert row == whole[name] | dict.fromkeys(keys & set(row))


def test_forks_alone_make_a_ladder_and_blanks_are_printed_as_dashes(tmp_path, fork, capsys):
    rows = ladder(tmp_path, fork)
    assert list(rows) == ["demonstrations", "rloo"]
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("rloo ")]
    assert row.split("]")[1].split()[:3] == ["-", "-", "-"] and printed.count("left out") == 4


def test_with_data_judges_a_best_of_a_constant_and_people_are_rows(out, tmp_path, capsys):
    judge = tmp_path / "judge.py"
    judge.write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    texts = ["good", "better one", "bad"]
    records = [{"prompt": f"q{i}", "completions": texts, "ranks": [2, 1, 3]} for i in range(60)]
    data, length = write_records(tmp_path / "data.jsonl", records), f"{judge}:length"
    flags = f"--data {data} --judge {length} {out}/rm --best_of 2 4 --constant 8 --people"
    flags += f" --out {out} --max_new_tokens 30 --device cpu --dtype float32"
    rows = {r["model"]: r for r in evaluate.main(from_cli(evaluate.Config, flags.split()))}
    assert list(rows) == "base sft best_of_2 best_of_4 ppo constant preferred not_preferred".split()
    assert list(rows.values()) == json.loads((out / "replies.json").read_text())
    for name, row in rows.items():
        low, high = row[f"{out}/rm_ci"]
        assert row["reward_model"] == row[f"{out}/rm"] and low < row["reward_model"] < high
        replies = (out / "replies" / f"{name}.jsonl").read_text().splitlines()
        assert len(replies) == row["n_prompts"] and row["reply_loss"] > 0 and "gold" not in row
        said = [len(json.loads(line)["response"]) for line in replies]
        assert row[length] == pytest.approx(sum(said) / len(said))
    assert rows["sft"]["kl"] == 0 < rows["ppo"]["kl"]
    rewards = [rows[name]["reward_model"] for name in ("sft", "best_of_2", "best_of_4")]
    assert rewards == sorted(rewards)
    assert rows["constant"]["distinct"] == pytest.approx(1 / rows["constant"]["n_prompts"])
    assert (rows["preferred"]["distinct"], rows["preferred"][length]) == (1 / 6, 10)
    assert rows["not_preferred"]["n_prompts"] == 2 * rows["preferred"]["n_prompts"]
    other = flags.replace("--people", f"--models a={out}/ppo b={out}/sft --lm {out}/gpt")
    other = other.replace("_tokens 30", "_tokens 1")  # nothing ends
    rows = evaluate.main(from_cli(evaluate.Config, other.split()))
    assert [row["model"] for row in rows] == ["a", "best_of_2", "best_of_4", "b"]
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]
    assert "no reply ends by itself" in capsys.readouterr().err


def test_people_are_shown_by_what_they_preferred(tmp_path):
    records = [{"prompt": "q", "completion": c, "label": n} for c, n in (("like", 1), ("hate", 0))]
    thumbs = [write_records(tmp_path / "thumbs.jsonl", records)]
    rungs = evaluate.people(evaluate.Config(data=thumbs, val_data=thumbs), TOKENIZER, 99)
    texts = {rung.name: [TOKENIZER.decode(ids) for ids in rung.ids] for rung in rungs}
    assert texts == {"preferred": ["like"], "not_preferred": ["hate"]}


def test_a_reward_that_is_the_gold_orders_all_pairs_alike(out, tmp_path, capsys):
    reward = "return [world.gold(p, r) for p, r in zip(prompts, responses)]\n"
    head = "from nanorlhf.data import world\ndef gold(prompts, responses):\n    "
    (tmp_path / "reward.py").write_text(head + reward)
    ladder(out, more=["--reward", f"{tmp_path}/reward.py:gold"])
    assert "all pairs of 16 SFT samples: 1.000" in capsys.readouterr().out


def test_what_needs_a_reward_or_data_says_so(out, tmp_path, capsys):
    people = evaluate.Config(out=str(out), people=True)
    assert "--people" in refused(capsys, evaluate.main, people)
    (out / "rm").rename(out / "elsewhere")
    flags = {"max_new_tokens": 12, "device": "cpu"}
    assert "no room for prompts" in refused(capsys, evaluate.main, evaluate.Config(out=str(out)))
    constant = evaluate.Config(out=str(out), constant=4, **flags)
    assert "go by a --reward" in refused(capsys, evaluate.main, constant)


def test_two_rungs_of_one_name_are_refused(out, fork, capsys):
    for models in ([fork, fork], [f"sft={fork}"], [out / "ppo"], [f"best_of_4={fork}"]):
        said = refused(capsys, ladder, out, *models)
        assert "is another rung's name; NAME=" in said
    for word in (f"={fork}", "name=", ""):
        assert "neither FOLDER nor NAME=FOLDER" in refused(capsys, ladder, out, word)


def test_models_that_cannot_be_compared_are_refused(out, tmp_path, capsys):
    bpe = train_bpe(["hello hello"] * 9, 265)
    other = save(tmp_path / "other", "rloo", make_gpt(5, bpe), bpe)
    assert "different vocabularies" in refused(capsys, ladder, out, other)
    assert "this needs a language model" in refused(capsys, ladder, out, f"judge={out}/rm")
    assert "no checkpoint there" in refused(capsys, ladder, out, tmp_path / "gone")
    assert "no --models" in refused(capsys, ladder, tmp_path / "nothing")
    (out / "rm").rename(out / "elsewhere")
    save(out / "rm", "rloo", make_gpt(5))
    assert "this needs a reward model" in refused(capsys, ladder, out)
