"""llama.py: its formula, the cache, padding, and that transformers makes the same of its family."""

import json
import math

import pytest
import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import sampling
from nanorlhf.data.batches import pad
from nanorlhf.data.files import write_records
from nanorlhf.hf import folder as hf
from nanorlhf.llama import Llama, LlamaConfig, frequencies
from nanorlhf.loading import load_gpt
from nanorlhf.model import ActorCritic, RewardModel, attention, freeze_layers, frozen_reference
from nanorlhf.run import checkpoint
from nanorlhf.tools import export
from tests.helpers import refused
from tests.hf import test_load
from tests.tools.test_evaluate import save

torch.set_num_threads(1)
V, PAD = 40, 39
SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
SCALED["original_max_position_embeddings"] = 16
KINDS = {  # what each member of the family has of its own
    "llama": {"is_tied": False},
    "smollm2": {},
    "llama3": {"rope_scaling": SCALED, "rope_theta": 500.0},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "is_tied": False, "d_head": 12},
    "smollm3": {"nope_every": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
tokenizer = test_load.tokenizer  # the fixture


def tiny(kind="llama", dtype=torch.float64, vocab_size=V, **more):
    """A small model whose biases and norms are not at their initial 0 and 1."""
    torch.manual_seed(3)
    sizes = {"block_size": 32, "n_layer": 3, "n_head": 4, "d_model": 24, "n_kv_head": 2}
    sizes |= {"d_head": 6, "d_mlp": 20} | KINDS[kind] | more
    model = Llama(LlamaConfig(vocab_size, **sizes))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


def tokens_of(*shape):
    return torch.randint(0, V - 1, shape, generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def by_hand(model, tokens):
    """The forward pass for one row of tokens (T,), a head and a position at a time."""
    c, w = model.config, dict(model.named_parameters())
    size = lambda x: (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
    norm = lambda x, name: x / size(x) * w[name + ".weight"]
    silu = lambda x: x / (1 + (-x).exp())
    turn, sizes = frequencies(c, "cpu").double(), [c.n_head, c.n_kv_head, c.n_kv_head]

    def rotated(x, t):  # (E,) as complex numbers, which are turned
        z = torch.complex(x[: c.d_head // 2], x[c.d_head // 2 :])
        z = z * torch.exp(1j * t * turn)
        return torch.cat([z.real, z.imag])

    x = w["wte.weight"][tokens]
    for i in range(c.n_layer):
        layer = f"h.{i}."
        h = norm(x, layer + "ln_1") @ w[layer + "attn.c_attn.weight"].T
        h = h + w.get(layer + "attn.c_attn.bias", 0)
        q, k, v = (
            y.unflatten(-1, (-1, c.d_head)) for y in h.split([n * c.d_head for n in sizes], -1)
        )
        if c.qk_norm:
            q, k = norm(q, layer + "attn.q_norm"), norm(k, layer + "attn.k_norm")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for head in range(c.n_head):
                group = head // (c.n_head // c.n_kv_head)
                is_rotated = not c.nope_every or (i + 1) % c.nope_every
                turned = rotated if is_rotated else lambda x, _: x
                at = turned(q[t, head], t)
                keys = torch.stack([turned(k[s, group], s) for s in range(t + 1)])
                weights = (keys @ at / math.sqrt(c.d_head)).softmax(0)
                heads.append(weights @ v[: t + 1, group])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w[layer + "attn.c_proj.weight"].T
        gate, up = (norm(x, layer + "ln_2") @ w[layer + "mlp.c_fc.weight"].T).chunk(2, -1)
        x = x + (silu(gate) * up) @ w[layer + "mlp.c_proj.weight"].T
    return norm(x, "ln_f") @ w["wte.weight" if c.is_tied else "lm_head.weight"].T


@each_kind
def test_the_forward_pass_is_the_formula(kind):
    model, tokens = tiny(kind), tokens_of(9)
    close(model(tokens[None])[0], by_hand(model, tokens))


@pytest.mark.parametrize("static", [False, True])
@each_kind
def test_cached_logits_of_left_padded_rows_are_the_full_ones(monkeypatch, kind, static):
    monkeypatch.setattr(sampling, "is_static", lambda device: static)
    model, rows = tiny(kind), [tokens_of(n).tolist() for n in (3, 9, 6)]
    tokens, mask = pad(rows, PAD, left=True)
    cache = sampling.KVCache(model.config, (~mask).sum(1), tokens.shape[1] + 4, model.dtype)
    cache.reach(tokens.shape[1] + 4)
    more = tokens_of(3, 4)
    found = [model(tokens, cache), *(model(more[:, i : i + 1], cache) for i in range(4))]
    found = torch.cat(found, 1)
    for i, row in enumerate(rows):
        whole = model(torch.tensor([row + more[i].tolist()]))[0]
        close(found[i, tokens.shape[1] - len(row) :], whole)


@each_kind
def test_padding_on_the_right_never_matters(kind):
    model, rows = tiny(kind), [tokens_of(n).tolist() for n in (3, 9, 6)]
    logits = model(pad(rows, PAD)[0])
    for i, row in enumerate(rows):
        close(logits[i, : len(row)], model(torch.tensor([row]))[0])


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_attention_with_shared_keys_is_the_kernels(causal):
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, h, 7, 8).bfloat16() for h in (6, 2, 2))
    bias = None if causal else torch.randn(2, 1, 7, 7).bfloat16()
    repeated = k.repeat_interleave(3, 1).float(), v.repeat_interleave(3, 1).float()
    wide = None if causal else bias.float()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.float(), *repeated, attn_mask=wide, is_causal=causal
    )
    close(attention(q, k, v, bias, 0.0).float(), wanted, 3e-2)
    one = attention(q[:, :, :1], k, v, None, 0.0).float()  # a single token sees all keys
    alone = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1].float(), *repeated)
    close(one, alone, 3e-2)


def test_a_kernel_may_return_its_result_in_any_order_of_memory(monkeypatch):
    """As CUDA's does for a single token."""
    q, k, v = (torch.randn(2, h, n, 8) for h, n in ((6, 1), (2, 7), (2, 7)))
    wanted = attention(q, k, v, None, 0.0)
    kernel = torch.nn.functional.scaled_dot_product_attention
    turned = lambda *a, **k: kernel(*a, **k).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", turned)
    close(attention(q, k, v, None, 0.0), wanted)


@pytest.mark.parametrize("n", [0, 1, 3])
@each_kind
def test_a_frozen_trunk_is_shared_and_the_rest_trained(kind, n):
    model, tokens = tiny(kind), tokens_of(2, 8)
    freeze_layers(model, n)
    reference = frozen_reference(model)
    close(model.above(model.trunk(tokens, n), n), model.hidden(tokens))
    model(tokens).sum().backward()
    ends = {"wte.weight", "lm_head.weight"} if n else set()
    for name, p in model.named_parameters():
        is_frozen = name in ends or name.startswith("h.") and int(name.split(".")[1]) < n
        assert (p.grad is None) == is_frozen, name
        shared = dict(reference.named_parameters())[name]
        assert (shared is p) == is_frozen


def test_a_reward_model_has_no_head_that_nothing_trains():
    model = RewardModel(tiny("llama")).double()
    assert "gpt.lm_head.weight" not in model.state_dict()
    tokens = tokens_of(2, 8)
    model.score(tokens, torch.ones(2, 8, dtype=torch.bool)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    critic = ActorCritic(tiny("llama"), RewardModel(tiny("llama")))
    assert critic.gpt.lm_head is not None


@each_kind
def test_a_checkpoint_keeps_what_it_is(tmp_path, kind, tokenizer):
    model = tiny(kind, torch.float32, tokenizer.vocab_size)
    judge = RewardModel(tiny(kind, torch.float32, tokenizer.vocab_size))
    for stage, net in (("gpt", model), ("rm", judge)):
        found, about = checkpoint.load_model(save(tmp_path / stage, stage, net, tokenizer))
        assert about.model_config == model.config
        for name, w in net.state_dict().items():
            assert torch.equal(found.state_dict()[name], w)


# ---- in and out --------------------------------------------------------------------------------


def theirs(kind, **more):
    """A small random model of transformers, with no weight at its initial value."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 5e3}
    if kind == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 500.0} | SCALED
    make = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    make |= {"smollm3": transformers.SmolLM3Config, "mistral": transformers.MistralConfig}
    if kind == "smollm3":
        more |= {"no_rope_layer_interval": 2, "pad_token_id": 0}
    config = make.get(kind, transformers.LlamaConfig)(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=KINDS.get(kind, {}).get("is_tied", True),
        rope_parameters=rope,
        **({"head_dim": 16} if kind == "qwen3" else {}) | more,
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.5)
    return model


def read(folder):
    config = hf.model_config_of(hf.read_json(folder / "config.json"), folder)
    model = Llama(config)
    model.load_state_dict(hf.convert(hf.read_weights(folder), config, folder))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_logits_are_transformers(tmp_path, kind):
    """Plain, padded on the right, and padded on the left as in generation."""
    reference = theirs(kind)
    reference.save_pretrained(tmp_path)
    model = read(tmp_path)
    tokens = torch.randint(0, 97, (3, 40))
    close(model(tokens), reference(tokens).logits, 1e-4)
    real = torch.arange(40) < torch.tensor([[40], [25], [11]])
    right = reference(tokens, attention_mask=real.long()).logits
    close(model(tokens)[real], right[real], 1e-4)
    left = real.flip(1)
    positions = (left.cumsum(1) - 1).clamp(min=0)
    wanted = reference(tokens, attention_mask=left.long(), position_ids=positions).logits
    cache = sampling.KVCache(model.config, (~left).sum(1), 40, torch.float32)
    close(model(tokens, cache)[left], wanted[left], 1e-4)


@torch.no_grad()
@each_kind
def test_an_export_is_what_transformers_makes_of_it(tmp_path, kind, tokenizer, capsys):
    transformers = pytest.importorskip("transformers")
    model = tiny(kind, torch.float32, tokenizer.vocab_size)
    save(tmp_path / "gpt", "gpt", model, tokenizer, chat=False)
    export.main(export.Config(str(tmp_path / "gpt"), str(tmp_path / "out")))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    family = {"qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}.get(kind, "Llama")
    assert type(reference).__name__ == family + "ForCausalLM"
    tokens = torch.randint(0, 200, (2, 20))
    close(reference(tokens).logits, model(tokens), 1e-4)
    back, found = load_gpt(tmp_path / "out")
    assert found.model_config == model.config
    for name, w in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], w), name
    if kind != "qwen2":  # to which transformers gives Qwen's own pattern, whatever the files say
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert words("A fox, 12 hens.")["input_ids"] == found.tokenizer.encode("A fox, 12 hens.")
    judge = RewardModel(model)
    judge.score_mean.fill_(0.7)
    judge.score_sd.fill_(1.9)
    save(tmp_path / "rm", "rm", judge, tokenizer)
    export.main(export.Config(str(tmp_path / "rm"), str(tmp_path / "judge")))
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    shift = json.loads((tmp_path / "judge/config.json").read_text())["nanorlhf_score_shift"]
    wanted = judge.score(tokens, torch.ones(2, 20, dtype=torch.bool))
    close(scorer.eval()(tokens).logits[:, 0] + shift, wanted, 1e-4)


WRONG = {
    "a scaling": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
    "an older scaling": ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "'linear'"),
    "a scaling that is none": ({"rope_parameters": 1}, "rope_parameters is 1"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "another type": ({"model_type": "gemma3"}, "LlamaForCausalLM"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "an activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "a window": ({"use_sliding_window": True}, "use_sliding_window"),
    "no width": ({"hidden_size": None}, "hidden_size is None"),
    "groups": ({"num_key_value_heads": 4}, "no sizes"),
    "an odd head": ({"head_dim": 7}, "no sizes"),
    "an epsilon": ({"rms_norm_eps": "x"}, "no sizes"),
    "more layers": ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
    "another pattern": ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
    "fewer layers": ({"num_hidden_layers": 2}, "model.layers.2."),
    "a wider MLP": ({"intermediate_size": 96}, "h.0.mlp.c_fc.weight has shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, what):
    theirs("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | WRONG[what][0]))
    assert WRONG[what][1] in refused(capsys, read, tmp_path)


def test_the_configs_of_transformers_4_are_read(tmp_path):
    theirs("llama3").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    rope = about.pop("rope_parameters")
    new = hf.model_config_of(about | {"rope_parameters": rope}, tmp_path)
    about |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert hf.model_config_of(about, tmp_path) == new and new.rope_scaling == SCALED


def test_within_its_window_mistral_is_a_llama(tmp_path):
    theirs("mistral", sliding_window=20).save_pretrained(tmp_path)
    assert read(tmp_path).config.block_size == 20


# ---- the stages --------------------------------------------------------------------------------


def test_all_four_stages_train_a_llama(tmp_path):
    prompts = [f"write {i}" for i in range(40)]
    demos = [{"prompt": p, "completion": "abc"[i % 3] * 3} for i, p in enumerate(prompts)]
    pairs = [{"prompt": p, "chosen": "aaa", "rejected": "bbb"} for p in prompts]
    demos, pairs = (
        [write_records(tmp_path / f"{n}.jsonl", r)] for n, r in (("d", demos), ("p", pairs))
    )
    flags = {"device": "cpu", "dtype": "float32", "max_steps": 3, "batch_size": 8}
    at = lambda name: str(tmp_path / name)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 16, "block_size": 32, "tokenizer": "bytes"}
    train_gpt.main(train_gpt.Config(at("gpt"), data=demos, arch="llama", **sizes | flags))
    assert isinstance(load_gpt(at("gpt"))[0], Llama)
    start = {"init": at("gpt"), "data": demos, "max_new_tokens": 6}
    train_sft.main(train_sft.Config(at("sft"), freeze_layers=1, **start | flags))
    before, after = (load_gpt(at(name))[0].state_dict() for name in ("gpt", "sft"))
    for name, w in before.items():
        is_frozen = name == "wte.weight" or name.startswith("h.0.")
        assert torch.equal(after[name], w) == is_frozen, name
    start |= {"init": at("sft"), "data": pairs}
    report = train_rm.main(train_rm.Config(at("rm"), freeze_layers=1, **start | flags))
    assert report["score_sd"] > 0
    flags |= {"minibatch_size": 4, "eval_prompts": 2, "grad_checkpointing": True}
    start |= {"reward": at("rm"), "critic": "separate"}
    row = train_ppo.main(train_ppo.Config(at("ppo"), freeze_layers=1, **start | flags))
    assert row["eval_kl_exact"] >= 0


def test_checkpointing_rotates_what_is_rotated_without_it():
    """Where every second block leaves positions out: which block it is, a recomputed one knows."""
    torch.manual_seed(0)
    config = LlamaConfig(50, 32, 4, 2, 32, n_kv_head=1, d_head=16, d_mlp=64, nope_every=2)
    gpt, tokens, losses = config.build(), torch.randint(50, (2, 9)), []
    for gpt.grad_checkpointing in (False, True):
        losses.append(gpt(tokens).logsumexp(-1).mean())
    assert torch.equal(*losses)
