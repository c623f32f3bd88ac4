"""sampling.py: the cache changes nothing, noise belongs to a row, and frequencies are right."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_ppo
from nanorlhf import rollout, sampling
from nanorlhf.data.batches import pad
from nanorlhf.data.dialogue import Prompt
from nanorlhf.functional import logprobs_from_logits
from nanorlhf.model import GPT, GPTConfig
from nanorlhf.sampling import (
    filtered,
    generate,
    response_mask,
    sample,
    sample_responses,
    stream,
    uniforms,
)
from nanorlhf.tokenizer import byte_tokenizer
from tests.helpers import stand_in_for_cuda_graphs

TOKENIZER = byte_tokenizer()
EOS, PAD, V = TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.vocab_size
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [11, 12, 13, 14]]


def tiny(eos_bias=0.0, seed=0):
    """A model with random weights; eos_bias raises the logit of eos at every position."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(V, block_size=64, n_layer=2, n_head=2, d_model=16)).eval()
    gpt.wte.weight.data *= 3
    if eos_bias:  # the last norm's bias points along eos's embedding
        direction = gpt.wte.weight.data[EOS]
        gpt.ln_f.bias.data = eos_bias * direction / direction.square().sum()
    return gpt


def run(gpt, prompts=PROMPTS, T=20, seed=1, temperature=1.0, **options):
    tokens, mask = pad(prompts, PAD, left=True)
    noise = uniforms(seed, 0, range(len(prompts)), T)
    return generate(gpt, tokens, mask, T, EOS, PAD, noise, temperature, **options)


def ends_early():
    """A model whose samples end at different times, checked here."""
    gpt = tiny(eos_bias=6.0)
    lengths = response_mask(run(gpt), EOS).sum(1)
    assert lengths.min() < lengths.max() and (lengths < 20).any()
    return gpt


# ---- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_is_that_of_full_unpadded_forwards(seed):
    gpt = tiny(seed=seed)
    responses = run(gpt, temperature=0)
    for prompt, response in zip(PROMPTS, responses.tolist()):
        row = list(prompt)
        with torch.no_grad():
            while len(row) < len(prompt) + 20 and EOS not in row:
                row.append(gpt(torch.tensor([row]))[0, -1].argmax().item())
        found = row[len(prompt) :]
        assert response == found + [PAD] * (len(response) - len(found))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_sampled_tokens_follow_the_teacher_forced_log_probs(temperature, monkeypatch):
    """The distribution that each token was drawn from is the one that PPO measures afterwards."""
    gpt, drawn = ends_early(), []

    def spy(logits, noise, temperature, top_k, top_p):
        drawn.append(logits)
        return sample(logits, noise, temperature, top_k, top_p)

    monkeypatch.setattr(sampling, "sample", spy)
    monkeypatch.setattr(sampling, "STRIDE", (10**6, 10**6))  # no row leaves: one shape throughout
    responses = run(gpt, temperature=temperature)
    mask, logits = response_mask(responses, EOS), torch.stack(drawn, 1)[:, : responses.shape[1]]
    found = logprobs_from_logits(logits, responses, temperature)
    for prompt, response, real, logprobs in zip(PROMPTS, responses, mask, found):
        full = gpt(torch.cat([torch.tensor(prompt), response[real]])[None])[:, len(prompt) - 1 : -1]
        forced = logprobs_from_logits(full, response[real][None], temperature)[0]
        torch.testing.assert_close(logprobs[real], forced, rtol=0, atol=1e-4)


def test_a_response_is_as_long_as_it_is_drawn_and_then_padded():
    responses = run(ends_early())
    mask = response_mask(responses, EOS)
    assert (responses[~mask] == PAD).all()
    ended = (responses == EOS).any(1)
    last = mask.sum(1) - 1
    assert (responses[torch.arange(len(last)), last][ended] == EOS).all()
    assert mask.any(0).all()  # no column that is only padding


def test_generation_stops_when_every_row_has_ended(monkeypatch):
    gpt, calls = tiny(eos_bias=100.0), []
    monkeypatch.setattr(sampling, "sample", lambda *a: calls.append(1) or sample(*a))
    responses = run(gpt, T=40)
    assert responses.shape[1] == 1 and (responses == EOS).all()
    assert len(calls) == sampling.STRIDE[False] < 40
    sample_responses(gpt, TOKENIZER, PROMPTS, 40, seed=1)
    assert len(calls) == 2 * sampling.STRIDE[False]


@pytest.mark.parametrize("T", [1, 16, 17, 20])
def test_without_an_eos_a_response_has_all_its_tokens(T):
    responses = run(tiny(eos_bias=-100.0), T=T)
    assert responses.shape == (4, T) and not (responses == PAD).any()
    assert response_mask(responses, EOS).all()


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_the_response_mask_is_true_up_to_and_including_the_first_eos(rows):
    eos = 0
    for row, found in zip(rows, response_mask(torch.tensor(rows), eos).tolist()):
        wanted, ended = [], False
        for token in row:
            wanted.append(not ended)
            ended = ended or token == eos
        assert found == wanted


def test_of_several_ends_a_response_stops_at_whichever_comes_first():
    """Written, streamed, and in a rollout, which says of each that it has ended."""
    gpt = tiny()
    full = run(gpt).tolist()
    ends = a, b = full[0][3], full[1][1]
    in_order = [list(dict.fromkeys(t for t in row if t in ends)) for row in full]
    assert in_order == [[a, b], [b, a], [], [a, b]]
    lengths = [min((row.index(t) for t in ends if t in row), default=19) + 1 for row in full]
    wanted = [row[:n] for row, n in zip(full, lengths)]
    assert response_mask(torch.tensor(full), ends).sum(1).tolist() == lengths
    tokens, mask = pad(PROMPTS, PAD, left=True)
    noise = uniforms(1, 0, range(4), 20)
    responses = generate(gpt, tokens, mask, 20, ends, PAD, noise).tolist()
    assert responses == [row + [PAD] * (20 - len(row)) for row in wanted]
    for prompt, row, own in zip(PROMPTS, wanted, noise):
        assert list(stream(gpt, torch.tensor([prompt]), 20, ends, own[None])) == row

    tokenizer, cfg = copy.copy(TOKENIZER), train_ppo.Config(max_new_tokens=20, seed=1)
    tokenizer.ends = ends
    prompts = [Prompt(ids, "", "", {}) for ids in PROMPTS]
    rows = rollout.respond(cfg, gpt, prompts, tokenizer, 0, [0, 1, 2, 3])
    assert rows["ended"].tolist() == [True, True, False, True]
    assert rows["response_mask"].sum(1).tolist() == lengths
    assert rows["responses"].tolist() == responses


# ---- noise -------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_samples_are_the_same_for_any_chunk_size(chunk):
    gpt = ends_early()
    wanted = sample_responses(gpt, TOKENIZER, PROMPTS, 20, seed=5)
    assert sample_responses(gpt, TOKENIZER, PROMPTS, 20, seed=5, chunk=chunk) == wanted


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.6}, {"ends": (97,)}], ids=str
)
def test_sampled_responses_are_those_of_generate_without_their_pads(options, capsys):
    gpt, ends = ends_early(), options.get("ends", EOS)
    found = sample_responses(gpt, TOKENIZER, PROMPTS, 20, seed=5, step=3, **options)
    tokens, mask = pad(PROMPTS, PAD, left=True)
    noise = uniforms(5, 3, range(4), 20)
    flags = {k: v for k, v in options.items() if k != "ends"}
    wanted = generate(gpt, tokens, mask, 20, ends, PAD, noise, **flags)
    assert found == [[t for t in row if t != PAD] for row in wanted.tolist()]
    assert capsys.readouterr().err == ""  # no bar for an empty name


def test_the_first_step_is_step_0():
    found = sample_responses(ends_early(), TOKENIZER, PROMPTS, 20, seed=1)
    assert found == [[t for t in row if t != PAD] for row in run(ends_early()).tolist()]


def test_a_row_draws_the_same_sample_in_any_batch():
    gpt = ends_early()
    tokens, mask = pad(PROMPTS, PAD, left=True)
    noise, order = uniforms(1, 0, range(4), 20), [2, 0, 3]
    wanted = run(gpt)
    found = generate(gpt, tokens[order], mask[order], 20, EOS, PAD, noise[order])
    T = found.shape[1]
    assert torch.equal(found, wanted[order][:, :T]) and (wanted[order][:, T:] == PAD).all()


def test_sampled_rows_end_with_their_eos_or_are_full():
    found = sample_responses(ends_early(), TOKENIZER, PROMPTS * 5, 20, seed=5)
    assert all(row.count(EOS) <= 1 and PAD not in row[:-1] for row in found)
    assert all(row[-1] == EOS or len(row) == 20 for row in found)
    assert {row[-1] == EOS for row in found} == {True, False}


def test_uniforms_depend_on_seed_step_and_row_only():
    base = uniforms(1, 2, [3, 4], 50)
    assert base.dtype == torch.float32 and base.shape == (2, 50)
    assert (base >= 0).all() and (base < 1).all()
    assert torch.equal(base, uniforms(1, 2, [3, 4], 50))
    assert torch.equal(base[1:], uniforms(1, 2, [4], 50))  # alone as among others
    assert torch.equal(base[:, :7], uniforms(1, 2, [3, 4], 7))  # short as long
    others = [
        uniforms(*key, [row], 50) for key in ((1, 2), (2, 1), (0, 2), (1, 3)) for row in (3, 4)
    ]
    others += [uniforms(1, 2**32 - 1, [3], 50), uniforms(2, 0, [3], 50)]
    distinct = {tuple(x.flatten().tolist()) for x in others}
    assert len(distinct) == len(others)


def test_uniforms_are_what_they_were_when_older_runs_were_made():
    found = [uniforms(*key, 2)[0] for key in ((1, 0, [0]), (2, 3, [4]))]
    then = torch.tensor([[0.803051472, 0.480213046], [0.760285139, 0.418366134]])
    torch.testing.assert_close(torch.stack(found), then, rtol=0, atol=1e-7)


def test_uniforms_are_uniform_and_neighbours_do_not_correlate():
    noise = uniforms(1, 0, range(200), 200)
    counts = torch.histc(noise, 20, 0, 1)
    assert ((counts - 2000).square() / 2000).sum() < 45  # chi-square, 19 degrees of freedom
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.02


# ---- one token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_have_the_softmaxs_frequencies(temperature):
    torch.manual_seed(0)
    logits, n = torch.randn(12), 40_000
    found = sample(logits.expand(n, -1), torch.rand(n), temperature)
    wanted = (logits / temperature).softmax(-1) * n
    counts = torch.bincount(found, minlength=12)
    assert ((counts - wanted).square() / wanted).sum() < 32  # 11 degrees of freedom, p = 0.0008


@given(st.lists(st.booleans(), min_size=2, max_size=8), st.floats(0, 1, exclude_max=True, width=32))
def test_tokens_of_probability_zero_are_never_picked(possible, noise):
    if not any(possible):
        possible[0] = True
    logits = torch.tensor([[0.0 if p else -torch.inf for p in possible]])
    for u in (noise, 0.0, 1 - 2**-24):
        assert possible[sample(logits, torch.tensor([u])).item()]


def test_without_further_words_the_temperature_is_1_and_nothing_is_filtered():
    logits, noise = torch.randn(9).expand(5000, -1), torch.linspace(0, 0.9999, 5000)
    assert torch.equal(sample(logits, noise), sample(logits, noise, 1.0, 0, 1.0))


def test_bfloat16_logits_are_sampled_in_float32():
    logits, noise = torch.randn(50).bfloat16().expand(5000, -1), torch.linspace(0, 0.9999, 5000)
    assert torch.equal(sample(logits, noise), sample(logits.float(), noise))


def test_logits_that_are_nan_give_some_token():
    """So that it is the loss that is found not to be finite, and no index out of range."""
    assert sample(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9])).tolist() == [4, 4]


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, torch.rand(50), 0), logits.argmax(-1))
    cold = sample(logits, torch.rand(50), 1e-4)
    assert (cold == logits.argmax(-1)).float().mean() > 0.95


distinct_probs = st.lists(st.integers(1, 1000), min_size=2, max_size=9, unique=True).map(
    lambda x: [i / sum(x) for i in x]
)


@given(distinct_probs, st.integers(1, 10))
def test_top_k_keeps_the_k_likeliest(probs, k):
    kept = sorted(range(len(probs)), key=lambda i: -probs[i])[:k]
    wanted = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    assert filtered(torch.tensor([probs], dtype=torch.float64), top_k=k)[0].tolist() == wanted


@given(distinct_probs, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_hold_p(probs, top_p):
    kept, total = [], 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if total < top_p - 1e-9:
            kept.append(i)
        total += probs[i]
    if any(abs(sum(sorted(probs)[-n:]) - top_p) < 1e-6 for n in range(len(probs))):
        return  # on the edge, rounding decides
    wanted = [p if i in kept else 0.0 for i, p in enumerate(probs)]
    assert filtered(torch.tensor([probs], dtype=torch.float64), top_p=top_p)[0].tolist() == wanted
    assert kept[0] == max(range(len(probs)), key=lambda i: probs[i])


def test_filters_that_are_off_change_nothing_and_both_apply_together():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    assert filtered(probs) is probs
    assert filtered(probs, 99).tolist() == probs.tolist()
    # top_p is of what top_k left: 0.4 + 0.3, so 0.4 of 0.7 is enough for one half
    assert filtered(probs, 2, 0.5).tolist() == [[0.4, 0.0, 0.0, 0.0]]
    exact = torch.tensor([[0.5, 0.25, 0.25]])
    assert filtered(exact, top_p=0.5).tolist() == [[0.5, 0.0, 0.0]]  # one is enough


def test_filtered_sampling_draws_from_what_is_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, -1)
    torch.manual_seed(0)
    counts = torch.bincount(sample(logits, torch.rand(20_000), top_k=2), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([4 / 7, 3 / 7, 0, 0]), rtol=0, atol=0.015)


@pytest.mark.parametrize("every", [3, 8, 64])
def test_generation_with_a_static_cache_is_the_same(every, monkeypatch):
    """As on a GPU, but for the recording itself."""
    wanted = run(ends_early(), T=40)
    monkeypatch.setattr(sampling, "is_static", lambda device: True)
    monkeypatch.setattr(sampling, "repeat", lambda step, n, device: [step() for _ in range(n)])
    monkeypatch.setattr(sampling, "STRIDE", (1, every))
    assert torch.equal(run(ends_early(), T=40), wanted)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64])
def test_a_step_that_is_recorded_runs_as_often_as_it_is_asked_to(n, monkeypatch):
    """Recording it, on a GPU, is not running it."""
    done, recorded = [], []
    recording = stand_in_for_cuda_graphs(monkeypatch, lambda: done.append("replayed"))
    step = lambda: recorded.append("step") if recording else done.append("ran")
    sampling.repeat(step, n, torch.device("cuda"))
    assert len(done) == n and ("replayed" in done) == bool(recorded) == (n >= 8)


def test_rows_that_leave_the_batch_change_nothing(monkeypatch):
    found, sizes, prompts = [], set(), PROMPTS * 20
    keep = sampling.KVCache.keep
    monkeypatch.setattr(
        sampling.KVCache, "keep", lambda cache, rows: sizes.add(len(rows)) or keep(cache, rows)
    )
    for every in (1, 2, 10**6):
        monkeypatch.setattr(sampling, "STRIDE", (every, every))
        found.append(run(ends_early(), prompts, T=40))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[2])
    assert sizes and all(n % 32 == 0 for n in sizes)  # shapes that come again


@pytest.mark.parametrize(
    "n, alive, kept",
    [(128, 96, 96), (128, 97, None), (128, 33, 64), (128, 32, 32), (43, 32, 32), (42, 32, None)],
)
def test_rows_leave_when_a_quarter_of_them_can_and_a_multiple_of_32_stays(
    n, alive, kept, monkeypatch
):
    steps, sizes, keep = [], [], sampling.KVCache.keep

    def first_ones_go_on(logits, *_):
        assert not logits.requires_grad
        tokens = torch.full((len(logits),), 7)
        tokens[alive if not steps else n :] = EOS
        steps.append(len(logits))
        return tokens

    spy = lambda cache, rows: sizes.append(len(rows)) or keep(cache, rows)
    monkeypatch.setattr(sampling, "sample", first_ones_go_on)
    monkeypatch.setattr(sampling.KVCache, "keep", spy)
    responses = run(tiny(), [[1]] * n, T=20)
    assert sizes == ([kept] if kept else []) and steps == [n] * 16 + [kept or n] * 4
    assert (responses[:alive] == 7).all()
    assert (responses[alive:, 0] == EOS).all() and (responses[alive:, 1:] == PAD).all()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.0, 1.0), (0.7, 0.9)])
def test_a_stream_gives_the_tokens_of_generate_one_by_one(temperature, top_p):
    """Up to the eos, and of a response that has none, all."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(12, block_size=40, n_layer=2, n_head=2, d_model=16)).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.5)
    ended = 0
    for i in range(12):
        prompt = torch.arange(1, 4 + i % 5)[None] % 12
        noise = uniforms(1, i, [0], 20)
        about = (20, (3,), noise, temperature, 0, top_p)
        mask = torch.ones_like(prompt, dtype=torch.bool)
        wanted = generate(gpt, prompt, mask, 20, 3, 0, noise, temperature, 0, top_p)[0].tolist()
        found = list(stream(gpt, prompt, *about))
        assert found == wanted
        ended += found[-1] == 3
    assert 0 < ended or temperature == 0
