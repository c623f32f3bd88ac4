"""inspect: the page shows the numbers that the run's own evaluation has."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import train_ppo
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import Tokenizer
from nanorlhf.tools import inspect
from tests.helpers import refused
from tests.sweeps import accidents


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with small runs of the four stages."""
    folder = tmp_path_factory.mktemp("out")
    for stage, cfg in accidents.configs(folder, folder).items():
        accidents.STAGES[stage].main(cfg)
    return folder


def page_of(run, **flags):
    inspect.main(inspect.Config(str(run), device="cpu", dtype="float32", **flags))
    page = Path(flags.get("to") or run, "" if "to" in flags else "inspect.html").read_text()
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_the_page_has_what_the_last_evaluation_of_the_run_logged(out):
    flags = checkpoint.load(out / "ppo", "lm", "latest").config["flags"]
    data = page_of(out / "ppo", prompts=flags["eval_prompts"])
    row = list(csv.DictReader((out / "ppo/metrics.csv").open()))[-1]
    n = len(data["answers"])
    mean = lambda f: sum(map(f, data["answers"])) / n
    assert mean(lambda a: a["score"]) == pytest.approx(float(row["eval_scores"]), abs=2e-3)
    exact = mean(lambda a: sum(a["numbers"]["kl_exact"]))
    assert exact == pytest.approx(float(row["eval_kl_exact"]), abs=2e-2) and exact > 0
    assert mean(lambda a: len(a["tokens"])) == pytest.approx(float(row["eval_length"]))
    assert mean(lambda a: a["ended"]) == pytest.approx(float(row["eval_eos_rate"]))
    assert mean(lambda a: a["gold"]) == pytest.approx(float(row["eval_gold"]), abs=2e-3)


def test_each_tokens_numbers_are_those_of_the_maths(out, tmp_path):
    to = tmp_path / "page.html"
    data = page_of(out / "ppo", prompts=4, to=str(to))
    coef = data["about"]["kl_coef"]
    assert set(data["answers"][0]["numbers"]) == set(inspect.QUANTITIES) and coef > 0
    widths = {len(a["tokens"]) + a["masked"] for a in data["answers"]}
    assert len(widths) == 1
    for answer in data["answers"]:
        x = answer["numbers"]
        assert {len(values) for values in x.values()} == {len(answer["tokens"])}
        for i, kl in enumerate(x["kl"]):
            assert kl == pytest.approx(x["logprobs"][i] - x["ref_logprobs"][i], abs=2e-4)
            score = answer["score"] if i == len(x["kl"]) - 1 else 0
            assert x["rewards"][i] == pytest.approx(score - coef * kl, abs=2e-3)


def test_a_fork_without_this_estimate_shows_what_does_not_depend_on_it(out, tmp_path):
    cfg = accidents.configs(out, out)["ppo"]
    folder = str(tmp_path / "rloo")
    train_ppo.main(replace(cfg, out_dir=folder, critic="none", max_steps=1), stage="rloo")
    data = page_of(folder, prompts=3)
    assert {"kl", "kl_exact", "logprobs", "ref_logprobs", "entropy"} == set(
        data["answers"][0]["numbers"]
    )


def test_no_text_can_end_the_script_that_holds_it(out, monkeypatch):
    monkeypatch.setattr(Tokenizer, "token_text", lambda tokenizer, token: "</script><!--")
    data = page_of(out / "ppo", prompts=2)
    assert data["answers"][0]["tokens"][0] == "</script><!--"
    assert (out / "ppo/inspect.html").read_text().count("</script>") == 2  # the page's own


@pytest.mark.parametrize("stage", ["gpt", "sft", "rm"])
def test_what_is_no_ppo_run_is_refused(out, capsys, stage):
    said = refused(capsys, inspect.main, inspect.Config(str(out / stage), device="cpu"))
    assert "train_ppo.py" in said or "a language model" in said
