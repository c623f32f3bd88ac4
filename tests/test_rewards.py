"""judge_file.py and mixing.py: a reward function gets what its parameters' names say; several
judges make one score; and what a judge leaves out teaches nothing."""

import math
import time

import pytest
import torch

import train_ppo
from nanorlhf import judge_file, mixing
from nanorlhf.config import TrainConfig, from_cli
from nanorlhf.data.dialogue import Prompt
from nanorlhf.run import checkpoint, session
from nanorlhf.scoring import make_critic, make_gold
from tests.helpers import refused
from tests.test_ppo_loop import config, logged, random_gpt
from tests.test_ppo_loop import start as start  # noqa: PLC0414, a fixture

ASKED = [Prompt([1], f"p{i}", f"f:{i}", {"prompt": f"p{i}", "answer": str(i)}) for i in range(3)]
TEXTS = ["r0", "r1", "r2"]
SEEN = """
def f({}):
    seen = {{k: v for k, v in locals().items() if isinstance(v, (list, dict, float))}}
    import tests.test_rewards as t
    t.GOT.append(seen)
    return [1.0] * 3
"""
GOT = []
P, R, A = ["p0", "p1", "p2"], TEXTS, ["0", "1", "2"]


def judged(tmp_path, parameters, prompts=ASKED):
    path = tmp_path / f"f{len(list(tmp_path.iterdir()))}.py"
    path.write_text(SEEN.format(parameters))
    GOT.clear()
    judge_file.load_judge(f"{path}:f", "--reward", prompts)(prompts, TEXTS)
    return GOT[0]


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ("prompts, responses", {"prompts": P, "responses": R}),
        ("responses, prompts", {"prompts": P, "responses": R}),
        ("prompts, responses, answer", {"prompts": P, "responses": R, "answer": A}),
        (
            "completions, answer, **kw",
            {"completions": R, "answer": A, "kw": {"prompts": P, "prompt": P}},
        ),
        ("completions, **kw", {"completions": R, "kw": {"prompts": P, "prompt": P, "answer": A}}),
        ("answer, completions", {"completions": R, "answer": A}),
        ("responses", {"responses": R}),
        ("p, r", {"p": P, "r": R}),
        ("p, r, /, answer", {"p": P, "r": R, "answer": A}),
        ("p, r, scale=0.5", {"p": P, "r": R, "scale": 0.5}),
        ("texts, responses", {"texts": P, "responses": R}),
        ("texts, completions, answer", {"texts": P, "completions": R, "answer": A}),
        ("prompt, responses, *, answer=None", {"prompt": P, "responses": R, "answer": A}),
        (
            "prompts, **kw",
            {"prompts": P, "kw": {"responses": R, "completions": R, "prompt": P, "answer": A}},
        ),
    ],
)
def test_parameters_are_filled_by_name(tmp_path, parameters, wanted):
    assert judged(tmp_path, parameters) == wanted


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("completion, answer", "a column 'completion'"),
        ("texts, **kw", "a column 'texts'"),
        ("texts", "a column 'texts'"),
        ("prompts, texts", "a column 'texts'"),
        ("prompt, response", "a column 'response'"),
        ("texts, answer, responses", "a column 'texts'"),
        ("prompts, answer", "reads no response"),
        ("", "reads no response"),
        ("*texts", "a column 'texts'"),
        ("prompts, responses, completions", "a column 'completions'"),
    ],
)
def test_what_is_unclear_is_refused_with_the_names_that_there_are(
    tmp_path, capsys, parameters, said
):
    line = refused(capsys, judged, tmp_path, parameters)
    assert said in line and "prompts, responses (or completions)" in line and "'answer'" in line


def test_a_column_called_completions_is_one_beside_responses(tmp_path):
    rows = [Prompt([1], "p", "f:1", {"completions": [i]}) for i in range(3)]
    assert judged(tmp_path, "responses, completions", rows)["completions"] == [[0], [1], [2]]
    assert judged(tmp_path, "completions", rows) == {"completions": R}


def test_none_leaves_a_response_out_and_nan_is_a_mistake(tmp_path, capsys):
    path = tmp_path / "f.py"
    path.write_text(
        "def f(responses): return [None, 2, None]\n"
        "def g(responses): return [None, float('nan'), 1]\n"
        "def none(responses): return [None] * len(responses)\n"
    )
    scores = judge_file.load_judge(f"{path}:f", "--gold", ASKED)(ASKED, TEXTS)
    assert torch.equal(scores.isnan(), torch.tensor([True, False, True])) and scores[1] == 2
    judge = judge_file.load_judge(f"{path}:g", "--gold", ASKED)
    assert "1 of them not finite; None leaves" in refused(capsys, judge, ASKED, TEXTS)
    cfg = train_ppo.Config(gold=f"{path}:f")
    assert make_gold(cfg, ASKED)(ASKED, TEXTS) == 2


SLOW = """
import time
def sleeps(responses): time.sleep(60)
def retries(responses):
    while True:
        try:
            time.sleep(60)
        except BaseException:
            if responses.pop() == "r1":
                raise
def fine(responses): return [1.0] * len(responses)
"""


@pytest.mark.parametrize("name", ["sleeps", "retries"])
def test_a_judge_that_hangs_is_named(tmp_path, capsys, name):
    (tmp_path / "slow.py").write_text(SLOW)
    judge = judge_file.load_judge(f"{tmp_path}/slow.py:{name}", "--reward", ASKED, 0.2)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        judge(ASKED, list(TEXTS))
    assert stop.value.code == 2 and time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert f"slow.py:{name} has not returned after 0.2 seconds (--reward_timeout)" in said
    fine = judge_file.load_judge(f"{tmp_path}/slow.py:fine", "--reward", ASKED, 0.2)
    assert fine(ASKED, TEXTS).tolist() == [1, 1, 1]
    time.sleep(0.3)  # the alarm is off


# ---- several judges ----------------------------------------------------------------------------


def test_scores_are_combined_as_the_formulas_say():
    torch.manual_seed(0)
    scores = torch.randn(3, 50).double()
    scores[0, 0] = scores[1, 0] = scores[2, 1] = scores[:, 2] = math.nan
    for i, column in enumerate(scores.T.tolist()):
        s = [x for x in column if x == x]
        mean = sum(s) / len(s) if s else math.nan
        wanted = {
            "sum": sum(s) if s else math.nan,
            "min": min(s) if s else math.nan,
            "uncertain": mean - 0.5 * sum((x - mean) ** 2 for x in s) / max(len(s), 1),
        }
        for mix, x in wanted.items():
            assert mixing.combined(scores, mix)[i].item() == pytest.approx(x, nan_ok=True)


def test_judges_that_do_not_fit_each_other_are_refused(capsys):
    flags = {
        "name each judge once": {"reward": ["a", "a"]},
        "name each": {"reward": []},
        "3 for 2 judges": {"reward": ["a", "b"], "reward_weights": [1.0, 2.0, 3.0]},
        "min is for several": {"reward_mix": "min"},
        "uncertain is for several": {"reward_mix": "uncertain"},
        "for no function": {"reward": ["a", "x.py:f"], "reward_mix": "uncertain"},
    }
    for said, given in flags.items():
        assert said in refused(capsys, mixing.check, train_ppo.Config(**given))
    words = "--reward out/rm my.py:short --reward_weights 1 -0.5 --reward_mix min".split()
    cfg = from_cli(train_ppo.Config, words)
    assert (cfg.reward, cfg.reward_weights) == (["out/rm", "my.py:short"], [1.0, -0.5])
    mixing.check(cfg)
    assert mixing.names_of(cfg.reward) == ["rm", "short"]
    assert mixing.names_of(["a/rm", "b/rm"]) == ["a/rm", "b/rm"]


def test_a_flag_of_several_words_may_be_given_one_in_python():
    assert train_ppo.Config(reward="out/rm", data="x.jsonl").reward == ["out/rm"]
    assert TrainConfig(columns="a=b").columns == ["a=b"] and TrainConfig().out_dir == "out/stage"


JUDGES = """
def length(responses): return [len(r) / 5 for r in responses]
def short(prompts, responses): return [x and -x / 2 for x in even(prompts, responses)]
def even(prompts, responses):
    return [None if len(p) % 2 else len(r) / 5 for p, r in zip(prompts, responses)]
def none(responses): return [None] * len(responses)
def yardstick(prompts, responses): return [1000 if len(p) % 2 else 1 for p in prompts]
"""


@pytest.fixture
def judges(start, tmp_path):
    (tmp_path / "j.py").write_text(JUDGES)
    return lambda *names: [f"{tmp_path}/j.py:{name}" for name in names]


def test_each_judge_is_logged_by_its_name_and_the_score_is_their_weighted_sum(
    start, judges, tmp_path
):
    flags = {"reward": [*judges("length"), f"{start}/rm"], "reward_weights": [2.0, -0.5]}
    train_ppo.main(config(start, tmp_path / "a", **flags, score_unended=True, eval_every=1))
    rows = logged(tmp_path / "a")
    for row in rows[:-1]:
        wanted = 2 * row["score_length"] - 0.5 * row["score_rm"]
        assert row["scores"] == pytest.approx(wanted, abs=1e-4) and row["left_out"] == 0
        wanted = 2 * row["eval_score_length"] - 0.5 * row["eval_score_rm"]
        assert row["eval_scores"] == pytest.approx(wanted, abs=1e-4)
    paths = session.fingerprints(config(start, tmp_path, reward=[f"{start}/rm", *judges("none")]))
    assert {"--reward", f"--reward {judges('none')[0]}"} <= paths.keys()


def test_what_all_judges_leave_out_takes_no_part_in_the_update(
    start, judges, tmp_path, monkeypatch
):
    """Prompts of odd length are left out: no minibatch has one, and no metric counts it."""
    seen, minibatches = [], train_ppo.minibatches

    def spy(rollout, cfg, step):
        for key, parts in minibatches(rollout, cfg, step):
            seen.extend(n for rows in parts for n in rows["weight"].tolist())
            yield key, parts

    monkeypatch.setattr(train_ppo, "minibatches", spy)
    cfg = config(start, tmp_path / "a", reward=judges("even", "short"), max_steps=1, ppo_epochs=1)
    cfg.score_unended, (cfg.gold,) = True, judges("yardstick")
    train_ppo.main(cfg)
    (row, _) = logged(tmp_path / "a")
    assert row["gold"] == 1  # of what is judged
    assert 0 < row["left_out"] < 12 == row["left_out"] + len(seen) and min(seen) > 0
    assert row["length"] == pytest.approx(sum(seen) / len(seen))
    assert row["scores"] == pytest.approx(row["score_even"] + row["score_short"], abs=1e-5)
    assert all(math.isfinite(x) for x in row.values())


def test_a_rollout_that_every_judge_leaves_out_is_refused(start, judges, tmp_path, capsys):
    cfg = config(start, tmp_path / "a", reward=judges("none"))
    with pytest.raises(SystemExit):
        train_ppo.main(cfg)
    assert "left out all" in capsys.readouterr().err


def test_a_separate_critic_starts_from_the_first_reward_model(start, judges):
    cfg = config(start, "x", reward=[*judges("length"), f"{start}/rm"], critic="separate")
    critic = make_critic(cfg, random_gpt())
    wanted, _ = checkpoint.load_model(f"{start}/rm", "reward")
    for name, w in wanted.state_dict().items():
        assert torch.equal(critic.state_dict()[name], w)
