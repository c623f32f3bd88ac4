"""The whole of PPO in a world of 31 sentences (experiments/small_world.py), where the objective J,
its gradient and the policy that maximises it are sums: does the loss descend along J's gradient,
and does training end at the optimum?

Gradients are compared without noise. The policies' probabilities are 1/2 and 1/4, so 256 rows in
exact proportion are the expectation over samples. (Sampled rollouts would need bounds so wide that
a wrong sign of a small term passed: whitening and the mean over tokens are ratios.)
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ppo
from experiments import small_world as world
from experiments import train_dpo, train_rloo, what_matters
from nanorlhf import functional as f
from nanorlhf.data.batches import pad
from nanorlhf.model import ActorCritic, frozen_reference
from nanorlhf.rollout import make_rollout
from tests import helpers

REF = world.log_probs(world.Table(0)).detach().double()
OPTIMUM = world.optimum(REF)

one_thread = pytest.fixture(autouse=True, scope="module")(helpers.one_thread)


def distance(logp):
    """Total variation to the optimum."""
    return float((logp.exp() - OPTIMUM.exp()).abs().sum() / 2)


def named(flags):
    """A name that is the same in every process."""
    plain = {k: getattr(x, "__name__", x) for k, x in flags.items() if k != "config"}
    return " ".join(f"{name}={x}" for name, x in plain.items())


# ---- the world ---------------------------------------------------------------------------------


def test_a_sentences_probability_is_the_product_of_its_tokens():
    gpt = world.Table(1)
    table = gpt.wte.weight.detach()[:3].double().softmax(0)  # (3, prefixes)
    prefixes = [""]
    for prefix in prefixes:
        if len(prefix) < 4:
            prefixes += [prefix + "a", prefix + "b"]
    assert world.SENTENCES == [x if len(x) == 4 else x + "." for x in prefixes]
    for sentence, logp in zip(world.SENTENCES, world.log_probs(gpt).tolist()):
        p = 1.0
        for t, letter in enumerate(sentence):
            p *= float(table["ab.".index(letter), prefixes.index(sentence[:t])])
        assert logp == pytest.approx(math.log(p), abs=1e-5)
        assert 256 * p == pytest.approx(round(256 * p), abs=1e-4) and p > 0
    assert world.log_probs(gpt).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_optimum_maximises_the_objective():
    best = float(world.objective(OPTIMUM, REF))
    log_z = float((REF + world.SCORES.double() / world.BETA).logsumexp(0))
    assert best == pytest.approx(world.BETA * log_z)
    rng = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(20):
            other = OPTIMUM + size * torch.randn(world.N, generator=rng).double()
            assert float(world.objective(other.log_softmax(0), REF)) < best


def test_the_best_of_n_is_what_sampling_gives():
    scores = world.SCORES.double()
    rng = np.random.default_rng(0)
    said = rng.choice(world.N, (200_000, 4), p=REF.exp().numpy())
    values = scores.numpy()[said]
    first = values.argmax(1)  # the first of equal ones, which come in any order
    counts = np.bincount(said[np.arange(len(said)), first], minlength=world.N) / len(said)
    p = world.best_of(4, REF).exp()
    assert float(p.sum()) == pytest.approx(1)
    assert np.abs(counts - p.numpy()).max() < 0.004


def test_the_sampler_says_each_sentence_with_its_probability():
    """Chi-square with 30 degrees of freedom; beyond 59.7 lies one in a thousand."""
    policy, n = ActorCritic(world.Table(1)), 8192
    cfg = train_ppo.Config(**world.SETTINGS, batch_size=n, minibatch_size=n)
    prompts = [SimpleNamespace(ids=[world.ASKED])] * n
    rollout = make_rollout(
        cfg, policy, frozen_reference(policy.gpt), prompts, world.TOKENIZER, 0, train_ppo.measure
    )
    counts = np.bincount([world.IDS.index(ids) for ids in rollout["ids"]], minlength=world.N)
    chi_square = lambda p: float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi_square(world.log_probs(policy.gpt).exp().detach().numpy()) < 59.7
    assert chi_square(REF.exp().numpy()) > 1000
    assert torch.equal(
        rollout["ended"], torch.tensor([ids[-1] == world.EOS for ids in rollout["ids"]])
    )


# ---- the first step, in expectation ------------------------------------------------------------


def measured(cfg, policy, reference, scores):
    """The 31 sentences as a rollout, measured and scored by the stage's own functions."""
    responses, mask = pad(world.IDS, world.PAD)
    rows = {"tokens": world.TOKENS, "responses": responses, "response_mask": mask}
    rows |= {"states": torch.arange(4).expand(mask.shape), "ended": (responses == world.EOS).any(1)}
    with torch.no_grad():
        rows |= train_ppo.measure(cfg, policy, reference, rows)
    judge = lambda prompts, ids, texts: scores.double()
    texts = {"ids": world.IDS, "texts": world.SENTENCES}
    return rows, train_ppo.score_rollout(cfg, judge, None, rows | texts)


def first_step(
    estimate=train_ppo.ppo_advantages,
    config=train_ppo.Config,
    critic="zero",
    seed=1,
    scores=world.SCORES,
    **flags,
):
    """Minus the expected gradient of `ppo_loss` at a policy that is not the reference, in units of
    J, and the policy. critic: "zero", "random", "exact" (the expected rewards to come) or "none".
    """
    flags = {"missing_eos_score": -1.0} | flags
    if config is train_ppo.Config:  # groups have neither
        flags = {"lam": 1.0} | flags | {"critic": "none" if critic == "none" else "shared"}
    cfg = config(**world.SETTINGS | flags)
    policy = ActorCritic(world.Table(seed), cfg.critic).double()
    reference = frozen_reference(world.Table(0).double())
    if critic == "random":
        torch.nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(3))
    once, scored = measured(cfg, policy, reference, scores)
    p = world.log_probs(policy.gpt).detach().exp()
    said = torch.arange(world.N).repeat_interleave((256 * p).round().long())  # in proportion
    assert len(said) == 256
    groups = said
    if cfg.rollouts_per_prompt == 2:  # all pairs, the responses to one prompt side by side
        groups = torch.cartesian_prod(said, said).flatten()
    rows = {name: x[groups] for name, x in once.items()}
    if critic == "exact":
        to_come = estimate(cfg, rows, scored[groups], cfg.kl_coef)["rewards"]
        to_come = to_come.flip(1).cumsum(1).flip(1)
        mask, prefix = rows["response_mask"], policy.gpt.in_states(rows).argmax(-1)  # (B, T)
        values = [to_come[mask & (prefix == n)].mean() for n in range(15)]
        rows["values"] = torch.tensor(values)[prefix.clamp(max=14)]
    estimates = estimate(cfg, rows, scored[groups], cfg.kl_coef)
    # at the first step the loss is linear in the advantages: a sentence may have its mean
    rows = {name: x[said] for name, x in once.items()}
    for name, x in estimates.items():
        rows[name] = torch.stack([x[groups == i].mean(0) for i in range(world.N)])[said]
    loss, _ = train_ppo.ppo_loss(cfg, policy, reference, rows)
    (gradient,) = torch.autograd.grad(loss, policy.gpt.wte.weight)
    scale = rows["advantage_scale"][0, 0] if "advantage_scale" in rows else 1.0
    per_response = rows["response_mask"].sum() / len(said)  # the loss is a mean over tokens
    return -gradient * scale * per_response, policy


def gradient(policy, beta=world.BETA, scores=world.SCORES):
    """Of J, by enumeration."""
    logp, ref = world.log_probs(policy.gpt), world.log_probs(world.Table(0).double()).detach()
    J = (logp.exp() * (scores.double() - beta * (logp - ref))).sum()
    return torch.autograd.grad(J, policy.gpt.wte.weight)[0]


RLOO = {"estimate": train_rloo.group_advantages, "config": train_rloo.Config}
RLOO |= {"rollouts_per_prompt": 2, "critic": "none"}
IN_LOSS = {"kl_coef": 0.0, "kl_loss_coef": world.BETA}
IN_BOTH = {"kl_coef": world.BETA / 4, "kl_loss_coef": 3 * world.BETA / 4}


@pytest.mark.parametrize(
    "flags",
    [
        {"critic": "none"},
        {"critic": "random"},
        {"critic": "exact", "lam": 0.0},
        {"critic": "exact", "lam": 0.95},
        {"critic": "random"} | IN_LOSS,
        {"critic": "exact", "lam": 0.95} | IN_LOSS,
        {"critic": "random"} | IN_BOTH,
        {"estimate": what_matters.unwhitened, "critic": "random"},
        {"estimate": what_matters.unwhitened, "critic": "random"} | IN_LOSS,
        RLOO,
        RLOO | IN_LOSS,
    ],
    ids=named,
)
def test_the_expected_first_step_is_the_gradient_of_the_objective(flags):
    step, policy = first_step(**flags)
    wanted = gradient(policy)
    assert wanted.norm() > 0.1
    torch.testing.assert_close(step, wanted, rtol=0, atol=1e-6)


def test_k1_as_a_reward_is_the_gradient_of_the_kl():
    nothing = torch.zeros(world.N)
    step, policy = first_step(scores=nothing, missing_eos_score=0.0, critic="random")
    torch.testing.assert_close(step, gradient(policy, scores=nothing), rtol=0, atol=1e-6)


# ---- what is biased, and which way -------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"lam": 0.95}, {"gamma": 0.95}, {"gamma": 0.95, "lam": 0.5}])
@pytest.mark.parametrize("score", [1.0, -1.0])
def test_what_discounts_rewards_hurries_to_good_ones_and_puts_off_bad_ones(flags, score):
    """All sentences have one score: there is nothing to learn. lambda below 1 without a critic and
    gamma below 1 make sentences shorter if it is good, and longer if it is bad."""
    same = {"scores": torch.full((world.N,), score), "missing_eos_score": score, "kl_coef": 0.0}
    step, policy = first_step(critic="none", **same | flags)
    lengths = torch.tensor([len(ids) for ids in world.IDS]).double()
    expected = (world.log_probs(policy.gpt).exp() * lengths).sum()
    longer = (torch.autograd.grad(expected, policy.gpt.wte.weight)[0] * step).sum()
    assert float(longer) * score < -1e-3
    unbiased, _ = first_step(critic="none", **same)
    assert unbiased.abs().max() < 1e-6


def test_k3_as_a_reward_is_not_the_kl():
    """k1's step is the KL's gradient. k3's is shorter and points elsewhere; the policy of seed 5
    it moves away from the reference."""
    nothing, cosines = {"scores": torch.zeros(world.N), "missing_eos_score": 0.0}, []
    for seed in range(1, 6):
        step, policy = first_step(what_matters.with_k3, seed=seed, critic="none", **nothing)
        wanted = gradient(policy, scores=nothing["scores"])
        assert step.norm() < 0.5 * wanted.norm()
        cosines.append(float((step * wanted).sum() / step.norm() / wanted.norm()))
    assert max(cosines) < 0.5 and cosines[-1] < -0.5


def test_the_kl_in_the_loss_alone_leaves_out_that_actions_choose_the_states():
    """The gradient of the KL of the states that came, as if they came anyhow, is 15 to 55 % of the
    KL's gradient away from it, and `ppo_advantages` makes that up in the rewards."""

    def loss_alone(cfg, rollout, scores, kl_coef):
        return train_ppo.ppo_advantages(replace(cfg, kl_loss_coef=0.0), rollout, scores, kl_coef)

    for seed in range(1, 11):
        step, policy = first_step(loss_alone, critic="random", seed=seed, **IN_LOSS)
        wanted = gradient(policy)
        penalty = wanted - gradient(policy, beta=0.0)
        assert 0.14 < (step - wanted).norm() / penalty.norm() < 0.56


# ---- the end of training -----------------------------------------------------------------------


SHORT = {"minibatch_size": 128, "max_steps": 80}


@pytest.mark.parametrize(
    "flags, bound",
    [
        ({}, 0.02),
        ({"estimate": train_rloo.group_advantages, "config": train_rloo.Config}, 0.02),
        ({"estimate": train_dpo}, 0.03),
        (IN_LOSS, 0.05),
    ],
    ids=["ppo", "rloo", "dpo", "kl in the loss"],
)
def test_training_ends_at_the_optimum(flags, bound):
    path = world.climb(**SHORT | flags)
    assert distance(path[0]) > 0.25
    assert distance(path[-1]) < bound
    assert float(world.objective(path[-1], REF)) > float(world.objective(OPTIMUM, REF)) - bound / 5


def test_a_constant_reward_teaches_grpo_nothing(monkeypatch):
    monkeypatch.setattr(world, "SCORES", torch.full((world.N,), 0.7))
    flags = {"baseline": "grpo", "kl_coef": 0.0, "max_steps": 5, "rollouts_per_prompt": 8}
    path = world.climb(train_rloo.group_advantages, train_rloo.Config, **flags)
    torch.testing.assert_close(path, path[:1].expand(path.shape), rtol=0, atol=0)


def test_a_forks_estimator_climbs_by_one_call():
    """The README's REINFORCE."""

    def reinforce(cfg, rollout, scores, kl_coef):
        kl = f.kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")
        rewards = f.shaped_rewards(scores, kl, rollout["response_mask"], kl_coef)
        returns = rewards.flip(1).cumsum(1).flip(1)
        advantages = f.masked_whiten(returns, rollout["response_mask"])
        return {"rewards": rewards, "returns": returns, "advantages": advantages}

    path = world.climb(reinforce, critic="none", max_steps=30, minibatch_size=128)
    J = world.objective(path.double(), REF)
    assert J[0] < 0.02 and J[-1] > J[0] + 0.9 * (world.objective(OPTIMUM, REF) - J[0])


def test_the_window_shows_every_sentence_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world, "SETTINGS", world.SETTINGS | {"max_steps": 2, "minibatch_size": 128})
    world.main(world.Config(to=str(tmp_path / "x.png")))
    head, *rows, wrote = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [*world.SENTENCES, "J", "KL,", "variation"]
    assert {len(row) for row in (head, *rows)} == {len(head)} and (
        tmp_path / "x.png"
    ).stat().st_size
    names = "PPO RLOO DPO GRPO kl_coef 0 best of 4".split()
    assert head.split() == ["reference", "optimum", *names]
