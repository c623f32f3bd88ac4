"""Mistakes that others shipped or easily make, each put into this code by replacing one function,
and what catches it: `--check`, or a test of this suite, called as it is. Both let the healthy code
pass. The table of docs/trust.md: `python -m tests.test_famous_mistakes`.

"–": nobody in particular.
"""

import contextlib
import functools
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import train_ppo
from nanorlhf import engine, functional, model, sampling
from nanorlhf.course import mistakes
from nanorlhf.course.mistakes import everywhere
from nanorlhf.data import split as data
from nanorlhf.data.examples import Example
from nanorlhf.model import GPT
from tests import test_engine, test_functional, test_model, test_sampling, test_stages
from tests.run import test_selfcheck as broken
from tests.run.test_selfcheck import checked_name, make_start, verdict

# ---- mistakes ----------------------------------------------------------------------------------


def hidden(positions_count_pads=False, pads_see_themselves=True):
    """GPT.hidden with a cache, written out, with one of its two traps."""

    def inject(patch):
        good = GPT.hidden

        def bad(gpt, tokens, cache=None):
            if cache is None:
                return good(gpt, tokens)
            slots, pads = cache.places(tokens.shape[1]), cache.pads[:, None]
            key = torch.arange(cache.length)
            allowed = (key <= slots[:, None]) & (key >= pads[..., None])
            if pads_see_themselves:
                allowed |= key == slots[:, None]
            positions = slots - (0 if positions_count_pads else pads)
            x = gpt.embed(tokens, positions.clamp(0, gpt.config.block_size - 1).expand_as(tokens))
            bias = model.additive(allowed[:, None], cache.keys.dtype)
            return gpt.ln_f(gpt.blocks(x, bias, cache))

        patch.setattr(GPT, "hidden", bad)

    return inject


def reference_without_temperature(patch):
    measure, logits = train_ppo.measure, train_ppo.reference_logits

    def bad(cfg, *rest):
        patch.setattr(train_ppo, "reference_logits", lambda *a: logits(*a) * cfg.temperature)
        return measure(cfg, *rest)

    patch.setattr(train_ppo, "measure", bad)


def log_softmax_in_bfloat16(patch):
    everywhere(patch, functional.exact, lambda x: x)


def reference_in_float32(patch):
    good = model.frozen_reference
    patch.setattr(train_ppo, "frozen_reference", lambda gpt: good(gpt).float())


def k3_in_the_reward(patch):
    good = functional.kl_estimate
    bad = lambda p, q, kind: good(p, q, "k3" if kind == "k1" else kind)
    patch.setattr(functional, "kl_estimate", bad)


def without_mask(name):
    """Of a function of functional.py whose last argument is the mask, or the one before."""

    def inject(patch):
        good = getattr(functional, name)
        full = lambda x: torch.ones_like(x) if torch.is_tensor(x) and x.dtype == torch.bool else x
        patch.setattr(functional, name, lambda *args: good(*map(full, args)))

    return inject


def unfinished_responses_keep_their_scores(patch):
    bad = lambda cfg, score, prompts, r: score(prompts, r["ids"], r["texts"])
    patch.setattr(train_ppo, "score_rollout", bad)


def smaller_value_error(patch):
    """0.5 * min in place of max: an update may move values as far as it likes."""

    def bad(new, old, returns, mask, c):
        near = new.clamp(old - c, old + c)
        error = torch.minimum((new - returns) ** 2, (near - returns) ** 2)
        return 0.5 * functional.masked_mean(error, mask), {}

    patch.setattr(functional, "value_loss", bad)


def mean_of_means(patch):
    good = engine.Optimizer.backward
    bad = lambda o, loss, stats, weight: good(o, loss, stats, torch.ones(1))
    patch.setattr(engine.Optimizer, "backward", bad)


def blocks_without_the_embedding(patch):
    bad = lambda gpt, n: [block.requires_grad_(False) for block in gpt.h[:n]]
    everywhere(patch, model.freeze_layers, bad)


def noise_by_place(patch):
    good = sampling.uniforms
    everywhere(patch, good, lambda seed, step, rows, T: good(seed, step, range(len(rows)), T))


def split_by_row(patch):
    def bad(examples, val_examples, limit=None):
        held_out = [data.is_held_out(e.source) for e in examples]
        sides = [[e for e, h in zip(examples, held_out) if h == side] for side in (False, True)]
        return sides[0], sides[1][:limit]

    patch.setattr(data, "split_held_out", bad)


def test_no_prompt_is_on_both_sides():
    examples = [Example([("user", str(i % 50))], f"file:{i}") for i in range(200)]
    train, val = data.split_held_out(examples, [])
    assert not {e.first_turn for e in train} & {e.first_turn for e in val}


# ---- detectors ---------------------------------------------------------------------------------


@functools.cache
def check(stage, **flags):
    """`--check` in a run of the stage."""

    def detect(start):
        said = verdict(stage, start, **flags)
        return said and f"`--check`, {stage}: {checked_name(said)}"

    return detect


def claim(test, *args, **settings):
    """A test of this suite; one of hypothesis' on some rollouts instead of all."""
    body = test.hypothesis.inner_test if "hypothesis" in vars(test) else test

    def detect(start):
        try:
            if body is test:
                test(*[x(start) if callable(x) else x for x in args])
            for seed in range(4 * (body is not test)):
                body(r=test_functional.rollout(seed, 3, 5, 4), **settings)
        except AssertionError:
            return f"`{test.__name__}`"
        return ""

    return detect


folder = lambda start: Path(tempfile.mkdtemp(dir=start))
here = lambda start: start
maths = test_functional
whitening = maths.test_mean_and_whitening_are_numpys_over_the_mask_with_a_variance_divided_by_n

MISTAKES = [  # what, who shipped it, how it is put in, what should catch it
    ("the eos of a demonstration carries no loss", "–", mistakes.eos_unlearned, check("sft")),
    ("prompts carry loss in SFT", "–", mistakes.prompts_in_the_loss, check("sft")),
    (
        "pad = eos: the action of stopping is masked out of both PPO losses",
        "trlx, DeepSpeed-Chat",
        mistakes.eos_masked,
        check("ppo"),
    ),
    ("positions count the pads on the left", "–", hidden(positions_count_pads=True), check("ppo")),
    (
        "a pad attends to nothing, and is nan",
        "–",
        hidden(pads_see_themselves=False),
        check("ppo", dtype="bfloat16"),
    ),
    (
        "the rollout's log-probs forget the temperature",
        "–",
        broken.logprobs_without_temperature,
        check("ppo"),
    ),
    (
        "the update's log-probs forget the temperature",
        "–",
        broken.update_at_temperature_1,
        check("ppo"),
    ),
    (
        "the reference's log-probs forget the temperature",
        "–",
        reference_without_temperature,
        check("ppo"),
    ),
    (
        "rollouts are sampled at temperature 0.8 and scored at 1",
        "–",
        mistakes.cold_samples,
        check("ppo"),
    ),
    (
        "rollouts are sampled with top-k and scored without",
        "–",
        broken.samples_with(top_k=5),
        check("ppo"),
    ),
    (
        "log-softmax in bfloat16",
        "–",
        log_softmax_in_bfloat16,
        claim(
            maths.test_bfloat16_logits_are_taken_to_float32_before_anything_else,
            name="logprobs_from_logits",
        ),
    ),
    ("dropout is on in the update", "–", broken.dropout_in_ppo, check("ppo")),
    (
        "policy and reference are cast differently",
        "–",
        reference_in_float32,
        check("ppo", dtype="bfloat16"),
    ),
    ("the reference is the policy itself", "–", mistakes.reference_moves, check("ppo")),
    (
        "the value of the state after the token",
        "–",
        mistakes.late_values,
        claim(test_model.test_values_and_logits_belong_to_the_state_before_each_token),
    ),
    ("the reward model is read at a pad", "–", broken.last_column, check("ppo")),
    (
        "the reward model is trained one token before the eos",
        "–",
        mistakes.before_the_eos,
        check("rm"),
    ),
    (
        "the score is added to every token",
        "ColossalChat",
        mistakes.score_everywhere,
        claim(
            maths.test_rewards_are_minus_the_kl_and_the_score_on_the_last_response_token_only,
            kl_coef=0.1,
        ),
    ),
    (
        "k3 with its arguments swapped",
        "trlx, ColossalChat, the RLHF Book",
        mistakes.k3_swapped,
        claim(
            maths.test_k1_and_k3_average_to_the_exact_kl_under_the_policy_and_k2_is_half_a_square
        ),
    ),
    ("k3 in the reward", "–", k3_in_the_reward, claim(maths.test_only_k1_belongs_in_the_reward)),
    (
        "advantages are whitened over padding too",
        "–",
        without_mask("masked_whiten"),
        claim(whitening),
    ),
    (
        "diagnostics are averaged over padding",
        "–",
        without_mask("explained_variance"),
        claim(
            maths.test_garbage_under_the_mask_never_matters,
            function=("explained_variance",),
            garbage=1e30,
        ),
    ),
    (
        "a response that does not end keeps its score",
        "–",
        unfinished_responses_keep_their_scores,
        claim(
            test_stages.test_a_response_without_an_eos_gets_the_fixed_score_under_a_function_too,
            here,
            folder,
        ),
    ),
    (
        "the value loss takes the smaller error",
        "–",
        smaller_value_error,
        claim(maths.test_value_loss_is_the_worse_of_two_squared_errors_token_by_token, clip=0.2),
    ),
    (
        "micro-batches count alike, whatever their number of tokens",
        "–",
        mean_of_means,
        claim(test_engine.test_accumulated_gradients_are_the_full_batchs, 3, torch.float32, folder),
    ),
    (
        "blocks are frozen, the tied embedding is not",
        "–",
        blocks_without_the_embedding,
        claim(test_model.test_freezing_n_blocks_trains_only_what_lies_above, 1),
    ),
    (
        "sampling noise belongs to a place in the batch",
        "–",
        noise_by_place,
        claim(test_sampling.test_uniforms_depend_on_seed_step_and_row_only),
    ),
    (
        "pairs are split at random, prompts are on both sides",
        "–",
        split_by_row,
        claim(test_no_prompt_is_on_both_sides),
    ),
]


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("mistakes"))


@functools.cache
def of_healthy_code(detect, start):
    return detect(start)


@pytest.mark.parametrize("what, who, inject, detect", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_caught_and_the_healthy_code_is_not(start, what, who, inject, detect):
    assert of_healthy_code(detect, start) == ""
    with pytest.MonkeyPatch.context() as patch:
        inject(patch)
        assert detect(start)


def table():
    """mistake | who shipped it | what catches it, as found now."""
    rows = ["| mistake | shipped by | caught by |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        start = make_start(Path(folder))
        for what, who, inject, detect in MISTAKES:
            with pytest.MonkeyPatch.context() as patch:
                inject(patch)
                rows.append(f"| {what} | {who} | {detect(start) or 'NOTHING'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
