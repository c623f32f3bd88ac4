"""model.py: GPT-2's formula, the cache, padding, causality, and who shares which weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanorlhf import sampling
from nanorlhf.data.batches import pad
from nanorlhf.model import (
    GPT,
    ActorCritic,
    GPTConfig,
    RewardModel,
    additive,
    attention,
    freeze_layers,
    frozen_reference,
)
from nanorlhf.sampling import KVCache

V, PAD = 40, 39


def tiny(seed=0, dtype=torch.float64, **sizes):
    """A small GPT whose biases and norms are not at their initial 0 and 1."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{"vocab_size": V, "block_size": 32, "n_layer": 2, "n_head": 2} | sizes))
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return gpt.to(dtype).eval()


def tokens_of(*shape, seed=0):
    return torch.randint(0, V - 1, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


GPT_64 = tiny(d_model=16)
rows_of_tokens = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=12), min_size=1, max_size=4
)


def by_hand(gpt, tokens):
    """GPT-2's forward pass for one row of tokens (T,), with Python loops over heads."""
    w = dict(gpt.named_parameters())
    T, D, H = len(tokens), gpt.config.d_model, gpt.config.n_head
    norm = lambda x, n: (
        (x - x.mean(-1, keepdim=True))
        / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        * w[n + ".weight"]
        + w[n + ".bias"]
    )
    linear = lambda x, n: x @ w[n + ".weight"].T + w[n + ".bias"]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(gpt.config.n_layer):
        heads = []
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(D, -1)
        for part in torch.arange(D).split(D // H):
            scores = q[:, part] @ k[:, part].T / math.sqrt(D // H)
            scores[torch.ones(T, T).triu(1).bool()] = -math.inf
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"h.{i}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("sizes", [{"n_head": 1}, {"n_head": 4}, {"n_layer": 3}], ids=str)
def test_the_forward_pass_is_gpt2s_formula(sizes):
    gpt = tiny(d_model=16, **sizes)
    tokens = tokens_of(2, 11)
    close(gpt(tokens), torch.stack([by_hand(gpt, row) for row in tokens]))


def test_parameters_have_gpt2s_names_and_shapes():
    block = {
        "ln_1.weight": (8,),
        "ln_1.bias": (8,),
        "attn.c_attn.weight": (24, 8),
        "attn.c_attn.bias": (24,),
        "attn.c_proj.weight": (8, 8),
        "attn.c_proj.bias": (8,),
        "ln_2.weight": (8,),
        "ln_2.bias": (8,),
        "mlp.c_fc.weight": (32, 8),
        "mlp.c_fc.bias": (32,),
        "mlp.c_proj.weight": (8, 32),
        "mlp.c_proj.bias": (8,),
    }
    wanted = {"wte.weight": (V, 8), "wpe.weight": (32, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    wanted |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    found = {name: tuple(p.shape) for name, p in tiny(d_model=8).state_dict().items()}
    assert found == wanted  # no lm_head: the embedding is the head


def test_the_head_is_the_embedding():
    gpt = tiny(d_model=16)
    hidden = gpt.hidden(tokens_of(1, 5))
    close(gpt(tokens_of(1, 5)), hidden @ gpt.wte.weight.T)
    gpt.wte.weight.data *= 2
    close(gpt.head(hidden), hidden @ gpt.wte.weight.T)


def test_initial_weights_have_the_stated_spread():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=512, block_size=128, n_layer=3, n_head=4, d_model=96))
    std = 0.02 * math.sqrt(768 / 96)
    for name, p in gpt.named_parameters():
        if p.dim() == 2:
            residual = name.endswith("c_proj.weight")
            wanted = std / math.sqrt(2 * 3) if residual else std
            assert abs(p.std().item() / wanted - 1) < 0.05, name
            assert abs(p.mean().item()) < 5 * wanted / math.sqrt(p.numel()), name
        else:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name


def left_padded(gpt, tokens, mask, pieces=None):
    """Logits of left-padded rows, which only a cache takes, written in pieces."""
    cache = KVCache(gpt.config, (~mask).sum(1), tokens.shape[1], gpt.wte.weight.dtype)
    found = []
    for piece in tokens.split(pieces or [tokens.shape[1]], 1):
        cache.reach(min(cache.used.item() + len(piece[0]) + 2, tokens.shape[1]))
        found.append(gpt(piece, cache))
    return torch.cat(found, 1)


@pytest.fixture(params=[False, True], ids=["", "static"])
def static(request, monkeypatch):
    """A cache as on a CPU, and as on a GPU."""
    monkeypatch.setattr(sampling, "is_static", lambda device: request.param)


FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@FIXTURE
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_cached_logits_are_the_full_ones(static, pieces, seed):
    tokens = tokens_of(3, sum(pieces), seed=seed)
    close(left_padded(GPT_64, tokens, tokens >= 0, pieces), GPT_64(tokens))


@FIXTURE
@given(rows_of_tokens, st.integers(1, 4), st.integers(0, 9), st.integers(0, V - 1))
def test_cached_logits_of_left_padded_rows_are_the_full_ones(static, rows, more, extra, garbage):
    """Whatever the amount of padding, and whatever stands under it."""
    tokens, mask = pad(rows, garbage, left=True)
    tokens, mask = F.pad(tokens, (extra, 0), value=garbage), F.pad(mask, (extra, 0), value=False)
    tokens = torch.cat([tokens, tokens_of(len(rows), more)], 1)
    mask = F.pad(mask, (0, more), value=True)
    pieces = [tokens.shape[1] - more] + [1] * more
    found = left_padded(GPT_64, tokens, mask, pieces)
    for i, row in enumerate(tokens):
        close(found[i][mask[i]], GPT_64(row[mask[i]][None])[0])


@given(rows_of_tokens, st.integers(0, 9), st.integers(0, V - 1))
def test_padding_on_the_right_never_matters(rows, extra, garbage):
    tokens, mask = pad([*rows, [1] * (12 + extra)], garbage)
    found = GPT_64(tokens)
    for i, row in enumerate(rows):
        close(found[i][mask[i]], GPT_64(torch.tensor([row]))[0])


@given(rows_of_tokens, st.integers(0, 2))
def test_the_trunk_and_what_is_above_it_make_the_whole(rows, n):
    tokens, _ = pad(rows, PAD)
    assert torch.equal(GPT_64.above(GPT_64.trunk(tokens, n), n), GPT_64.hidden(tokens))


def test_left_padding_beyond_the_block_size_is_no_error():
    gpt = tiny(d_model=16, block_size=6)
    tokens, mask = pad([[1, 2, 3], [4]], PAD, left=True)
    tokens, mask = F.pad(tokens, (5, 0), value=PAD), F.pad(mask, (5, 0), value=False)
    close(left_padded(gpt, tokens, mask)[0][mask[0]], gpt(torch.tensor([[1, 2, 3]]))[0])
    with pytest.raises(AssertionError, match="positions of 6"):
        gpt(tokens)


@given(st.integers(0, 9), st.integers(0, V - 2))
def test_a_token_changes_no_earlier_logit_and_all_later_ones(position, other):
    tokens = tokens_of(1, 10)
    changed = tokens.clone()
    changed[0, position] = (changed[0, position] + 1 + other) % V
    difference = (GPT_64(tokens) - GPT_64(changed)).abs().amax(-1)[0]  # (T,)
    assert (difference[:position] == 0).all()
    if (tokens != changed).any():
        assert (difference[position:] > 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_fully_padded_row_gives_no_nan(dtype):
    gpt = tiny(d_model=16, dtype=dtype)
    tokens, mask = tokens_of(2, 5), torch.tensor([[True] * 5, [False] * 5])
    with torch.no_grad():
        assert left_padded(gpt, tokens, mask).isfinite().all()


@pytest.mark.parametrize("kind", ["causal", "masked", "one token", "cached"])
def test_bfloat16_attention_on_a_cpu_is_the_kernels(kind):
    torch.manual_seed(0)
    S, T = 9, {"one token": 1, "cached": 3}.get(kind, 9)
    q, k, v = [torch.randn(2, 4, n, 8, dtype=torch.bfloat16) for n in (T, S, S)]
    allowed = None
    if kind in ("masked", "cached"):
        allowed = torch.arange(S) <= torch.arange(S - T, S)[:, None]
        allowed = allowed & (torch.rand(2, 1, T, S) < 0.7)
        allowed[..., 0] = True
    close = lambda a, b: torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.03)
    causal = kind == "causal"
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=allowed, is_causal=causal)
    narrow = [x.requires_grad_() for x in (q, k, v)]
    bias = None if allowed is None else additive(allowed, torch.bfloat16)
    found = attention(*narrow, bias, 0.0)
    assert found.dtype == torch.bfloat16
    close(found, wanted)
    found.float().sum().backward()
    wanted.sum().backward()
    for a, b in zip(narrow, wide):
        close(a.grad, b.grad)


def test_a_bfloat16_model_is_near_the_float32_one():
    wide, narrow = [tiny(d_model=32, dtype=t) for t in (torch.float32, torch.bfloat16)]
    tokens, mask = pad([[1, 2, 3, 4], [5, 6]], PAD, left=True)
    for run in (lambda gpt: left_padded(gpt, tokens, mask), lambda gpt: gpt(tokens)):
        difference = (run(wide) - run(narrow).float())[mask].abs().max()
        assert difference < 0.05 * run(wide)[mask].abs().max()


def test_scores_and_values_of_a_bfloat16_model_are_as_fine_as_float32():
    """A head that answers in bfloat16 gives hundreds of texts the same few scores."""
    torch.manual_seed(1)
    reward = RewardModel(tiny(d_model=32, dtype=torch.bfloat16)).to(torch.bfloat16)
    critic = ActorCritic(reward.gpt).to(torch.bfloat16)
    torch.nn.init.normal_(critic.value_head.weight)
    tokens = tokens_of(512, 8).unique(dim=0)
    rows = {"tokens": tokens, "states": torch.full((len(tokens), 1), 7)}
    for found in (reward(tokens)[:, -1], critic(rows)[1]):
        assert found.dtype == torch.float32 and len(found.unique()) > 0.99 * len(tokens)


def test_dropout_acts_in_training_only():
    gpt = tiny(d_model=16, dropout=0.5)
    tokens = tokens_of(1, 8)
    close(gpt(tokens), gpt(tokens))
    gpt.train()
    assert not torch.equal(gpt(tokens), gpt(tokens))


def loss_and_gradients(gpt, grad_checkpointing):
    """Of a fixed batch, with the same dropout every time; and the bytes that backward needs."""
    gpt.grad_checkpointing, tokens = grad_checkpointing, tokens_of(3, 24)
    kept = {}
    keep = lambda x: kept.update({x.untyped_storage()._cdata: (x, x.untyped_storage().nbytes())})
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: keep(x) or x, lambda x: x):
        logits = gpt(tokens)
    loss = logits.log_softmax(-1)[..., 3].sum()
    gradients = torch.autograd.grad(loss, list(gpt.parameters()))
    return loss, gradients, sum(size for _, size in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_grad_checkpointing_changes_memory_and_nothing_else(dropout):
    gpt = tiny(d_model=16, n_layer=4, dropout=dropout).train()
    loss, gradients, size = loss_and_gradients(gpt, False)
    again, same_gradients, less = loss_and_gradients(gpt, True)
    assert torch.equal(loss, again) and less < 0.5 * size
    for a, b in zip(gradients, same_gradients):
        close(a, b, 1e-12)
    torch.manual_seed(8)
    assert dropout == 0 or not torch.equal(gpt(tokens_of(3, 24)), gpt(tokens_of(3, 24)))


def test_grad_checkpointing_leaves_cached_and_gradless_passes_alone(monkeypatch):
    gpt, tokens = tiny(d_model=16), tokens_of(2, 8)
    gpt.grad_checkpointing = True
    wanted = gpt(tokens)
    monkeypatch.setattr("nanorlhf.model.checkpoint", None)  # a call would be an error
    with torch.no_grad():
        close(gpt(tokens), wanted)
    close(left_padded(gpt, tokens, tokens >= 0), wanted)
    with pytest.raises(TypeError):
        gpt(tokens)


# ---- reward model, actor-critic ----------------------------------------------------------------


@given(rows_of_tokens)
def test_the_score_is_read_at_the_last_real_token(rows):
    torch.manual_seed(0)
    model = RewardModel(GPT_64).double()
    tokens, mask = pad(rows, PAD)
    found = model.score(tokens, mask)
    for row, score in zip(rows, found):
        last = GPT_64.hidden(torch.tensor([row]))[0, -1]
        close(score, model.score_head(last)[0])


def test_scores_are_standardised_by_the_stored_constants():
    model = RewardModel(GPT_64).double()
    tokens, mask = pad([[1, 2, 3], [4, 5]], PAD)
    raw = model.score(tokens, mask)
    model.score_mean.fill_(1.5)
    model.score_sd.fill_(4.0)
    close(model.score(tokens, mask), (raw - 1.5) / 4.0, 1e-6)
    assert {"score_mean", "score_sd"} <= set(model.state_dict())


def test_the_reward_head_starts_at_one_over_root_width_and_no_bias():
    torch.manual_seed(0)
    head = RewardModel(tiny(d_model=2048, n_layer=1, dtype=torch.float32)).score_head
    assert abs(head.weight.std().item() * math.sqrt(2049) - 1) < 0.06
    assert head.bias.item() == 0


def states_of(starts, T, S):
    """Where responses of T tokens begin behind prompts of so many, in rows of S."""
    return (torch.tensor(starts)[:, None] - 1 + torch.arange(T)).clamp(max=S - 1)


def test_values_and_logits_belong_to_the_state_before_each_token():
    policy = ActorCritic(tiny(d_model=16)).double()
    torch.nn.init.normal_(policy.value_head.weight)
    tokens, P = tokens_of(2, 9), 4
    states = states_of([P, P - 1], 5, 9)
    logits, values = policy({"tokens": tokens, "states": states})
    assert values.shape == (2, 5) and logits.shape == (2, 5, V)
    close(logits[0], policy.gpt(tokens)[0, P - 1 : -1])
    close(logits[1], policy.gpt(tokens)[1, P - 2 : -2])
    for t in range(5):  # as if the text ended before token t: nothing later is seen
        hidden = policy.gpt.hidden(tokens[:1, : P + t])[:, -1]
        close(values[:1, t], policy.value_head(hidden)[:, 0])
    changed = tokens.clone()
    changed[0, P] = (changed[0, P] + 1) % V
    again = policy({"tokens": changed, "states": states})
    close(again[1][0, 0], values[0, 0])
    assert again[1][0, 1] != values[0, 1]


@pytest.mark.parametrize("n", [1, 2])
def test_a_frozen_trunk_that_ran_before_changes_nothing_but_the_time(n):
    policy = ActorCritic(tiny(d_model=16)).double()
    torch.nn.init.normal_(policy.value_head.weight)
    tokens, states = tokens_of(2, 9), states_of([4, 3], 5, 9)
    freeze_layers(policy.gpt, n)
    reference = frozen_reference(policy.gpt)
    rows = {"tokens": tokens, "states": states}
    found = [policy(rows), policy(rows | {"trunk": reference.trunk(tokens, n)})]
    trained = [p for p in policy.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in out), trained) for out in found]
    for a, b in zip([*found[0], *grads[0]], [*found[1], *grads[1]]):
        assert torch.equal(a, b)


def test_a_separate_critic_gives_its_scores_of_the_same_positions():
    critic = RewardModel(tiny(seed=1, d_model=16)).double()
    policy = ActorCritic(tiny(d_model=16), critic)
    tokens, mask = tokens_of(2, 7), torch.ones(2, 7, dtype=torch.bool)
    _, values = policy({"tokens": tokens, "states": states_of([3, 3], 4, 7)})
    for t in range(4):
        close(values[:, t], critic.score(tokens[:, : 3 + t], mask[:, : 3 + t]), 1e-6)


def test_the_value_head_starts_at_zero():
    policy = ActorCritic(tiny(d_model=16)).double()
    _, values = policy({"tokens": tokens_of(2, 6), "states": states_of([3, 3], 3, 6)})
    assert (values == 0).all()


def test_without_a_critic_there_is_no_value_and_nothing_to_train_for_it():
    gpt = tiny(d_model=16)
    policy = ActorCritic(gpt, "none")
    rows = {"tokens": tokens_of(2, 6), "states": states_of([3, 3], 3, 6)}
    logits, values = policy(rows)
    assert values is None
    close(logits, gpt(rows["tokens"])[:, 2:5])
    assert len(list(policy.parameters())) == len(list(gpt.parameters()))


# ---- freezing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2])
def test_freezing_n_blocks_trains_only_what_lies_above(n):
    gpt = tiny(d_model=16)
    freeze_layers(gpt, n)
    frozen = {name for name, p in gpt.named_parameters() if not p.requires_grad}
    below = ("wte.", "wpe.", *(f"h.{i}." for i in range(n)))
    assert frozen == {name for name, _ in gpt.named_parameters() if n and name.startswith(below)}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_reference_shares_exactly_the_frozen_tensors_and_does_not_move(n):
    gpt = tiny(d_model=16)
    freeze_layers(gpt, n)
    reference = frozen_reference(gpt)
    for (name, p), q in zip(gpt.named_parameters(), reference.parameters()):
        assert (p.data_ptr() == q.data_ptr()) == (not p.requires_grad), name
        assert not q.requires_grad
    tokens = tokens_of(2, 8)
    before = reference(tokens)
    close(before, gpt(tokens))
    trained = [p for p in gpt.parameters() if p.requires_grad]
    gpt(tokens).square().mean().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(reference(tokens), before)
    assert not torch.allclose(gpt(tokens), before)


def test_more_frozen_layers_than_there_are_is_an_error():
    with pytest.raises(SystemExit, match="--freeze_layers 3: the model has 2 blocks"):
        freeze_layers(tiny(d_model=16), 3)
