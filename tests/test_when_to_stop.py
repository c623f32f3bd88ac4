"""Rules for stopping PPO, on curves whose answers are known; and the numbers in the docs."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments import when_to_stop
from tests.helpers import refused

ROOT = Path(__file__).parents[1]
JUDGES = ("verifier", "reward model")
CURVE = {  # (step, KL, score, gold); the best checkpoint is the third
    "step": np.array([0.0, 4.0, 8.0, 12.0]),
    "kl": np.array([0.0, 2.0, 5.0, 9.0]),
    "score": np.array([0.0, 1.0, 1.5, 1.6]),
    "gold": np.array([1.0, 2.0, 3.0, 0.5]),
}


@pytest.mark.parametrize(
    "watched, limit, kept",
    [
        ("step", np.inf, 3),  # the last
        ("step", 4, 1),
        ("step", 7, 1),
        ("kl", 5, 2),  # 5 has not passed 5
        ("kl", 4.9, 1),
        ("kl", 1, 0),
        ("kl", -1, 0),
        ("price", 0.0, 3),  # the highest score
        ("price", 0.1, 2),  # 0, 0.8, 1.0, 0.7
        ("price", 0.3, 1),  # 0, 0.4, 0, -1.1
        ("price", 0.6, 0),  # 0, -0.2, ...
    ],
)
def test_a_rule_keeps_the_checkpoint_that_one_finds_by_hand(watched, limit, kept):
    assert when_to_stop.chosen(CURVE, watched, limit) == kept
    loss = 3.0 - CURVE["gold"][kept]
    assert when_to_stop.lost([CURVE], watched, limit) == pytest.approx([loss])


def test_a_run_that_comes_back_under_the_limit_was_stopped_before():
    run = CURVE | {"kl": np.array([0.0, 6.0, 2.0, 1.0])}
    assert when_to_stop.chosen(run, "kl", 5) == 0


def test_a_limit_is_chosen_on_runs_of_other_labels_alone():
    table = np.array([[0.0, 1.0, 5.0], [2.0, 0.0, 0.0]])  # (limits, runs)
    # the first run gets the second limit, 0 beside 3 in runs of b; those of b get the first limit
    assert when_to_stop.elsewhere(table, ["a", "b", "b"]).tolist() == [2.0, 1.0, 5.0]


def test_a_seed_counts_once_however_many_runs_it_has():
    runs = [{"seed": seed} for seed in "1121"]
    losses = np.array([1.0, 2.0, 10.0, 6.0])
    assert when_to_stop.by_seed(runs, losses).tolist() == [3.0, 10.0]
    assert when_to_stop.by_seed(runs, np.stack([losses, -losses])).tolist() == [[3, -3], [10, -10]]
    assert when_to_stop.cell(runs, losses).split()[0] == "6.500"


def test_an_alarm_is_counted_as_found_false_early_and_late():
    at = lambda kl, gold: CURVE | {"kl": np.array(kl), "gold": np.array(gold)}
    early = at([0, 6, 6, 6], [1, 2, 3, 0.5])  # rings at 4, falls at 12
    late = at([0, 1, 1, 6], [1, 2, 0.5, 0.5])  # rings at 12, falls at 8
    missed = at([0, 1, 1, 1], [1, 2, 0.5, 2])
    false = at([0, 6, 6, 6], [1, 2, 3, 2.9])  # 0.1 is no fall
    quiet = at([0, 1, 1, 1], [1, 2, 3, 3])
    text = when_to_stop.alarms([early, late, missed, false, quiet], 5, 0.25)
    assert text == "finds 2 of 3, false 1 of 2, iterations ahead -4, 8"


def rows_in(folder):
    """Made-up results: two story runs and a best of n, the same curve for letters and verifier."""
    points = list(zip(*CURVE.values()))
    curve = lambda key: [f"{key},{','.join(f'{x:g}' for x in point)}" for point in points]
    stories = [f"{seed},60,kl_coef 0.0" for seed in (1, 2)] + ["1,60,best of n"]
    letters = [f'{seed},{judge},"steps 60, kl_coef 0.1"' for seed in (1, 2) for judge in JUDGES]
    ends = ["a,0,1", "best of 4,,9", "c,7,3", "b,4,2"]  # unsorted; prices pay 1, 1.95 and 1.4
    for name, header, lines in (
        ("overoptimization", "seed,feedback,by,step,kl,proxy,gold", map(curve, stories)),
        ("two_judges", "seed,judge,flags,step,kl,proxy,gold", map(curve, letters)),
        ("films_smollm2", "model,KL,reward", [ends]),
        ("harmless_ppo", "model,KL,reward", [ends]),
        ("harmless_ppo_128", "model,KL,judge", [ends]),
    ):
        text = "\n".join([header, *(line for part in lines for line in part)])
        (folder / f"{name}.csv").write_text(text + "\n")


def test_runs_are_sorted_by_world_and_best_of_n_is_none(tmp_path):
    rows_in(tmp_path)
    worlds = when_to_stop.curves(tmp_path, "two_judges")
    assert list(worlds) == ["stories", "letters", "verifier"]
    assert list(map(len, worlds.values())) == [2, 2, 2]
    run = worlds["letters"][1]
    assert (run["penalty"], run["seed"], run["feedback"]) == ("kl_coef 0.1", "2", None)
    assert worlds["stories"][0]["feedback"] == "60"
    for name, values in CURVE.items():
        assert run[name].tolist() == values.tolist()


def test_the_command_prints_what_each_rule_loses_and_draws(tmp_path, capsys):
    rows_in(tmp_path)
    to = tmp_path / "when.png"
    when_to_stop.main(when_to_stop.Config(rows=str(tmp_path), to=str(to)))
    text = capsys.readouterr().out
    found = dict(re.findall(r"^(.*?\S) +(\d\.\d{3}) \+- 0\.000 ", text, re.M))
    assert found["last checkpoint                 inf"] == "2.500"
    assert found["highest score                     0"] == "2.500"
    assert found["limit of KL, nats                 5"] == "0.000"
    assert found["limit of KL, nats                 1"] == "2.000"
    assert found["price of KL, sd per nat         0.1"] == "0.000"
    assert found["price of KL, sd per nat         0.4"] == "1.000"
    assert found["limit of KL, nats              seed"] == "0.000"
    assert "films_smollm2, KL 0.0, 4.0, 7.0: KL 5 keeps b" in text
    assert "films_smollm2, KL 0.0, 4.0, 7.0: price 0.15 keeps c" in text
    assert "harmless_ppo_128, KL 0.0, 4.0, 7.0: KL 5 keeps b" in text
    assert text.count("harmless_ppo_128") == 1, "no score is stored there"
    assert to.stat().st_size > 10_000


def test_a_folder_without_the_rows_is_refused_by_name(tmp_path, capsys):
    cfg = when_to_stop.Config(rows=str(tmp_path), to=str(tmp_path / "when.png"))
    assert f"--rows: {tmp_path}/overoptimization.csv" in refused(capsys, when_to_stop.main, cfg)


@pytest.mark.parametrize(
    "letters, says",
    [
        ("cures", "could not convert string to float: ''"),
        ("harmless_ppo", "'flags'"),
        ("mistakes", "'step'"),
        ("nothere", "No such file"),
    ],
)
def test_other_rows_than_those_of_letters_are_refused_by_name(tmp_path, capsys, letters, says):
    rows = f"{ROOT}/docs/results"
    cfg = when_to_stop.Config(rows=rows, letters=letters, to=str(tmp_path / "when.png"))
    error = refused(capsys, when_to_stop.main, cfg)
    assert f"--letters: {rows}/{letters}.csv: " in error and says in error, error


@pytest.mark.parametrize(
    "name, flag, was, becomes, says",
    [
        ("two_judges", "--letters", "8,5,1.5,3", "8,,1.5,3", "to float: ''"),
        ("two_judges", "--letters", "8,5,1.5,3", "8,5,1.5", "NoneType"),
        ("overoptimization", "--rows", "5,1.5,3", "5,x,3", "'x'"),
        ("films_smollm2", "--rows", "model,KL", "model,kl", "'KL'"),
        ("films_smollm2", "--rows", "b,4,2", "b,4", "NoneType"),
    ],
)
def test_a_cell_or_column_that_is_not_there_is_refused_by_its_file(
    tmp_path, capsys, name, flag, was, becomes, says
):
    rows_in(tmp_path)
    path = tmp_path / f"{name}.csv"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, becomes))
    cfg = when_to_stop.Config(rows=str(tmp_path), to=str(tmp_path / "when.png"))
    error = refused(capsys, when_to_stop.main, cfg)
    assert f"{flag}: {path}: " in error and says in error, error


@pytest.mark.parametrize("letters", ["overoptimization", "what_matters", "pass_at_k"])
def test_rows_without_runs_of_both_judges_are_refused(tmp_path, capsys, letters):
    rows_in(tmp_path)
    text = (tmp_path / "two_judges.csv").read_text()
    (tmp_path / "pass_at_k.csv").write_text(text.replace("reward model", "verifier"))
    (tmp_path / "what_matters.csv").write_text(text.replace("judge", "changed"))
    cfg = when_to_stop.Config(rows=str(tmp_path), letters=letters, to=str(tmp_path / "when.png"))
    said = refused(capsys, when_to_stop.main, cfg)
    assert f"--letters {letters}: needs runs of stories, letters, verifier" in said


def test_rows_without_a_policy_are_refused(tmp_path, capsys):
    rows_in(tmp_path)
    cfg = when_to_stop.Config(rows=str(tmp_path), to=str(tmp_path / "when.png"))
    for text in ("model,KL,judge\n", "model,KL,judge\nbest of 4,,9\n"):
        (tmp_path / "harmless_ppo_128.csv").write_text(text)
        assert "harmless_ppo_128.csv: no KL in it" in refused(capsys, when_to_stop.main, cfg)


def test_the_docs_give_the_numbers_that_the_command_prints(tmp_path, capsys):
    for letters in ("two_judges", "two_judges_fresh"):
        files = {"rows": f"{ROOT}/docs/results", "to": str(tmp_path / "when.png")}
        when_to_stop.main(when_to_stop.Config(**files, letters=letters))
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    docs = (ROOT / "docs/results.md").read_text().split("\n## When to stop\n")[1].split("\n## ")[0]
    numbers = re.findall(r"\d\.\d{3} ± \d\.\d{3}", docs)
    assert len(numbers) > 20
    for number in numbers:
        assert number.replace("±", "+-") in printed, number
    for number in re.findall(r"(?<![\d.])\d\.\d{3}(?!\d| ±)", docs):
        assert number in printed, number
