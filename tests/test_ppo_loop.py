"""train_ppo.py against an oracle that does every iteration once more, slowly.

The oracle reads each prompt with its response alone, without padding, writes sums out over tokens,
and takes its steps with PyTorch's AdamW on the weights themselves. What a run logs and what it
saves must be the same. The model is random and too small to learn: that is in test_stages.
"""

import copy
import csv
import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_ppo
from nanorlhf import engine, scoring, sources
from nanorlhf.data import dialogue, world
from nanorlhf.data.examples import Example
from nanorlhf.data.files import write_records
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
SIZES = GPTConfig(TOKENIZER.vocab_size, block_size=40, n_layer=2, n_head=2, d_model=16)
FUNCTIONS = """
def reward(prompts, responses):
    return [len(p) / 4 - len(r) / 5 for p, r in zip(prompts, responses)]

def gold(prompts, responses):
    return [len(r) - 2 * len(p) for p, r in zip(prompts, responses)]
"""


def random_gpt():
    gpt = GPT(SIZES)
    gpt.wte.weight.data *= 3
    direction = gpt.wte.weight.data[TOKENIZER.eos_id]
    gpt.ln_f.bias.data = 6 * direction / direction.square().sum()  # some responses end, some do not
    return gpt.eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with random models as sft and rm, prompts, text, and functions to score with."""
    folder, rng = tmp_path_factory.mktemp("start"), random.Random(0)
    torch.manual_seed(0)
    reward_model = RewardModel(random_gpt())
    reward_model.score_mean.fill_(0.2)
    reward_model.score_sd.fill_(0.7)
    for stage, model in (("sft", random_gpt()), ("rm", reward_model)):
        cfg = train_ppo.Config(out_dir=str(folder / stage))
        Path(cfg.out_dir).mkdir()
        checkpoint.save(cfg, stage, 0, model.state_dict(), {}, TOKENIZER, SIZES)
    word = lambda: "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 14)))
    for name, n in (("train", 17), ("held_out", 7)):
        write_records(folder / f"{name}.jsonl", [{"prompt": word()} for _ in range(n)])
    write_records(folder / "text.jsonl", [{"text": word() * 3} for _ in range(20)])
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


def config(start, out_dir, **flags):
    defaults = {
        "init": str(start / "sft"),
        "reward": f"{start}/functions.py:reward",
        "gold": f"{start}/functions.py:gold",
        "data": [f"{start}/train.jsonl"],
        "val_data": [f"{start}/held_out.jsonl"],
        "max_new_tokens": 12,
        "max_steps": 3,
        "batch_size": 12,
        "minibatch_size": 5,
        "learning_rate": 3e-3,
        "eval_every": 2,
        "eval_prompts": 5,
        "check": False,  # test_selfcheck.py is for that
        "device": "cpu",
        "dtype": "float32",
    }
    return train_ppo.Config(out_dir=str(out_dir), **defaults | flags)


def logged(folder):
    rows = csv.DictReader(Path(folder, "metrics.csv").open())
    return [{k: float(v) for k, v in row.items() if v} for row in rows]


def mean_of(rows):
    return {name: np.mean([float(row[name]) for row in rows]) for name in rows[0]}


OF_VALUES = ("values", "returns", "explained_variance", "value_loss", "vf_clipfrac")


# ---- the oracle --------------------------------------------------------------------------------


class Oracle:
    """A run of PPO in slow motion: `rows` of metrics, and the `policy` that comes out."""

    def __init__(self, cfg, start):
        self.cfg = cfg
        gpt = checkpoint.load_model(start / "sft", "lm")[0]
        self.reference = copy.deepcopy(gpt).requires_grad_(False)
        self.judge = checkpoint.load_model(start / "rm", "reward")[0].requires_grad_(False)
        critic = (
            checkpoint.load_model(start / "rm", "reward")[0] if cfg.critic == "separate" else None
        )
        self.policy = ActorCritic(gpt, critic or cfg.critic)
        for part in (gpt.wte, gpt.wpe, *gpt.h[: cfg.freeze_layers]) if cfg.freeze_layers else ():
            part.requires_grad_(False)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        decay = [[p for p in trained if p.dim() > 1], [p for p in trained if p.dim() == 1]]
        groups = [{"params": p, "weight_decay": d} for p, d in zip(decay, (cfg.weight_decay, 0))]
        self.trained, self.adamw = trained, torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-5)
        init = SimpleNamespace(tokenizer=TOKENIZER, model_config=SIZES)
        self.ptx_batch = sources.ptx_batches(cfg, init, n_windows=8)
        lines = lambda name: [json.loads(x)["prompt"] for x in (start / name).open()]
        train, held_out = lines("train.jsonl"), lines("held_out.jsonl")
        order = np.random.default_rng([cfg.seed, 0]).permutation(len(held_out))
        held_out = [held_out[i] for i in sorted(order[: cfg.eval_prompts])]
        self.held_out = held_out
        self.rows, kl_coef, T = [], cfg.kl_coef, cfg.max_steps
        for step in range(T + 1):
            row = {}
            if step % cfg.eval_every == 0 or step == T:
                seen = self.metrics(self.rollout(held_out, 2**32 - 1, kl_coef))
                names = ("scores", "kl_exact", "gold", "eos_rate", "length", "entropy")
                row = {"eval_" + name: seen[name] for name in names}
            self.rows.append({"step": step} | row)
            if step == T:
                return
            order = []
            for epoch in range(10):  # more than this run has
                order += list(np.random.default_rng([cfg.seed, epoch]).permutation(len(train)))
            order = order[step * cfg.batch_size : (step + 1) * cfg.batch_size]
            assert len(order) == cfg.batch_size
            asked = [train[i] for i in order for _ in range(cfg.rollouts_per_prompt)]
            rollout = self.rollout(asked, step, kl_coef)
            rate = cfg.learning_rate * (1 - step / T)
            rate *= min(1, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1
            seen = self.metrics(rollout)
            stats = self.update(rollout, step, rate)
            row |= seen | stats | {"kl_coef": kl_coef, "learning_rate": rate}
            absent = OF_VALUES if cfg.critic == "none" else ()
            self.rows[-1] |= {name: x for name, x in row.items() if name not in absent}
            if cfg.kl_target:
                episodes = cfg.batch_size * cfg.rollouts_per_prompt
                error = min(max(seen["kl"] / cfg.kl_target - 1, -0.2), 0.2)
                kl_coef = kl_coef * (1 + error * episodes / max(episodes * T // 3, 1))

    def read(self, gpt, r):
        """log pi(. | state) in every state of one response, (n, V), and what was read, (n, D)."""
        hidden = gpt.hidden(torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1 : -1]
        return (gpt.head(hidden) / self.cfg.temperature).log_softmax(-1), hidden

    def values(self, r, hidden):
        if self.cfg.critic == "none":  # a constant: what is made of it has no gradient
            return torch.zeros(len(r.response))
        if self.cfg.critic == "shared":
            return self.policy.value_head(hidden)[:, 0]
        return self.policy.critic(torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1 : -1]

    def score(self, r):
        ended = r.response[-1] == TOKENIZER.eos_id
        if not ended and not self.cfg.score_unended:
            return self.cfg.missing_eos_score
        if ".py:" in self.cfg.reward[0]:
            return len(r.asked) / 4 - len(r.text) / 5
        text = r.prompt + r.response + ([] if ended else [TOKENIZER.eos_id])
        return self.judge(torch.tensor([text]))[0, -1].item()

    @torch.no_grad()
    def rollout(self, asked, step, kl_coef):
        cfg, user, assistant = self.cfg, TOKENIZER.user_id, TOKENIZER.assistant_id
        ids = [[user, *TOKENIZER.encode(text), assistant] for text in asked]
        answers = sample_responses(
            self.policy.gpt, TOKENIZER, ids, cfg.max_new_tokens, cfg.seed, step, cfg.temperature
        )
        found = []
        for text, prompt, response in zip(asked, ids, answers):
            r = SimpleNamespace(asked=text, prompt=prompt, response=response)
            r.text, n = TOKENIZER.decode(response), range(len(response))
            p, hidden = self.read(self.policy.gpt, r)
            q, _ = self.read(self.reference, r)
            r.values, r.score = self.values(r, hidden), self.score(r)
            r.logprobs, r.kl = p[n, response], p[n, response] - q[n, response]
            r.kl_exact, r.entropy = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
            r.rewards = -kl_coef * r.kl - cfg.kl_loss_coef * r.kl_exact
            r.rewards[-1] += r.score
            found.append(r)
        for r in found:
            n, v = len(r.response), [*r.values.tolist(), 0]
            delta = [r.rewards[t].item() + cfg.gamma * v[t + 1] - v[t] for t in range(n)]
            later = lambda t: [(cfg.gamma * cfg.lam) ** (s - t) * delta[s] for s in range(t, n)]
            r.advantages = torch.tensor([sum(later(t)) for t in range(n)])
            r.returns = r.advantages + r.values
        advantages = torch.cat([r.advantages for r in found])
        for r in found:
            r.unit = advantages.std(correction=0)
            r.white = (r.advantages - advantages.mean()) / r.unit
        return found

    def metrics(self, rollout):
        tokens = lambda name: torch.cat([getattr(r, name) for r in rollout])
        mean = lambda f: sum(f(r) for r in rollout) / len(rollout)
        returns, values = tokens("returns"), tokens("values")
        unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
        return {
            "scores": mean(lambda r: r.score),
            "scores_sd": torch.tensor([float(r.score) for r in rollout]).std(correction=0),
            "kl": mean(lambda r: r.kl.sum()),
            "kl_k2": mean(lambda r: (r.kl**2 / 2).sum()),
            "kl_k3": mean(lambda r: ((-r.kl).exp() - 1 + r.kl).sum()),
            "kl_exact": mean(lambda r: r.kl_exact.sum()),
            "rewards": mean(lambda r: r.rewards.sum()),
            "returns": returns.mean(),
            "values": values.mean(),
            "explained_variance": 1 - unexplained,
            "advantages_sd": (returns - values).std(correction=0),
            "entropy": tokens("entropy").mean(),
            "eos_rate": mean(lambda r: r.response[-1] == TOKENIZER.eos_id),
            "length": mean(lambda r: len(r.response)),
            "gold": mean(lambda r: len(r.text) - 2 * len(r.asked)),
            **({"left_out": 0} if ".py:" in self.cfg.reward[0] else {}),
        }

    def loss(self, rows, key):
        """The mean over all tokens of a minibatch at once, and the metrics."""
        cfg, losses = self.cfg, []
        for r in rows:
            p, hidden = self.read(self.policy.gpt, r)
            q, new_values = self.read(self.reference, r)[0], self.values(r, hidden)
            log_ratio = p[range(len(r.response)), r.response] - r.logprobs
            rho = log_ratio.exp()
            gain = rho * r.white
            gain_clipped = rho.clip(1 - cfg.cliprange, 1 + cfg.cliprange) * r.white
            moved = (new_values - r.values).clip(-cfg.cliprange_value, cfg.cliprange_value)
            error, error_near = (new_values - r.returns) ** 2, (r.values + moved - r.returns) ** 2
            losses.append(
                {
                    "policy_loss": -torch.minimum(gain, gain_clipped),
                    "value_loss": torch.maximum(error, error_near) / 2,
                    "entropy_loss": (p.exp() * p).sum(-1),
                    "kl_loss": (p.exp() * (p - q)).sum(-1) / r.unit,
                    "approx_kl": rho - 1 - log_ratio,
                    "clipfrac": (gain_clipped < gain).float(),
                    "ratio": rho,
                    "vf_clipfrac": (error_near > error).float(),
                }
            )
        mean = {name: torch.cat([x[name] for x in losses]).mean() for name in losses[0]}
        loss = mean["policy_loss"] + cfg.vf_coef * mean["value_loss"]
        loss = loss + cfg.entropy_coef * mean.pop("entropy_loss")
        loss = loss + cfg.kl_loss_coef * mean.pop("kl_loss")
        if cfg.ptx_coef:
            text = self.ptx_batch(key)["tokens"]
            logits = self.policy.gpt(text[:, :-1])
            mean["ptx_loss"] = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
            loss = loss + cfg.ptx_coef * mean["ptx_loss"]
        return loss, {name: x.item() for name, x in mean.items()}

    def update(self, rollout, step, rate):
        cfg, history, size = self.cfg, [], self.cfg.minibatch_size
        for group in self.adamw.param_groups:
            group["lr"] = rate
        for epoch in range(cfg.ppo_epochs):
            order = np.random.default_rng([cfg.seed, step, epoch]).permutation(len(rollout))
            for i in range(0, len(rollout), size):
                loss, stats = self.loss([rollout[j] for j in order[i : i + size]], (step, epoch, i))
                if cfg.max_approx_kl and stats["approx_kl"] > cfg.max_approx_kl:
                    return mean_of([*history, stats | {"grad_norm": torch.zeros(())}])
                self.adamw.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(self.trained, cfg.grad_clip)
                history.append(stats | {"grad_norm": norm})
                self.adamw.step()
        return mean_of(history)


PLAIN = {}
LOADED = {
    "temperature": 0.7,
    "gamma": 0.9,
    "lam": 0.8,
    "entropy_coef": 0.1,
    "kl_loss_coef": 2.0,
    "freeze_layers": 1,
    "kl_target": 0.05,
    "kl_coef": 0.5,
    "rollouts_per_prompt": 2,
    "batch_size": 5,
    "grad_accum": 2,
    "weight_decay": 3.0,
    "vf_coef": 0.5,
    "warmup_steps": 2,
    "cliprange": 0.02,
    "cliprange_value": 0.03,
    "grad_clip": 0.5,
    "seed": 2,
    "max_steps": 4,
}
SEPARATE = {
    "critic": "separate",
    "ptx_coef": 0.7,
    "max_approx_kl": 3e-4,
    "max_steps": 2,
    "kl_target": 1e-3,
}

NONE = {
    "critic": "none",
    "vf_coef": 9.0,
    "gamma": 0.9,
    "lam": 0.8,
    "freeze_layers": 1,
    "rollouts_per_prompt": 3,
    "batch_size": 4,
    "cliprange": 0.03,
    "max_steps": 2,
}


@pytest.mark.parametrize(
    "flags, happens",
    [
        (PLAIN, "clipfrac"),
        (LOADED, "vf_clipfrac"),
        (SEPARATE, "explained_variance"),
        (NONE, "clipfrac"),
        (SEPARATE | {"score_unended": True}, "explained_variance"),
    ],
    ids=["plain", "loaded", "separate", "none", "unended"],
)
def test_a_run_logs_and_saves_what_the_oracle_finds(start, tmp_path, flags, happens):
    if "ptx_coef" in flags:
        flags = flags | {"ptx_data": [f"{start}/text.jsonl"], "reward": f"{start}/rm"}
    cfg = config(start, tmp_path, **flags)
    train_ppo.main(cfg)
    oracle = Oracle(cfg, start)
    assert any(row.get(happens, 0) != 0 for row in oracle.rows)
    for found, wanted in zip(logged(tmp_path), oracle.rows, strict=True):
        wanted = {name: float(x) for name, x in wanted.items()}
        assert found == pytest.approx(wanted, rel=5e-5, abs=2e-6)
    weights, wanted = checkpoint.load(tmp_path, "lm").weights, oracle.policy.state_dict()
    assert weights.keys() == wanted.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(weights[name], w, rtol=0, atol=3e-6, msg=name)


# ---- what is saved and when --------------------------------------------------------------------


def run(start, out_dir, **flags):
    train_ppo.main(config(start, out_dir, **flags))
    return logged(out_dir)


def stop_at(monkeypatch, step):
    """The next run is interrupted in the rollout of this step."""
    rollout = train_ppo.make_rollout

    def interrupted(*args):
        if args[5] == step:
            raise KeyboardInterrupt
        return rollout(*args)

    monkeypatch.setattr(train_ppo, "make_rollout", interrupted)


@pytest.mark.parametrize("stop, latest", [(0, None), (1, None), (2, 2), (3, 2), (4, 4)])
def test_checkpoints_come_every_so_many_iterations_but_not_before_the_first(
    start, tmp_path, monkeypatch, stop, latest
):
    stop_at(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path, save_every=2, max_steps=5, ppo_epochs=1)
    assert checkpoint.find(tmp_path) == (tmp_path / f"step_{latest}" if latest else None)


@pytest.mark.parametrize("critic", ["shared", "none"])
def test_a_resumed_run_is_the_uninterrupted_one(start, tmp_path, monkeypatch, critic):
    """With the coefficient that was reached, and another one in the flags."""
    flags = {"kl_target": 0.1, "save_every": 1, "weight_decay": 1.0}
    flags["critic"] = critic
    whole = run(start, tmp_path / "a", **flags)
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path / "b", **flags)
    monkeypatch.undo()
    assert run(start, tmp_path / "b", resume=True, **flags | {"kl_coef": 9.0}) == whole
    a, b = [checkpoint.load(tmp_path / name, "lm").weights for name in "ab"]
    assert all(torch.equal(b[name], w) for name, w in a.items())


def test_a_run_is_checked_where_it_begins_and_not_where_it_goes_on(start, tmp_path, capsys):
    flags = {"max_steps": 1, "check": True}
    for more, checked in (({}, True), ({"resume": True}, False), ({"check": False}, False)):
        run(start, tmp_path, **flags | more)
        assert ("[ppo] checks: " in capsys.readouterr().out) == checked


JUDGE = """
calls = []
def far_below(prompts, responses):
    calls.append(1)
    if len(calls) == 5:
        raise ConnectionError("away")
    return [-40.0] * len(responses)
"""


def test_a_new_run_says_what_its_first_scores_are_and_a_judge_that_fails_costs_no_step(
    start, tmp_path, capsys
):
    (tmp_path / "judge.py").write_text(JUDGE)
    flags = {"reward": f"{tmp_path}/judge.py:far_below", "max_steps": 4, "eval_every": 100}
    cfg = config(start, tmp_path / "run", **flags, max_new_tokens=6, temperature=0.5)
    with pytest.raises(SystemExit):
        train_ppo.main(cfg)
    said = capsys.readouterr().err
    assert said.count("not to end would be the best answer") == 1 and "away" in said
    state = torch.load(checkpoint.find(tmp_path / "run", "latest") / "state.pt", weights_only=True)
    assert state["kl_coef"] == cfg.kl_coef
    train_ppo.main(dataclasses.replace(cfg, resume=True))
    said = capsys.readouterr()
    assert "resumed at step 3" in said.out and "not to end" not in said.err


def test_a_new_runs_first_save_forgets_an_old_best(start, tmp_path):
    short = {"max_steps": 1, "ppo_epochs": 1}
    run(start, tmp_path, **short)
    (tmp_path / "best").write_text("step_1")
    run(start, tmp_path, **short)
    assert not (tmp_path / "best").exists()
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_1"]


# ---- without a value function, and with an estimate of one's own --------------------------------


def test_without_a_value_function_no_column_is_about_values(start, tmp_path):
    absent = [set(OF_VALUES) - row.keys() for row in run(start, tmp_path, critic="none")[:-1]]
    assert absent == 3 * [set(OF_VALUES)]


def test_what_a_forks_estimate_returns_is_what_the_update_sees(start, tmp_path, monkeypatch):
    """It is called once per iteration, after scoring, with the coefficient of that iteration."""
    called, seen, ppo_loss = [], [], train_ppo.ppo_loss

    def estimate(cfg, rollout, scores, kl_coef):
        called.append(kl_coef)
        assert len(scores) == len(rollout["ids"]) and (scores[~rollout["ended"]] == -3).all()
        return {"advantages": 7 + rollout["entropy"]}

    def spy(cfg, policy, reference, rows):
        seen.append((rows["advantages"] - rows["entropy"])[rows["response_mask"]])
        return ppo_loss(cfg, policy, reference, rows)

    monkeypatch.setattr(train_ppo, "ppo_loss", spy)
    flags = {"critic": "none", "kl_target": 0.1}
    cfg = config(start, tmp_path, **flags)
    train_ppo.main(cfg, estimate)
    rows = logged(tmp_path)
    assert called == pytest.approx([row["kl_coef"] for row in rows[:-1]]) and len(set(called)) == 3
    torch.testing.assert_close(torch.cat(seen), torch.full((len(torch.cat(seen)),), 7.0))
    assert not {"rewards", "advantages_sd", *OF_VALUES} & rows[0].keys()


def test_a_forks_run_bears_its_name_and_goes_on_under_no_other(start, tmp_path, capsys):
    cfg = config(start, tmp_path, max_steps=2, save_every=1)
    train_ppo.main(cfg, stage="mine")
    assert "[mine] " in capsys.readouterr().out
    about = json.loads((tmp_path / "step_2" / "config.json").read_text())
    assert (about["stage"], about["kind"], about["chat"]) == ("mine", "lm", True)
    cfg.resume = True
    train_ppo.main(cfg, stage="mine")
    assert "[mine] resumed at step 2" in capsys.readouterr().out
    assert "a checkpoint of stage mine" in the_error(capsys, lambda: train_ppo.main(cfg))


# ---- the pieces --------------------------------------------------------------------------------


def the_error(capsys, call):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_prompts(start, tmp_path, capsys):
    error = the_error(capsys, lambda: run(start, tmp_path, vf_coef=1e38))
    assert "not finite at step 0" in error and "train.jsonl" in error
    assert checkpoint.find(tmp_path) is None


def test_more_frozen_layers_than_there_are_is_an_error(start, tmp_path, capsys):
    for n in (3, -1):
        error = the_error(capsys, lambda n=n: run(start, tmp_path, freeze_layers=n))
        assert "the model has 2 blocks" in error
    run(start, tmp_path, freeze_layers=2, max_steps=1)


def test_the_smallest_run_can_steer_its_kl(start, tmp_path):
    """A third of its episodes is none."""
    rows = run(start, tmp_path, kl_target=6.0, batch_size=1, max_steps=2)
    assert rows[1]["kl_coef"] == pytest.approx(0.05 * 0.8)


def test_no_more_rows_are_read_at_once_than_in_the_update(start, tmp_path, monkeypatch):
    sizes, measure = [], train_ppo.measure

    def spy(cfg, policy, reference, rows):
        sizes.append(len(rows["tokens"]))
        return measure(cfg, policy, reference, rows)

    monkeypatch.setattr(train_ppo, "measure", spy)
    alike = [write_records(tmp_path / "x.jsonl", [{"prompt": c} for c in "abcdefghijkl"])]
    flags = {"data": alike, "max_new_tokens": 1, "max_steps": 1, "eval_prompts": 1, "grad_accum": 2}
    run(start, tmp_path, **flags)
    assert sizes == [1, 3, 3, 2, 2, 2, 1]  # evaluated, a rollout of 12, evaluated; 5 / 2 a group


def test_frozen_layers_run_once_for_policy_reference_and_all_epochs(start, tmp_path, monkeypatch):
    calls, measure, trunk = [], train_ppo.measure, GPT.trunk
    monkeypatch.setattr(train_ppo, "measure", lambda *a: calls.append("measured") or measure(*a))
    monkeypatch.setattr(GPT, "trunk", lambda *a: calls.append("trunk") or trunk(*a))
    run(start, tmp_path, freeze_layers=1, kl_loss_coef=0.1)
    assert calls.count("trunk") == calls.count("measured") > 0


def test_a_first_minibatch_that_is_too_far_is_not_taken(start, tmp_path):
    cfg = config(start, tmp_path, max_approx_kl=0.1)
    policy = ActorCritic(checkpoint.load_model(start / "sft", "lm")[0])
    examples = [Example([("user", text)], "") for text in ("a", "bb", "ccc")]
    asked = dialogue.encode_prompts(TOKENIZER, examples, 28)
    models = policy, policy.gpt
    rollout = train_ppo.make_rollout(cfg, *models, asked, TOKENIZER, 0, train_ppo.measure)
    rollout |= {"advantages": rollout["values"] - 1, "returns": rollout["values"]}
    rollout["logprobs"] = rollout["logprobs"] - 1
    optimizer = engine.Optimizer(policy, cfg, torch.float32, torch.device("cpu"))
    before = copy.deepcopy(policy.state_dict())
    stats = train_ppo.update(cfg, policy, None, optimizer, rollout, None, 0)
    assert stats["grad_norm"] == 0 and stats["approx_kl"] == pytest.approx(np.e - 2)
    assert all(torch.equal(before[name], w) for name, w in policy.state_dict().items())
    assert optimizer.mean.weight == 0 and all(p.grad is None for p in policy.parameters())
    cfg.max_approx_kl = stats["approx_kl"]  # just as far as allowed
    assert train_ppo.update(cfg, policy, None, optimizer, rollout, None, 0)["grad_norm"] > 0


def test_an_evaluation_shows_two_samples_with_their_score_and_kl(start, tmp_path, capsys):
    flags = {"max_steps": 1, "eval_prompts": 3, "kl_coef": 0.0}
    cfg = config(start, tmp_path, **flags)
    train_ppo.main(cfg)
    said = capsys.readouterr().out
    counted, sizes, *_ = said.splitlines()
    assert counted == "[ppo] 17 prompts to train on, 3 held out to evaluate on"
    assert sizes == f"[ppo] 0.01M parameters, cpu, float32, seed 1, {tmp_path}"
    assert "step     0/1  scores" in said and "step     1/1  eval_scores" in said
    oracle = Oracle(cfg, start)
    rollout = oracle.rollout(oracle.held_out, 2**32 - 1, 0.0)
    for r in rollout[:2]:
        about = f"(score {r.score:.2f}, kl {r.kl_exact.sum():.1f})"
        sample = f"{r.text} {about}".replace("\n", "\n         | ")
        assert f"  prompt | {r.asked}\n  sample | {sample}\n" in said
    assert said.count("prompt | ") == 4  # two evaluations
    assert said.count("[ppo] held-out prompts, and what the policy answers now:\n  prompt | ") == 2
    run(start, tmp_path, **flags | {"eval_prompts": 1})


def test_in_bfloat16_a_reward_models_constants_stay_exact(start, tmp_path, monkeypatch):
    cast_models, cast = [], scoring.cast
    spy = lambda model, *args: cast_models.append(model) or cast(model, *args)
    monkeypatch.setattr(scoring, "cast", spy)
    flags = {"reward": f"{start}/rm", "critic": "separate", "dtype": "bfloat16", "max_steps": 1}
    run(start, tmp_path, **flags)
    (judge,) = cast_models
    assert all(p.dtype == torch.bfloat16 for p in judge.parameters())
    assert judge.score_sd == torch.tensor(0.7)
    assert checkpoint.load(tmp_path, "lm").weights["critic.score_sd"] == torch.tensor(0.7)


def test_gold_is_the_users_function_or_what_the_world_likes_or_unknown():
    config = train_ppo.Config
    asked, text = "Write a story.", "Once there was a dog. The end."
    prompt = dialogue.Prompt([], asked, "", {})
    assert scoring.make_gold(config())([prompt], [text]) == pytest.approx(world.gold(asked, text))
    assert scoring.make_gold(config(data=["x.jsonl"])) is None


def test_where_a_function_scores_a_separate_critic_starts_from_the_policys_trunk():
    gpt = random_gpt().requires_grad_(False)
    cfg = train_ppo.Config(reward="r.py:f", critic="separate")
    critic = scoring.make_critic(cfg, gpt)
    assert all(p.requires_grad for p in critic.parameters())
    for name, w in gpt.state_dict().items():
        assert torch.equal(critic.gpt.state_dict()[name], w)
    assert critic.gpt.wte.weight is not gpt.wte.weight
