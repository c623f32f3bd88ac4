"""The lab's sums, and that a row is made once and for its own flags alone."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from experiments import kinds_of_feedback, lab, overoptimization, two_judges, value_ceiling
from nanorlhf.config import Mistake
from nanorlhf.data import world


def of(tmp_path, seconds=1.0, columns="seed x"):
    cfg = kinds_of_feedback.Config(out=str(tmp_path), hours=seconds)
    return lab.Lab(cfg, "trial", columns, "hours")


def counted(calls):
    def measure(of, seed):
        calls.append(seed)
        return [{"x": 10 * seed}, {"x": 10 * seed + 1}]

    return measure


def test_a_row_is_made_once_and_for_its_flags_and_source_alone(tmp_path, monkeypatch):
    calls, keys = [], [{"seed": 1}, {"seed": 2}]
    first = of(tmp_path).each(counted(calls), keys)
    assert [(row["seed"], row["x"]) for row in first] == [
        ("1", "10"),
        ("1", "11"),
        ("2", "20"),
        ("2", "21"),
    ]
    assert of(tmp_path).each(counted(calls), keys[::-1]) == first[2:] + first[:2]
    assert calls == [1, 2]
    of(tmp_path, seconds=2.0).each(counted(calls), keys)
    assert calls == [1, 2, 1, 2]
    monkeypatch.setattr(lab, "source", lambda: "another")
    of(tmp_path).each(counted(calls), keys[:1])
    assert calls == [1, 2, 1, 2, 1]


def test_what_is_done_stays_when_the_next_one_fails(tmp_path):
    def measure(of, seed):
        return [{"x": 1 // (2 - seed)}]

    with pytest.raises(ZeroDivisionError):
        of(tmp_path).each(measure, [{"seed": 1}, {"seed": 2}])
    assert len(of(tmp_path).rows({"seed": 1})) == 1


def test_a_file_of_other_columns_is_not_written_to(tmp_path, capsys):
    of(tmp_path)
    with pytest.raises(Mistake):
        of(tmp_path, columns="seed y")
    assert "another version" in capsys.readouterr().err


def doubled(of, seed):
    return [{"x": 2 * seed}]


def test_several_processes_make_the_rows_of_one(tmp_path):
    alone, together = of(tmp_path / "alone"), of(tmp_path / "together")
    together.cfg.jobs = 2
    keys = [{"seed": seed} for seed in range(5)]
    assert together.each(doubled, keys) == alone.each(doubled, keys)


def test_a_finished_run_is_not_run_again_unless_the_source_changes(tmp_path, monkeypatch):
    runs = []

    class stage:
        @staticmethod
        def main(cfg):
            print("hello")
            runs.append(cfg.out_dir)

    cfg = kinds_of_feedback.train_ppo.Config(out_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for _ in range(2):
        assert lab.quietly(stage, cfg) == cfg.out_dir
    assert len(runs) == 1 and (tmp_path / "run/printed.txt").read_text() == "hello\n"
    monkeypatch.setattr(lab, "source", lambda: "another")
    lab.quietly(stage, cfg)
    assert len(runs) == 2


def test_best_of_n_is_the_mean_over_all_subsets(monkeypatch):
    rng = random.Random(1)
    scores = {f"{p}{i}": rng.random() for p in "ab" for i in range(8)}
    golds = {text: rng.random() for text in scores}
    monkeypatch.setattr(lab, "load", lambda folder: (None, None))
    monkeypatch.setattr(lab, "score", lambda model, tok, prompts, texts: [scores[t] for t in texts])
    monkeypatch.setattr(lab.world, "gold", lambda prompt, text: golds[text])
    answers = [{"prompt": p, "responses": [f"{p}{i}" for i in range(8)]} for p in "ab"]
    found = lab.best_of_n("rm", answers)
    assert [row["step"] for row in found] == [1, 2, 4, 8]
    for row in found:
        n, best = row["step"], []
        for answer in answers:
            best += [max(s, key=scores.get) for s in itertools.combinations(answer["responses"], n)]
        assert row["proxy"] == pytest.approx(np.mean([scores[t] for t in best]))
        assert row["gold"] == pytest.approx(np.mean([golds[t] for t in best]))
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_labelers_prefer_the_better_text_and_equal_ones_by_half():
    prompts = world.prompts("held_out", 200, 1)
    rng = random.Random(2)
    good = [world.demonstrate(rng, prompt, world.GOOD) for prompt in prompts]
    poor = [world.demonstrate(rng, prompt, world.POOR) for prompt in prompts]
    win = lab.preferred(prompts, good, poor, world.TRAIN_LABELERS, 1)
    assert win > 0.8
    assert lab.preferred(prompts, poor, good, world.TRAIN_LABELERS, 1) < 0.2
    assert lab.preferred(prompts, good, good, world.TRAIN_LABELERS, 1) == 0.5


def test_the_interval_is_students():
    mean, half = lab.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(lab.interval([1.0])[1])


@pytest.mark.parametrize("is_rl", [False, True])
def test_the_papers_forms_are_found_again(is_rl):
    d = np.linspace(0, 5, 12)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.nan_to_num(d * (1.3 - 0.4 * (np.log(d) if is_rl else d)))
    a, b, fit = overoptimization.fitted(d, y, is_rl)
    assert (a, b, fit) == pytest.approx((1.3, 0.4, 1.0))


def test_the_ceiling_is_what_is_linear_in_the_states_of_other_responses():
    torch.manual_seed(1)
    hidden, mask = torch.randn(400, 8, 5), torch.rand(400, 8) < 0.9
    mask[:, 0] = True
    mask = mask.cummin(1).values  # responses have no holes
    noise, w = torch.randn(400, 8), torch.randn(5)
    returns = (hidden @ w + w.norm() * noise).masked_fill(~mask, 1e6)
    found = dict(value_ceiling.shares(hidden, returns, mask))
    assert found["all"] == pytest.approx(0.5, abs=0.06)
    assert all(0.3 < share < 0.7 for share in found.values()) and len(found) == 5
    shuffled = returns[:, :1].expand(-1, 8)[torch.randperm(400)].masked_fill(~mask, 1e6)
    assert dict(value_ceiling.shares(hidden, shuffled, mask))["all"] < 0.05


def test_the_same_hours_buy_fewer_of_what_takes_longer():
    cfg = kinds_of_feedback.Config(hours=1.0)
    n = {kind: kinds_of_feedback.prompts_of(cfg, kind) for kind in kinds_of_feedback.JUDGED}
    assert n == {"comparisons": 90, "rankings": 40, "ratings": 90, "thumbs": 150}
    cfg.seconds = ["comparisons=20"]
    with pytest.raises(Mistake):
        kinds_of_feedback.prompts_of(cfg, "thumbs")


def test_the_verifier_wants_the_whole_answer():
    said, known = ["abc", "abc ", "", "acb"], ["abc"] * 4
    assert two_judges.right([""] * 4, said, known) == [1.0, 0.0, 0.0, 0.0]
