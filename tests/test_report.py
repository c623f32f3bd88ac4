"""The report of a reward model, and the scale of its scores."""

import csv
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_rm
from nanorlhf import functional as f
from nanorlhf import report
from nanorlhf.config import TrainConfig
from nanorlhf.data.examples import Example
from nanorlhf.data.files import write_records
from nanorlhf.model import RewardModel
from nanorlhf.run import checkpoint
from tests.helpers import refused
from tests.run.test_checkpoint import save, train
from tests.test_engine import make_config, make_gpt


def test_the_score_scale_is_written_into_the_checkpoint_whole_or_not_at_all(
    tmp_path, monkeypatch, capsys
):
    cfg = make_config(tmp_path)
    save(cfg, 1, RewardModel(make_gpt()), stage="rm")
    path = Path(cfg.out_dir, "step_1")
    report.set_score_scale(path, 0.5, 2.0)
    model, _ = checkpoint.load_model(cfg.out_dir, "reward")
    assert (model.score_mean.item(), model.score_sd.item()) == (0.5, 2.0)
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    assert "could not be written" in refused(capsys, report.set_score_scale, path, 9.0, 9.0)
    model, _ = checkpoint.load_model(cfg.out_dir, "reward")
    assert model.score_sd.item() == 2.0


def test_a_reward_model_that_diverged_at_its_last_step_is_refused(capsys):
    scores = [[0.1, float("nan")]]
    said = refused(capsys, report.make_report, TrainConfig(), "rankings", [], scores, [], [])
    assert "not finite" in said


def example(target, completions=("a", "b")):
    return Example([("user", "q")], "f:1", list(completions), target, "")


def test_a_share_of_nothing_is_none_and_every_share_has_its_count(capsys):
    """0.000 would be a reward model that is always wrong."""
    ties, pair = example([1, 1]), example([2, 1])
    cfg = TrainConfig()
    cfg.data = ["f"]
    make = lambda kind, examples, scores: report.make_report(cfg, kind, examples, scores, [], [])
    found = make("rankings", [ties], [[0.1, 0.2]])
    assert found["accuracy"] is None and found["counts"] == {"accuracy": 0}
    found = make("rankings", [ties, pair, pair], [[0.1, 0.2], [1, 2], [2, 1]])
    assert found["accuracy"] == 0.5 and found["counts"] == {"accuracy": 2}
    alike = [example([0.5], "a")] * 3
    assert make("ratings", alike, [[1.0], [2.0], [3.0]])["accuracy"] is None
    rated = [example([x], "a") for x in (0.5, 0.5, 1.5)]
    assert make("ratings", rated, [[1.0], [2.0], [3.0]])["counts"] == {"accuracy": 2}
    found = make("thumbs", [example([1.0], "a")], [[0.3]])
    assert found["counts"] == {"accuracy": 1}
    report.print_report(found | {"score_mean": 0.5, "score_sd": 2.0, "score_unit": "some texts"})
    said = capsys.readouterr().out
    assert (
        "1.000 [0.171, 1.000] of 1 labels" in said
        and "mean 0.500, sd 2.000" in said
        and "some texts" in said
    )
    found |= {"accuracy": None, "counts": {"accuracy": 0}}
    report.print_report(found | {"score_mean": 0.5, "score_sd": 2.0, "score_unit": "some texts"})
    assert "- of 0 labels" in capsys.readouterr().out


def test_accuracy_is_that_of_training_a_mean_over_prompts_in_which_a_tie_is_half():
    """Over pairs, with ties wrong, the same scores would be right on 6 of 7."""
    examples = [example([1, 2]), example([4, 3, 2, 1], "abcd")]
    scores = [[0.5, 0.5], [1.0, 2.0, 3.0, 4.0]]
    assert report.accuracy_over("rankings", examples, scores) == (0.75, 7)
    padded = torch.tensor([[0.5, 0.5, 0, 0], scores[1]]), torch.tensor([[1, 2, 0, 0], [4, 3, 2, 1]])
    assert f.ranking_accuracy(*padded)[0].item() == 0.75


def of_prompts(shares, K=1):
    """(examples, scores) of comparisons: prompt i has K, and this share is ordered right."""
    rows = [(f"q{i}", k < round(share * K)) for i, share in enumerate(shares) for k in range(K)]
    pair = lambda q: Example([("user", q)], "f:1", ["a", "b"], [1, 2], "")
    return [pair(q) for q, _ in rows], [[1.0, 0.0] if right else [0.0, 1.0] for _, right in rows]


def test_an_accuracy_has_the_interval_of_agresti_and_coull_and_one_prompt_is_no_certainty():
    for n_right, n in ((1, 1), (0, 1), (8, 8), (5, 20), (300, 400)):
        low, high = report.interval_of("rankings", *of_prompts([i < n_right for i in range(n)]))
        p = (n_right + 2) / (n + 4)
        half = 1.96 * math.sqrt(p * (1 - p) / (n + 4))
        assert (low, high) == pytest.approx((max(p - half, 0), min(p + half, 1)), abs=1e-9)
    assert report.interval_of("rankings", [example([1, 1])], [[0.0, 1.0]]) is None


def test_many_judgements_of_one_prompt_tell_little_more_than_one():
    once = report.interval_of("rankings", *of_prompts([1, 0, 1, 1] * 10))
    often = report.interval_of("rankings", *of_prompts([1, 0, 1, 1] * 10, K=9))
    assert often == pytest.approx(once, abs=1e-9)
    alike = report.interval_of("rankings", *of_prompts([0.75] * 40, K=4))
    assert alike[1] - alike[0] < once[1] - once[0]  # no prompt differs from another


@pytest.mark.parametrize("kind", ["rankings", "thumbs", "ratings"])
def test_the_interval_covers_what_it_is_of(kind):
    """All but 22 times in 300 at most: 5 % are 15, sd 3.8; the ratings' is wider."""
    rng, missed = random.Random(1), 0
    for _ in range(300):
        if kind == "ratings":  # score = rating + noise of the same sd: right 3 times in 4
            values = [rng.gauss(0, 1) for _ in range(30)]
            examples = [replace(example([x], "a"), messages=[("user", str(x))]) for x in values]
            scores = [[x + rng.gauss(0, 1)] for x in values]
        elif kind == "thumbs":
            labels = [float(rng.random() < 0.5) for _ in range(30)]
            examples = [replace(example([y], "a"), source=str(i)) for i, y in enumerate(labels)]
            examples = [replace(e, messages=[("user", e.source)]) for e in examples]
            scores = [[(2 * y - 1) * (1 if rng.random() < 0.75 else -1)] for y in labels]
        else:
            examples, scores = of_prompts([rng.random() < 0.75 for _ in range(30)])
        low, high = report.interval_of(kind, examples, scores)
        missed += not low <= 0.75 <= high
    assert missed <= 22, missed


def test_the_report_of_a_run_has_the_accuracy_that_its_best_checkpoint_was_logged_with(tmp_path):
    torch.manual_seed(1)
    words = [["aa", "b", "ccc", "dd"], ["b", "aa"], ["e", "ff", "g"]]
    records = [
        {"prompt": f"q{i}", "completions": words[i % 3], "ranks": [1, 2, 2, 3][: len(words[i % 3])]}
        for i in range(60)
    ]
    base = train(tmp_path, make_gpt(), "base", details={"chat": False})
    flags = {"max_steps": 4, "device": "cpu", "dtype": "float32", "out_dir": str(tmp_path / "rm")}
    flags |= {"eval_every": 1, "save_every": 1, "batch_size": 3}
    data = write_records(tmp_path / "data.jsonl", records)
    found = train_rm.main(train_rm.Config(data=[data], init=str(base), **flags))
    best = int((tmp_path / "rm/best").read_text().removeprefix("step_"))
    rows = list(csv.DictReader((tmp_path / "rm/metrics.csv").open()))
    assert float(rows[best]["val_accuracy"]) == pytest.approx(found["accuracy"], abs=1e-5)
    assert 0 < found["accuracy"] < 1


def test_scores_without_spread_keep_their_unit(capsys):
    assert train_rm.scale_of([[0.25], [0.25]]) == {"score_mean": 0.25, "score_sd": 1.0}
    assert "2 texts" in capsys.readouterr().err
    assert train_rm.scale_of([[1.0, 3.0], [5.0]]) == {"score_mean": 3.0, "score_sd": 2.0}


def test_held_out_ties_give_no_accuracy_and_no_loss(tmp_path):
    """Where nothing that is held out can be judged, nothing is said of it, also to the doctor."""
    torch.manual_seed(1)
    pairs = [{"prompt": f"q{i}", "completions": ["aa", "b"], "ranks": [1, 2]} for i in range(8)]
    ties = [{"prompt": f"t{i}", "completions": ["a", "b"], "ranks": [1, 1]} for i in range(8)]
    data, val = (write_records(tmp_path / f"{x[0]['prompt']}.jsonl", x) for x in (pairs, ties))
    base = train(tmp_path, make_gpt(), "base", details={"chat": False})
    flags = {"max_steps": 2, "device": "cpu", "dtype": "float32", "out_dir": str(tmp_path / "rm")}
    cfg = train_rm.Config(data=[data], val_data=[val], init=str(base), **flags)
    assert train_rm.main(cfg)["accuracy"] is None
    rows = (tmp_path / "rm/metrics.csv").read_text()
    assert "val_" not in rows and "nan" not in rows
