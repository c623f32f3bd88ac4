"""experiments/: forks that hand something of their own to the stages, and become rungs."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import train_dpo, train_lora, train_rft, train_rloo
from nanorlhf import functional as f
from nanorlhf import load
from nanorlhf.config import from_cli
from nanorlhf.data.batches import feedback_batch
from nanorlhf.data.dialogue import encode_feedback
from nanorlhf.data.examples import Example
from nanorlhf.loading import load_gpt
from nanorlhf.model import GPT, GPTConfig, frozen_reference
from nanorlhf.run import checkpoint
from nanorlhf.tokenizer import byte_tokenizer
from nanorlhf.tools import doctor, evaluate
from tests.helpers import refused, words
from tests.sweeps import accidents

SHORT = {"device": "cpu", "dtype": "float32", "max_steps": 2, "eval_every": 2, "save_every": 2}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A folder with small models of the first three stages, and their feedback."""
    folder = tmp_path_factory.mktemp("out")
    for stage, cfg in accidents.configs(folder, folder).items():
        if stage != "ppo":
            accidents.STAGES[stage].main(replace(cfg, max_steps=2))
    return folder


def rloo(out, to, **flags):
    sizes = {"batch_size": 3, "minibatch_size": 6, "max_new_tokens": 12, "eval_prompts": 3}
    models = {"init": f"{out}/sft", "reward": f"{out}/rm"}
    train_rloo.main(train_rloo.Config(str(to), **models | SHORT | sizes | flags))
    return metrics(to)


def metrics(run):
    return list(csv.DictReader(Path(run, "metrics.csv").open()))


# ---- RLOO and GRPO -----------------------------------------------------------------------------


def estimate(baseline, scores, kl, mask, K):
    cfg = train_rloo.Config(baseline=baseline, rollouts_per_prompt=K)
    rollout = {"response_mask": mask, "logprobs": kl, "ref_logprobs": torch.zeros_like(kl)}
    return train_rloo.group_advantages(cfg, rollout, scores, kl_coef=0.5)


def test_rloo_compares_a_response_with_the_mean_of_the_others_to_its_prompt():
    torch.manual_seed(0)
    scores, kl = torch.randn(6).double(), torch.randn(6, 4).double()
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 2])[:, None]
    found = estimate("rloo", scores, kl, mask, 3)
    total = [scores[i] - 0.5 * kl[i][mask[i]].sum() for i in range(6)]
    for i in range(6):
        others = [total[j] for j in range(6) if j // 3 == i // 3 and j != i]
        wanted = total[i] - sum(others) / 2
        torch.testing.assert_close(found["advantages"][i], wanted * mask[i])
        torch.testing.assert_close(found["rewards"][i].sum(), total[i])


def test_grpo_divides_by_the_spread_of_the_groups_scores_and_equal_scores_teach_nothing():
    """KL, here up to 0.3, is no part of it: it would make an advantage of 1 out of equal scores."""
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0]).double()
    mask, kl = torch.ones(4, 2, dtype=torch.bool), torch.tensor([[0.1, 0.2]] * 3 + [[0.0, 0.1]])
    found = estimate("grpo", scores, kl.double(), mask, 2)
    torch.testing.assert_close(found["advantages"][:, 0], torch.tensor([-1.0, 1, 0, 0]).double())
    assert found["rewards"].tolist() == [[0.0, score] for score in scores.tolist()]
    assert "advantage_scale" not in found  # as in its paper: the penalty is per unit of advantage


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_a_response_that_all_judges_left_out_is_in_no_group(baseline):
    scores = torch.tensor([1.0, math.nan, 4, 2, math.nan, math.nan]).double()
    mask = torch.ones(6, 2, dtype=torch.bool) & ~scores.isnan()[:, None]
    found = estimate(baseline, scores, torch.zeros(6, 2).double(), mask, 3)["advantages"]
    alone = scores[[0, 2]], torch.zeros(2, 2).double(), mask[[0, 2]], 2
    torch.testing.assert_close(found[[0, 2]], estimate(baseline, *alone)["advantages"])
    assert not found[[1, 3, 4, 5]].any()  # one that is alone has nothing to compare with


@pytest.mark.parametrize("K", range(2, 17))
def test_equal_scores_teach_grpo_nothing_whatever_rounding_leaves(K):
    """In float32 the mean of equal numbers is not always that number."""
    scores = torch.tensor([n / 10 for n in range(1, 21)] + [n / 7 for n in range(1, 15)])
    mask = torch.ones(len(scores) * K, 3, dtype=torch.bool)
    found = estimate("grpo", scores.repeat_interleave(K), torch.zeros(mask.shape), mask, K)
    assert not found["advantages"].any()


def test_grpos_penalty_is_in_the_loss(monkeypatch):
    seen = []
    monkeypatch.setattr(train_rloo.train_ppo, "main", lambda cfg, **_: seen.append(cfg))
    for flags in ({}, {"baseline": "grpo"}, {"baseline": "grpo", "kl_coef": 0.0}):
        train_rloo.main(train_rloo.Config(kl_loss_coef=0.01, **flags))
    coefs = [x for cfg in seen for x in (cfg.kl_coef, cfg.kl_loss_coef)]
    assert coefs == pytest.approx([0.05, 0.01, 0, 0.06, 0, 0.01])


def test_grpo_cannot_steer_a_penalty_that_is_in_the_loss(capsys):
    cfg = train_rloo.Config(baseline="grpo", kl_target=6.0)
    assert "--kl_target" in refused(capsys, train_rloo.main, cfg)


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_it_runs_checked_without_a_value_function(out, tmp_path, baseline, capsys):
    rows = rloo(out, tmp_path, baseline=baseline, score_unended=True)  # hardly one ends by itself
    assert "checks: " in capsys.readouterr().out
    assert not {"values", "returns", "explained_variance", "value_loss"} & rows[0].keys()
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-5) and float(rows[1]["kl_exact"]) > 0
    config = json.loads((tmp_path / "step_2/config.json").read_text())
    assert (config["stage"], config["kind"], config["chat"]) == (baseline, "lm", True)
    assert not [x for x in doctor.examine(str(tmp_path)) if "values" in x.name]


def test_forks_are_rungs_of_the_ladder(out, tmp_path, capsys):
    rloo(out, tmp_path / "rloo")
    models = [f"{tmp_path}/rloo", f"again={out}/sft"]
    sizes = {"prompts": 2, "best_of_prompts": 2, "shots": 1, "max_new_tokens": 4, "device": "cpu"}
    rows = evaluate.main(evaluate.Config(out=str(out), models=models, **sizes))
    assert [row["model"] for row in rows][-2:] == ["rloo", "again"]
    assert "ppo: no checkpoint there" in capsys.readouterr().out


# ---- DPO ---------------------------------------------------------------------------------------


def test_dpos_loss_is_the_pairwise_loss_of_log_ratios_of_the_completion_alone():
    torch.manual_seed(0)
    policy, reference = [GPT(GPTConfig(20, 16, 1, 2, 8)).double() for _ in range(2)]
    assistant, asked, texts = 19, [[1, 2], [3, 4, 5]], [[[6, 7, 8], [9]], [[10], [11, 12]]]
    rows = [
        ([[*a, assistant, *t] for t in pair], list(map(len, pair)), [1, 2], "")
        for a, pair in zip(asked, texts)
    ]
    loss, metrics = train_dpo.dpo_loss(0.3, reference, policy, feedback_batch(rows, [0, 1], 0))
    r = []
    for completions, *_ in rows:
        for row in completions:
            n, ids = len(row) - 1 - row.index(assistant), torch.tensor([row])
            both = [f.logprobs_from_logits(m(ids)[:, :-1], ids[:, 1:]) for m in (policy, reference)]
            r.append(0.3 * (both[0] - both[1])[0, -n:].sum())
    r = torch.stack(r).view(2, 2)
    torch.testing.assert_close(loss, f.pairwise_loss(r[:, 0], r[:, 1]))
    assert metrics["accuracy"] == (r[:, 0] > r[:, 1]).double().mean()


def test_dpo_counts_the_last_turn_of_each_completion_and_its_eos():
    """Whatever is said before, in the prompt or in the completion; however many completions there
    are; and where the prompt is cut."""
    torch.manual_seed(0)
    tokenizer, user = byte_tokenizer(), lambda text: ("user", text)
    policy, reference = [GPT(GPTConfig(260, 24, 1, 2, 8)).double() for _ in range(2)]
    turns = [("assistant", "no"), user("why?"), ("assistant", "so")]
    long = [user("q" * 30), ("assistant", "a"), user("r")]
    examples = [
        Example([user("q")], "f:1", ["yes", turns, ""], [2, 1, 3], ""),
        Example(long, "f:2", ["one", "two or three"], [1, 2], ""),
    ]
    rows = encode_feedback(tokenizer, examples, 24)
    batch = feedback_batch(rows, [0, 1], tokenizer.pad_id)
    assert batch["n_answer"].tolist() == [[4, 3, 1], [4, 13, 0]]
    r = torch.zeros(2, 3).double()
    for i, (completions, lengths, *_) in enumerate(rows):
        for k, (row, n) in enumerate(zip(completions, lengths)):
            assert row[-n - 1 :][0] == tokenizer.assistant_id and row[-1] == tokenizer.eos_id
            ids = torch.tensor([row])
            both = [f.logprobs_from_logits(m(ids)[:, :-1], ids[:, 1:]) for m in (policy, reference)]
            r[i, k] = 0.3 * (both[0] - both[1])[0, -n:].sum()
    loss, _ = train_dpo.dpo_loss(0.3, reference, policy, batch)
    torch.testing.assert_close(loss, f.ranking_loss(r, batch["target"]))


def test_dpo_starts_at_its_reference_and_learns_from_the_feedback(out, tmp_path):
    flags = {"max_steps": 12, "eval_every": 12, "batch_size": 8, "learning_rate": 3e-3, "beta": 1.0}
    files = {"init": f"{out}/sft", "data": [f"{out}/rm/feedback.jsonl"]}
    train_dpo.main(train_dpo.Config(str(tmp_path), **files, **SHORT | flags))
    rows = metrics(tmp_path)
    assert float(rows[0]["loss"]) == pytest.approx(0.693147, abs=1e-4)  # log 2: ratios are 1
    assert float(rows[-2]["loss"]) < 0.67
    assert load(tmp_path)[1].chat


def test_dpo_refuses_feedback_that_orders_nothing(out, tmp_path, capsys):
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    cfg = train_dpo.Config(f"{tmp_path}/dpo", init=f"{out}/sft", data=[str(data)])
    assert "holds thumbs" in refused(capsys, train_dpo.main, cfg)


# ---- rejection sampling ------------------------------------------------------------------------


def test_rejection_sampling_does_not_read_the_file_that_it_writes(tmp_path, capsys):
    cfg = train_rft.Config(f"{tmp_path}/rft", data=[f"{tmp_path}/x/../rft/best.jsonl"])
    assert "is the file that this run writes" in refused(capsys, train_rft.main, cfg)


def test_the_best_of_each_prompts_responses_that_ended_is_kept(out, tmp_path, monkeypatch):
    asked = []

    def sample(gpt, tokenizer, ids, n, seed, progress=""):
        asked.extend(ids)  # three responses each: one unfinished, one poor, one good
        texts = [tokenizer.encode(text) for text in ("unfinished", "poor", "good")]
        return [texts[i % 3] + [tokenizer.eos_id] * (i % 3 > 0) for i in range(len(ids))]

    def scores(*_):
        of = lambda texts: [len(t) % 10 - 10.0 * (i % 3 == 1) for i, t in enumerate(texts)]
        return lambda prompts, ids, texts: torch.tensor(of(texts))

    monkeypatch.setattr(train_rft, "sample_responses", sample)
    monkeypatch.setattr(train_rft, "make_scorer", scores)
    models = {"init": f"{out}/sft", "reward": f"{out}/rm", "device": "cpu"}
    cfg = train_rft.Config(str(tmp_path), prompts=40, best_of=3, max_new_tokens=90, **models)
    records = train_rft.best_responses(cfg)
    assert len(asked) == 3 * 44 and asked[0] == asked[2] != asked[3]
    assert len(records) == 44 and {r["completion"] for r in records} == {"good"}
    assert records[0]["prompt"][0]["role"] == "user"


def test_the_best_may_be_a_functions_which_leaves_responses_out(out, tmp_path):
    """And none is kept of a prompt to which all responses are left out."""
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, answer):\n"
        "    pairs = zip(completions, answer)\n"
        "    return [None if a == 'x' else -float(len(c)) for c, a in pairs]\n"
    )
    rows = "".join(json.dumps({"prompt": f"q{i}", "answer": "xy"[i % 2]}) + "\n" for i in range(6))
    (tmp_path / "d.jsonl").write_text(rows)
    flags = {"reward": f"{tmp_path}/f.py:f", "data": [f"{tmp_path}/d.jsonl"], "device": "cpu"}
    cfg = train_rft.Config(str(tmp_path), init=f"{out}/sft", best_of=40, max_new_tokens=60, **flags)
    records = train_rft.best_responses(cfg)
    asked = {r["prompt"][0]["content"] for r in records}
    assert asked and asked <= {"q1", "q3", "q5"}


# ---- LoRA --------------------------------------------------------------------------------------


def lora(out, to, stage, **flags):
    few = SHORT | {"max_steps": 6, "max_new_tokens": 4, "rank": 2} | flags
    if stage == "ppo":
        few |= {"reward": f"{out}/rm", "batch_size": 3, "minibatch_size": 3, "eval_prompts": 3}
    else:
        few |= {"demonstrations": 60} if stage == "sft" else {"prompts": 40, "sft": f"{out}/sft"}
    few |= {} if stage != "rm" else {"heldout_prompts": 4}
    init = f"{out}/gpt" if stage == "sft" else f"{out}/sft"
    cfg = train_lora.STAGES[stage](str(to), init=init, **few)
    train_lora.main(cfg)
    return cfg, load_gpt(init)[0]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_lora_trains_thin_matrices_alone_and_others_read_an_ordinary_model(out, tmp_path, stage):
    cfg, gpt = lora(out, tmp_path / "lora", stage)
    before = {name: w.clone() for name, w in gpt.state_dict().items()}
    whole = checkpoint.load(cfg.out_dir, as_saved=True).weights
    learned = checkpoint.gpt_weights(whole)
    thin = {n: w for n, w in learned.items() if n.endswith((".A", ".B"))}
    assert len(thin) == 2 * 4 * gpt.config.n_layer and all(w.abs().max() > 0 for w in thin.values())
    for name, w in before.items():
        assert torch.equal(learned[name], w)
    merged, found = checkpoint.load_model(cfg.out_dir)
    assert (found.stage, found.tokenizer.chat) == (stage, True)
    merged = merged.eval() if stage != "rm" else merged.gpt.eval()
    changed = {n for n, w in merged.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {name.removesuffix(".A") + ".weight" for name in thin if name.endswith(".A")}

    train_lora.adapt(cfg, gpt, 0)  # the same function as the two apart
    gpt.load_state_dict(learned)
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(gpt.eval()(tokens), merged(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged(tokens), load_gpt(cfg.init)[0].eval()(tokens), atol=1e-4)


def test_loras_reward_model_judges(out, tmp_path):
    """With the unit that was measured: PPO's first scores are of mean 0 and sd 1, about."""
    lora(out, tmp_path / "rm", "rm")
    report = json.loads((tmp_path / "rm/report.json").read_text())
    judge, _ = checkpoint.load_model(tmp_path / "rm", "reward")
    assert judge.score_sd == torch.tensor(report["score_sd"])
    rloo(out, tmp_path / "ppo", reward=f"{tmp_path}/rm")


@pytest.mark.parametrize("stage", train_lora.STAGES)
def test_a_resumed_run_of_lora_is_the_undisturbed_one(out, tmp_path, monkeypatch, stage):
    """To the bit: metrics, W, A, B and heads, and AdamW's state."""
    monkeypatch.setitem(accidents.STAGES, "lora", train_lora)
    whole, _ = lora(out, tmp_path / "whole", stage)
    cfg = replace(whole, out_dir=f"{tmp_path}/half")
    accidents.end_by_signal("lora", cfg, step=3)
    assert checkpoint.find(cfg.out_dir, "latest").name == "step_3"
    train_lora.main(replace(cfg, resume=True))
    assert not accidents.differs(Path(whole.out_dir), Path(cfg.out_dir))
    saved = [checkpoint.load(c.out_dir, as_saved=True).weights for c in (whole, cfg)]
    assert any(name.endswith(".B") for name in saved[0]) and accidents.same(*saved)


def test_lora_in_ppo_has_one_copy_of_the_model_and_the_base_model_as_reference(monkeypatch):
    gpt = GPT(GPTConfig(20, block_size=8, n_layer=2, n_head=2, d_model=8)).eval()
    tokens = torch.arange(8)[None]
    before = gpt(tokens)
    train_lora.adapt(train_lora.Config(rank=3), gpt, 0)
    reference = frozen_reference(gpt)
    for name, p in gpt.named_parameters():
        if name.endswith(".B"):
            p.data += 1
        shared = reference.get_parameter(name).data_ptr() == p.data_ptr()
        assert shared == (not name.endswith((".A", ".B")))
    assert torch.equal(reference(tokens), before) and not torch.allclose(gpt(tokens), before)


def test_a_flag_that_a_fork_has_no_use_for_is_refused(capsys):
    for fork, flags in (
        (train_lora.Config, "freeze_layers shard"),
        (train_lora.RMConfig, "freeze_layers shard"),
        (train_lora.PPOConfig, "freeze_layers shard"),
        (train_rloo.Config, "vf_coef cliprange_value gamma lam critic"),
        (train_rft.Config, "demonstrations"),
    ):
        for flag in flags.split():
            assert f"--{flag}" in refused(capsys, from_cli, fork, [f"--{flag}", "1"])
            with pytest.raises(TypeError, match=flag):
                fork(**{flag: 1})


def test_the_command_line_of_a_config_gives_that_config_again():
    """Without flags that idle beside others, which are refused where they are typed."""
    for module in accidents.STAGES.values():
        changed = {"data": ["a b", "c"], "resume": True, "check": False, "seed": 7}
        for cfg in (module.Config(), module.Config(**changed)):
            assert from_cli(type(cfg), words(cfg)) == cfg


def test_at_first_lora_changes_nothing_and_only_it_learns():
    gpt = GPT(GPTConfig(20, block_size=8, n_layer=2, n_head=2, d_model=8)).eval()
    tokens = torch.arange(8)[None]
    before = gpt(tokens)
    train_lora.adapt(train_lora.Config(rank=3), gpt, 0)
    assert torch.equal(gpt(tokens), before)
    trained = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert len(trained) == 16 and all(name.endswith((".A", ".B")) for name in trained)
