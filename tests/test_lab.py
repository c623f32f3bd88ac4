"""The lab's sums, and that a row is made once and for its own flags alone."""

import itertools
import math
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ppo
from experiments import (
    algorithms,
    cures,
    instructgpt_figure1,
    lab,
    overoptimization,
    two_judges,
    what_matters,
)
from nanorlhf.config import Mistake
from nanorlhf.data import world
from nanorlhf.data.files import write_records
from nanorlhf.machine import durable
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.sampling import sample_responses
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import refused


def of(tmp_path, steps=24, columns="seed x"):
    cfg = overoptimization.Config(out=str(tmp_path), steps=steps)
    return lab.Lab(cfg, "trial", columns, "steps")


def counted(calls):
    def measure(of, seed):
        calls.append(seed)
        return [{"x": 10 * seed}, {"x": 10 * seed + 1}]

    return measure


def test_a_row_is_made_once_and_for_its_flags_and_source_alone(tmp_path, monkeypatch):
    calls, keys = [], [{"seed": 1}, {"seed": 2}]
    first = of(tmp_path).each(counted(calls), keys)
    assert [row["seed"] + row["x"] for row in first] == ["110", "111", "220", "221"]
    assert of(tmp_path).each(counted(calls), keys[::-1]) == first[2:] + first[:2]
    assert calls == [1, 2]
    of(tmp_path, steps=2).each(counted(calls), keys)
    assert calls == [1, 2, 1, 2]
    monkeypatch.setattr(lab, "source", lambda: "another")
    of(tmp_path).each(counted(calls), keys[:1])
    assert calls == [1, 2, 1, 2, 1]


def test_the_source_is_that_of_what_decides_a_number(tmp_path, monkeypatch):
    inside = "train_ppo.py nanorlhf/model.py nanorlhf/data/world.py nanorlhf/tools/evaluate.py"
    inside += " nanorlhf/judging.py experiments/train_rloo.py"
    outside = "nanorlhf/tools/chat.py nanorlhf/human/web.py experiments/lab.py tests/x.py"
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    outside += " train_mine.py experiments/train_mine.py experiments/peer_mine.py"  # a user's forks
    for name in f"{inside} {outside}".split():
        before, path = lab.source.__wrapped__(), tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1\n")
        assert (lab.source.__wrapped__() != before) == (name in inside.split()), name


@pytest.mark.slow
def test_the_source_has_every_fork_that_an_experiment_runs():
    deciding = {Path(pattern).stem for pattern in lab.DECIDING if "*" not in pattern}
    for path in (lab.ROOT / "experiments").glob("*.py"):
        words = set(re.findall(r"\b(?:train|peer)_\w+", path.read_text()))
        assert {w for w in words if list(lab.ROOT.glob(f"**/{w}.py"))} <= deciding, path
    assert all(list(lab.ROOT.glob(pattern)) for pattern in lab.DECIDING)


def test_each_row_is_said_with_how_many_and_how_long_there_are_to_come(tmp_path, capsys):
    mine = of(tmp_path)
    keys = [{"seed": seed} for seed in (4, 1, 3)]
    mine.each(counted([]), keys[:1])
    capsys.readouterr()
    mine.each(counted([]), keys)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{mine.path}: 2 of 3 are to be made ..."
    assert said[1:] == [
        "seed 1: done, 1 of 2 in 00:00, 00:00 left",
        "seed 3: done, 2 of 2 in 00:00, 00:00 left",
    ]
    mine.each(counted([]), keys)
    assert not capsys.readouterr().out


def test_a_long_run_says_that_it_begins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ppo, "main", lambda cfg: print("hello"))
    for _ in range(2):
        lab.quietly(train_ppo.Config(out_dir=str(tmp_path / "run")))
    assert capsys.readouterr().out == f"train_ppo into {tmp_path}/run ...\n"


def test_one_seed_has_no_interval():
    assert f"{lab.interval([1.234]):.2f}" == "1.23"
    assert f"{lab.interval([1.0, 3.0]):+.1f}" == "+2.0 +- 12.7"


def test_another_process_that_was_faster_keeps_its_row(tmp_path):
    mine = of(tmp_path)

    def measure(_, seed):
        of(tmp_path).each(counted([]), [{"seed": seed}])
        return [{"x": "late"}]

    assert [row["x"] for row in mine.each(measure, [{"seed": 1}])] == ["10", "11"]


def test_whoever_needs_the_same_run_waits_for_it(tmp_path):
    order = []

    def other():
        with lab.alone(tmp_path / "run"):
            order.append("other")

    thread = threading.Thread(target=other)
    with lab.alone(tmp_path / "run"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_a_full_disk_keeps_all_rows_of_a_key_or_none(tmp_path, monkeypatch, capsys):
    mine = of(tmp_path)
    before = mine.path.read_bytes()
    whole = type(mine.path).write_text

    def full(path, text, *more, **flags):
        whole(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(mine.path), "write_text", full)
    assert "No space" in refused(capsys, mine.each, counted([]), [{"seed": 1}])
    assert mine.path.read_bytes() == before


def test_seeds_are_needed_and_count_once(tmp_path):
    made = lambda **flags: lab.Lab(overoptimization.Config(**flags), "trial", "seed x", "")
    assert made(out=str(tmp_path), seeds=[1, 2, 1]).cfg.seeds == [1, 2]
    (tmp_path / "file").write_text("")
    for flags in ({"seeds": []}, {"kl_coefs": []}, {"out": str(tmp_path / "file")}):
        with pytest.raises(Mistake):
            made(**{"out": str(tmp_path)} | flags)


def inverse(of, seed):
    return [{"x": 1 // (2 - seed)}]


def test_what_is_done_stays_when_the_next_one_fails(tmp_path):
    with pytest.raises(ZeroDivisionError):
        of(tmp_path).each(inverse, [{"seed": 1}, {"seed": 2}])
    assert len(of(tmp_path).rows({"seed": 1})) == 1


def test_a_file_of_other_columns_is_not_written_to(tmp_path, capsys):
    of(tmp_path)
    assert "another version" in refused(capsys, of, tmp_path, columns="seed y")


@pytest.mark.slow
def test_several_processes_make_the_rows_of_one(tmp_path):
    alone, together = of(tmp_path / "alone"), of(tmp_path / "together")
    together.cfg.jobs = 2
    keys = [{"seed": seed} for seed in (0, 1, 3)]
    assert together.each(inverse, keys) == alone.each(inverse, keys)


def test_a_finished_run_is_run_again_only_with_other_flags_or_source(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(train_ppo, "main", lambda cfg: runs.append(print("hello")))
    cfg = train_ppo.Config(out_dir=str(tmp_path / "run"))
    for _ in range(2):
        assert lab.quietly(cfg) == cfg.out_dir
    assert len(runs) == 1 and (tmp_path / "run/printed.txt").read_text() == "hello\n"
    cfg.max_steps += 1
    lab.quietly(cfg)
    assert len(runs) == 2
    monkeypatch.setattr(lab, "source", lambda: "another")
    lab.quietly(cfg)
    assert len(runs) == 3


def test_a_run_is_made_again_where_what_it_reads_has_changed(tmp_path, monkeypatch):
    runs, data = [], tmp_path / "demos.jsonl"
    monkeypatch.setattr(train_ppo, "main", runs.append)
    start = tmp_path / "start"
    (start / "step_1").mkdir(parents=True)
    (start / "latest").write_text("step_1")
    cfg = train_ppo.Config(out_dir=str(tmp_path / "run"), data=[str(data)], init=str(start))
    for n, (prompt, weights) in enumerate(((1, b"a"), (2, b"a"), (2, b"b")), 1):
        data.write_text(f"{prompt}")
        (start / "step_1/weights.pt").write_bytes(weights)
        for _ in range(2):
            lab.quietly(cfg)
        assert len(runs) == n


def test_a_run_that_was_ended_is_not_finished_and_lets_another_process_in(tmp_path, monkeypatch):
    """It has written into the folder of one that was."""
    short, long = (train_ppo.Config(f"{tmp_path}/run", max_steps=n) for n in (8, 200))
    taken = "import sys; from nanorlhf.machine import durable; durable.lock(sys.argv[1])"

    def main(cfg):
        durable.lock(cfg.out_dir)
        if cfg is long:
            raise SystemExit(143)

    monkeypatch.setattr(train_ppo, "main", main)
    lab.quietly(short)
    with pytest.raises(SystemExit):
        lab.quietly(long)
    assert not (tmp_path / "run/finished").exists()
    subprocess.run([sys.executable, "-c", taken, short.out_dir], cwd=lab.ROOT, check=True)


def test_quick_leaves_what_was_typed_and_a_word_counts_once(tmp_path):
    cfg = cures.Config(str(tmp_path), [5, 6], quick=True, steps=3, only=["none", "none"])
    lab.Lab(cfg, "trial", "seed x", "")
    assert (cfg.seeds, cfg.steps, cfg.only, cfg.judged) == ([5, 6], 3, ["none"], 9)


def test_best_of_n_is_the_mean_over_all_subsets(monkeypatch):
    rng = random.Random(1)
    scores = {f"{p}{i}": rng.random() for p in "ab" for i in range(8)}
    golds = {text: rng.random() for text in scores}
    monkeypatch.setattr(lab, "load", lambda folder: (None, None))
    monkeypatch.setattr(lab, "generate", lambda model, tok, prompts, seed: list(scores))
    monkeypatch.setattr(lab, "score", lambda model, tok, prompts, texts: [scores[t] for t in texts])
    monkeypatch.setattr(lab.world, "gold", lambda prompt, text: golds[text])
    rows = lab.best_of_n("sft", "rm", "ab", 8, 1)
    assert [row["step"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        n, best = row["step"], []
        for texts in (list(scores)[:8], list(scores)[8:]):
            best += [max(s, key=scores.get) for s in itertools.combinations(texts, n)]
        assert row["proxy"] == pytest.approx(np.mean([scores[t] for t in best]))
        assert row["gold"] == pytest.approx(np.mean([golds[t] for t in best]))
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_the_interval_is_students():
    mean, half = lab.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(lab.interval([1.0])[1])
    for n, t in ((4, 3.18), (11, 2.228), (31, 2.042)):
        values = [float(i) for i in range(n)]
        assert lab.interval(values)[1] == pytest.approx(
            t * np.std(values, ddof=1) / n**0.5, rel=5e-3
        )


@pytest.mark.parametrize("is_rl", [False, True])
def test_the_papers_forms_are_found_again(is_rl):
    d = np.linspace(0, 5, 12)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.nan_to_num(d * (1.3 - 0.4 * (np.log(d) if is_rl else d)))
    a, b, fit = overoptimization.fitted(d, y, is_rl)
    assert (a, b, fit) == pytest.approx((1.3, 0.4, 1.0))


def test_the_verifier_wants_the_whole_answer_and_right_ones_are_liked():
    texts, records = ["abc", "abc ", "", "acb"], [{"prompt": "cab", "answer": "abc"}] * 4
    assert two_judges.right([""] * 4, texts, ["abc"] * 4) == [1.0, 0.0, 0.0, 0.0]
    liked = two_judges.liked(records, texts)
    assert [r["label"] for r in liked] == [True, False, False, False]
    assert [r["completion"] for r in liked] == texts and liked[0]["prompt"] == "cab"


def test_pass_at_k_is_that_of_answers_drawn_from_those_there_are():
    n = 2 * two_judges.KS[-1]
    records = [{"prompt": "cab", "answer": "abc"}, {"prompt": "fed", "answer": "def"}]
    texts = ["abc"] + ["def"] * (n - 1) + ["def"] * 2 + ["abc"] * (n - 2)
    said = lambda model, words: texts if [r["prompt"] for r in words][n - 1] == "cab" else []
    shares = two_judges.passes(said, "model", records)
    assert list(shares) == [f"pass_{k}" for k in (1, 2, 4, 8, 16, 32, 64)]
    one = np.array(two_judges.KS) / n  # where one is right, it is among k with this probability
    two = 1 - (1 - one) * (1 - np.array(two_judges.KS) / (n - 1))
    assert list(shares.values()) == pytest.approx(list((one + two) / 2))


def test_an_answer_is_judged_beside_sft_and_not_the_other_way_round(tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(decode="".join)
    model = lambda name: SimpleNamespace(name=name, config=SimpleNamespace(block_size=300))
    monkeypatch.setattr(lab, "load", lambda folder: (model(folder), tokenizer))
    said = lambda gpt, t, prompts, limit, seed: [list(gpt.name)] * len(prompts)  # its own name
    monkeypatch.setattr(lab, "sample_responses", said)
    monkeypatch.setattr(lab.world, "gold", lambda prompt, text: 1.0 + (text == "good"))
    preferred = lambda prompts, texts, others, panel, seed: (texts[0], others[0]) == ("good", "bad")
    monkeypatch.setattr(lab.judging, "preferred", preferred)
    kl = lambda policy, reference, *_: 3.0 if policy.name == "good" else -3.0
    monkeypatch.setattr(lab.judging, "mean_kl", kl)
    monkeypatch.setattr(lab.dialogue, "encode_prompt", lambda t, m: [1])
    worth = lab.judged("good", "bad", 1, 8)
    assert (worth["gold"], worth["win"], worth["kl"], worth["length"]) == (2.0, True, 3.0, 4)
    worth = lab.judged("bad", "good", 1, 8)
    assert (worth["gold"], worth["win"], worth["kl"], worth["length"]) == (1.0, False, -3.0, 3)


def test_what_is_judged_is_what_was_sampled(tmp_path, monkeypatch):
    """Also where it was cut, where its prompt was, and where its text has other tokens: a model of
    random weights says bytes that are no text."""
    torch.manual_seed(0)
    tokenizer, config = byte_tokenizer(), GPTConfig(262, 40, 1, 2, 16)
    models = {"a": GPT(config).eval(), "b": GPT(config).eval()}
    models["a"].wte.weight.data *= 3
    monkeypatch.setattr(lab, "load", lambda folder: (models[folder], tokenizer))
    worth = lab.judged("a", "b", 1, 6, limit=20)
    prompts = [tokenizer.encode(p) for p in world.prompts("held_out", 6, "judged/1")]
    prompts = [[tokenizer.user_id, *ids, tokenizer.assistant_id][-20:] for ids in prompts]
    ids = sample_responses(models["a"], tokenizer, prompts, 20, 1)
    assert [tokenizer.encode(tokenizer.decode(row)) for row in ids] != ids
    assert worth["length"] == sum(map(len, ids)) / 6 <= 20
    total = 0.0
    for p, row in zip(prompts, ids):
        tokens = torch.tensor([p + row])
        logp, ref = (models[x](tokens)[0, len(p) - 1 : -1].log_softmax(-1) for x in "ab")
        total += (logp.exp() * (logp - ref)).sum().item()
    assert worth["kl"] == pytest.approx(total / 6, rel=1e-4)
    assert lab.judged("b", "b", 1, 6, limit=20)["kl"] == 0


def test_a_curve_is_of_the_evaluations(tmp_path):
    header = "step,scores,eval_scores,eval_kl_exact,eval_gold"
    (tmp_path / "metrics.csv").write_text(f"{header}\n0,9,1,2,3\n1,9,,,\n2,9,4,5,6\n")
    first, last = lab.curve_of(tmp_path)
    assert first == {"step": "0", "kl": "2", "proxy": "1", "gold": "3"}
    assert last == {"step": "2", "kl": "5", "proxy": "4", "gold": "6"}


def test_curves_are_centred_and_over_the_root_of_kl():
    row = lambda s, k: {"seed": s, "by": "n", "kl": k, "proxy": s + k, "gold": 2 * s - k}
    rows = [{c: str(v) for c, v in row(s, k).items()} for s in (1, 2) for k in (0, 4, 9)]
    rows += [row | {"by": "ppo", "kl": "1"} for row in rows]
    cfg = overoptimization.Config(seeds=[1, 2])
    d, proxy, gold = overoptimization.curves(cfg, rows, by="n")
    assert d.tolist() == [[0, 2, 3]] * 2
    assert proxy.tolist() == [[0, 4, 9]] * 2 and gold.tolist() == [[0, -4, -9]] * 2


def test_figure_1_compares_the_right_models(tmp_path):
    cfg = instructgpt_figure1.Config(out=str(tmp_path), seeds=[1])
    prompts, rng = world.prompts("held_out", 60, 1), random.Random(1)
    good, poor = ("medium", "PPO"), ("large", "sft")
    for (size, model), care in ((good, world.GOOD), (poor, world.POOR)):
        records = [{"prompt": p, "response": world.demonstrate(rng, p, care)} for p in prompts]
        write_records(f"{lab.folder_of(cfg, 1, size)}/ladder/{model}.jsonl", records)
    win = instructgpt_figure1.win
    assert win(cfg, 1, good, poor) > 0.8 and win(cfg, 1, poor, good) < 0.2


def test_the_number_of_examples_is_the_one_that_labelers_like(monkeypatch):
    said = SimpleNamespace(decode=lambda ids: str(ids[0]))
    monkeypatch.setattr(instructgpt_figure1, "load", lambda folder: (None, said))
    judging = instructgpt_figure1.judging
    monkeypatch.setattr(judging, "few_shot", lambda rng, p, n: n)
    complete = lambda gpt, tokenizer, pages, n, seed, progress: [[page] for page in pages]
    monkeypatch.setattr(judging, "complete", complete)
    liking = {"0": 0.5, "1": 0.6, "2": 0.9, "3": 0.7}
    by = lambda prompts, texts, others, panel, seed: liking[texts[0]] - (others[0] != "0")
    monkeypatch.setattr(judging, "preferred", by)
    assert instructgpt_figure1.best_shots(instructgpt_figure1.Config(), "gpt", 1) == 2


def test_the_setting_that_labelers_like_best_is_reported(tmp_path, monkeypatch, capsys):
    wins = {arm: 0.1 * (i % 4) + 0.5 for i, arm in enumerate(algorithms.TRIALS)}
    asked = []

    def trained(lab, seed, algorithm, setting):
        asked.append((seed, algorithm, setting))
        win = wins[algorithm, setting]
        return [{"win": win, "gold": -win, "kl": 1.0, "minutes": 1.0, "samples": 1}]

    monkeypatch.setattr(algorithms, "trained", trained)
    monkeypatch.setattr(algorithms, "best_of_each_n", lambda lab, seed, algorithm: [])
    monkeypatch.setattr(algorithms, "draw", lambda *_: None)
    algorithms.main(algorithms.Config(out=str(tmp_path), seeds=[1], tuning_seeds=[8, 9]))
    reported = [(name, setting) for seed, name, setting in asked if seed == 1]
    names = [name for name in algorithms.ALGORITHMS if name != "TRL's PPO"]
    assert reported == [max((a for a in wins if a[0] == n), key=wins.get) for n in names]


def test_every_trial_has_flags_that_its_script_knows(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(algorithms, "models_of", lambda cfg, seed: ("gpt", "sft", "rm"))
    monkeypatch.setattr(algorithms, "quietly", lambda cfg: made.append(cfg) or "x")
    monkeypatch.setattr(algorithms, "judged", lambda *_: {"gold": 1.0})
    cfg = algorithms.Config(out=str(tmp_path), steps=7)
    mine = lab.Lab(cfg, "trial", "seed x", "")
    for name, setting in algorithms.TRIALS:
        (row,) = algorithms.trained(mine, 1, name, setting)
        assert row["samples"] == {"DPO": 0, "RFT": 8800}.get(name, 7 * 128)
    assert len({run.out_dir for run in made}) == len(algorithms.TRIALS)
    assert all(run.init == "sft" and run.seed == 1 for run in made)


def test_a_detail_is_what_the_last_policy_gains_over_the_unchanged_one(tmp_path, capsys):
    cfg = what_matters.Config(out=str(tmp_path), seeds=[1, 2])
    row = lambda name, s: {
        "changed": name,
        "seed": str(s),
        "kl": "2",
        "gold": s + (name == "1 epoch"),
    }
    rows = [row(name, s) for name in what_matters.DETAILS for s in (1, 2)]
    what_matters.draw(cfg, lab.Lab(cfg, "what_matters", "seed x", ""), rows)
    assert (tmp_path / "what_matters/what_matters.png").exists()
    said = capsys.readouterr().out
    assert "1 epoch                            gold +1.000 +- 0.000" in said
    assert "4 epochs                           gold +0.000 +- 0.000" in said


def test_the_last_policy_of_a_run_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(what_matters, "models_of", lambda cfg, seed: ("gpt", "sft", "rm"))
    monkeypatch.setattr(lab, "quietly", lambda cfg, estimate: cfg)
    monkeypatch.setattr(what_matters, "curve_of", lambda cfg: [{"gold": 0}, {"gold": cfg.lam}])
    mine = of(tmp_path)
    assert what_matters.ppo(mine, 1, "lambda 1") == [{"gold": 1.0}]
    assert what_matters.ppo(mine, 1, "nothing") == [{"gold": 0.95}]


# ---- what_matters ------------------------------------------------------------------------------


def test_the_swapped_details_are_what_they_are_called():
    """By hand: rewards with k3, and advantages that are not whitened."""
    cfg = train_ppo.Config(gamma=1.0, lam=1.0)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.0, 0.0]]).double()
    ref = torch.tensor([[-1.5, -1.0, -0.5], [-0.6, -2.0, 0.0]]).double()
    rollout = {"response_mask": mask, "logprobs": logprobs, "ref_logprobs": ref}
    rollout["values"] = torch.zeros(2, 3).double()
    scores = torch.tensor([2.0, -1.0]).double()
    found = what_matters.with_k3(cfg, rollout, scores, 0.5)
    k1 = logprobs - ref
    k3 = (torch.exp(-k1) - 1 + k1) * mask
    wanted = -0.5 * k3
    wanted[0, 2] += 2.0
    wanted[1, 1] -= 1.0
    torch.testing.assert_close(found["rewards"], wanted)
    plain = train_ppo.ppo_advantages(cfg, rollout, scores, 0.5)
    raw = what_matters.unwhitened(cfg, rollout, scores, 0.5)["advantages"]
    torch.testing.assert_close(raw, (plain["rewards"].flip(1).cumsum(1).flip(1)) * mask)
    times = what_matters.scaled(3.0, cfg, rollout, scores, 0.5)["rewards"] - plain["rewards"]
    torch.testing.assert_close(times.sum(1), 2 * scores)


def test_every_flag_of_every_detail_exists():
    for flags, _ in what_matters.DETAILS.values():
        train_ppo.Config(**flags)
    assert what_matters.DETAILS["nothing"] == ({}, train_ppo.ppo_advantages)
