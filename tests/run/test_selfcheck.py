"""`--check`: healthy stages pass it, whatever their flags; each broken mechanic is named; and a run
that was checked is bit for bit the run that was not.

The stages start from random weights that end a text now and then: a check needs no skill.
"""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_gpt
import train_ppo
import train_rm
import train_sft
from nanorlhf import engine, functional, model, rollout, sampling
from nanorlhf.config import TrainConfig
from nanorlhf.data import batches
from nanorlhf.model import GPT, ActorCritic, GPTConfig, RewardModel
from nanorlhf.run import checkpoint, selfcheck
from nanorlhf.tokenizer import Tokenizer, byte_tokenizer
from tests.test_stages import PROMPTS, feedback, letters, write

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id
SIZES = GPTConfig(TOKENIZER.vocab_size, block_size=32, n_layer=2, n_head=2, d_model=32)
SCRIPTS = {"gpt": train_gpt, "sft": train_sft, "rm": train_rm, "ppo": train_ppo}


def make_start(folder):
    """Checkpoints sft and rm with random weights, and the data of all stages."""
    torch.manual_seed(0)
    rng, sft, rm = random.Random(1), GPT(SIZES), RewardModel(GPT(SIZES))
    sft.wte.weight.data *= 2  # some tokens are likelier than others
    towards_eos = sft.wte.weight.data[TOKENIZER.eos_id]
    sft.ln_f.bias.data += 2.5 * towards_eos / towards_eos.norm()
    rm.score_mean.fill_(0.1)
    for stage, net in (("sft", sft), ("rm", rm)):
        cfg = TrainConfig(out_dir=str(folder / stage))
        Path(cfg.out_dir).mkdir()
        weights = {name: w.detach() for name, w in net.state_dict().items()}
        checkpoint.save(cfg, stage, 1, weights, {}, TOKENIZER, SIZES, best=1)
    write(folder, "demos", [{"prompt": p, "completion": letters(rng)} for p in PROMPTS])
    write(folder, "text", [{"text": f"{p} {letters(rng)}"} for p in PROMPTS])
    write(folder, "prompts", [{"prompt": p + " " * rng.randint(0, 8)} for p in PROMPTS])
    for kind in ("rankings", "comparisons", "ratings", "thumbs"):
        write(folder, kind, feedback(kind, rng))
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("start"))


def config(stage, start, **flags):
    at = lambda name: str(start / name)
    data = {"gpt": "text", "sft": "demos", "rm": "rankings", "ppo": "prompts"}[stage]
    common = {"device": "cpu", "dtype": "float32", "out_dir": at(f"out_{stage}"), "max_steps": 2}
    common |= {"data": [at(f"{data}.jsonl")], "eval_every": 9, "save_every": 9, "batch_size": 8}
    special = {
        "gpt": {
            "tokenizer": "bytes",
            "n_layer": 1,
            "n_head": 2,
            "d_model": 16,
            "block_size": 24,
            "sample_tokens": 4,
        },
        "sft": {"init": at("sft"), "max_new_tokens": 4},
        "rm": {"init": at("sft")},
        "ppo": {
            "init": at("sft"),
            "reward": at("rm"),
            "minibatch_size": 4,
            "eval_prompts": 2,
            "max_new_tokens": 14,
        },
    }[stage]
    return SCRIPTS[stage].Config(**common | special | flags)


class Starts(Exception):
    """Raised where training would start."""


class Mistake(Exception):
    """Raised where the run would end."""


def verdict(stage, start, **flags):
    """What a run of the stage is told by its check; "" where it would now train."""

    def starts(*args):
        raise Starts

    def says(message):
        raise Mistake(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Log", starts)
        patch.setattr(train_ppo, "Log", starts)
        patch.setattr(selfcheck, "die", says)
        try:
            SCRIPTS[stage].main(config(stage, start, **flags))
        except Starts:
            return ""
        except Mistake as mistake:
            return str(mistake)


# ---- healthy runs ------------------------------------------------------------------------------

TICKS = {
    "gpt": "cache padding eos mask",
    "sft": "cache padding eos mask",
    "rm": "cache padding eos mask",
    "ppo": "eos mask ratio kl cache padding temperature rewards score",
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_healthy_stage_is_ticked_off_in_one_line(start, capsys, stage, dtype):
    assert verdict(stage, start, dtype=dtype) == ""
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "checks:" in x]
    ticks = "  ".join(f"{name} ✓" for name in TICKS[stage].split())
    where = r"\(what each has tested: docs/trouble.md\)"
    assert re.fullmatch(rf"\[{stage}\] checks: {ticks}  {where}", line), line


HEALTHY = [
    ("gpt", {"dropout": 0.3, "grad_accum": 8}),
    ("sft", {"dropout": 0.3, "grad_checkpointing": True}),
    ("sft", {"batch_size": 1}),
    ("rm", {"from_scratch": True, "grad_accum": 3}),
    ("rm", {"data": "comparisons"}),
    ("rm", {"data": "ratings"}),
    ("rm", {"data": "thumbs"}),
    ("ppo", {"critic": "separate", "freeze_layers": 1, "kl_loss_coef": 0.5}),
    ("ppo", {"critic": "none", "freeze_layers": 2, "dtype": "bfloat16"}),
    ("ppo", {"temperature": 1.5, "minibatch_size": 8, "grad_accum": 8, "batch_size": 8}),
    ("ppo", {"vf_coef": 0.0, "rollouts_per_prompt": 2, "entropy_coef": 0.1}),
    ("ppo", {"max_new_tokens": 1, "batch_size": 1, "minibatch_size": 1}),
]


@pytest.mark.parametrize("stage, flags", HEALTHY, ids=str)
def test_no_flag_and_no_kind_of_feedback_is_a_mistake(start, stage, flags):
    flags = flags | ({"data": [f"{start}/{flags['data']}.jsonl"]} if "data" in flags else {})
    assert verdict(stage, start, **flags) == ""


def test_a_function_that_rewards_is_not_asked(start, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def size(p, r):\n    raise ValueError\n")
    assert verdict("ppo", start, reward=f"{tmp_path}/r.py:size") == ""
    assert "score" not in capsys.readouterr().out


MIX = """
import nanorlhf
judge, tokenizer = nanorlhf.load({!r}, device="cpu", dtype="bfloat16")

def mix(prompts, responses):
    scores = nanorlhf.score(judge, tokenizer, prompts, responses)
    mean = sum(map(len, responses)) / len(responses)
    return [10 * x - 0.1 * (len(r) - mean) for x, r in zip(scores, responses)]
"""


def mixed_with(score_of_the_whole_batch):
    """A fork whose scorer adds to the reward model's scores what it likes."""

    def inject(patch):
        make = train_ppo.make_rewards

        def make_mixed(*args):
            score = make(*args)
            return lambda p, ids, texts: score(p, ids, texts) + score_of_the_whole_batch(ids)

        patch.setattr(train_ppo, "make_rewards", make_mixed)

    return inject


def above_the_mean_length(ids):
    lengths = torch.tensor([float(len(row)) for row in ids])
    return 0.1 * (lengths - lengths.mean())


MIXED = [mixed_with(above_the_mean_length), mixed_with(lambda ids: torch.randn(len(ids)))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_who_mixes_a_reward_model_with_something_else_is_not_accused(
    start, tmp_path, monkeypatch, capsys, dtype
):
    """As a function for --reward, in a unit and a precision of its own, and in a fork."""
    (tmp_path / "my.py").write_text(MIX.format(str(start / "rm")))
    assert verdict("ppo", start, dtype=dtype, reward=f"{tmp_path}/my.py:mix") == ""
    for inject in MIXED:
        with monkeypatch.context() as patch:
            inject(patch)
            assert verdict("ppo", start, dtype=dtype) == ""
            assert "score ✓" in capsys.readouterr().out
            last_column(patch)
            assert checked_name(verdict("ppo", start, dtype=dtype)) == "score"


def test_a_forks_judge_that_is_no_reward_model_is_not_ticked_off(start, monkeypatch, capsys):
    always = lambda *_: lambda p, ids, texts: above_the_mean_length(ids)
    monkeypatch.setattr(train_ppo, "make_rewards", always)
    assert verdict("ppo", start) == ""
    assert "score – (no reward model was read)" in capsys.readouterr().out


def test_a_second_reward_model_of_another_vocabulary_is_no_mistake(start, monkeypatch):
    sizes = replace(SIZES, vocab_size=SIZES.vocab_size // 4)
    small = RewardModel(GPT(sizes)).eval()
    said = lambda ids: small(torch.tensor([row[:1] for row in ids]) % sizes.vocab_size)[:, 0]
    mixed_with(lambda ids: said(ids).detach())(monkeypatch)
    assert verdict("ppo", start) == ""


def test_a_loss_may_detach_its_old_logprobs_and_clip_at_0(start, monkeypatch):
    good = functional.policy_loss
    detached = lambda new, old, *rest: good(new, old.detach(), *rest)
    monkeypatch.setattr(functional, "policy_loss", detached)
    assert verdict("ppo", start, cliprange=0.0) == ""


def test_with_one_optimizer_step_a_rollout_the_ratio_may_be_1_by_itself(start, monkeypatch):
    own_ratio(monkeypatch)
    one_step = {"ppo_epochs": 1, "batch_size": 4, "minibatch_size": 4}
    assert verdict("ppo", start, **one_step) == ""
    for more in ({"ppo_epochs": 2}, {"minibatch_size": 2}, {"rollouts_per_prompt": 2}):
        assert checked_name(verdict("ppo", start, **one_step | more)) == "old", more


def test_an_eos_that_no_row_has_is_not_ticked_off():
    tokens, flags = torch.tensor([[65, 66]]), torch.tensor([[True, True]])
    ticks = list(selfcheck.loss_checks(tokens, flags, flags, TOKENIZER))
    assert ticks == ["eos – (none in these rows)", "mask ✓"]


TURNS = [  # a row, where the batch's mask is, what the assistant says by the roles; U, A, E: tokens
    ("UabAcdEUeAfE..", "              ", "    ^^^   ^^  "),
    ("UabAcdEUeAfE..", "          ^^  ", "          ^^  "),  # the first turn has weight 0
    ("UabAcdEUeAfE..", "    ^^    ^   ", "    ^^^   ^^  "),  # neither eos is in the mask
    ("UabAcdEUeAfE..", " ^^           ", "    ^^^   ^^  "),  # the user's words are
    ("cdEUeAfE......", "^^^           ", "^^^   ^^      "),  # cut from the left
    ("abEcdE........", "^^^^^^        ", "^^^^^^        "),  # no roles
]


@pytest.mark.parametrize("row, mask, wanted", TURNS)
def test_the_assistants_words_and_their_ends_are_wanted(row, mask, wanted):
    ids = {"U": TOKENIZER.user_id, "A": TOKENIZER.assistant_id, "E": EOS, ".": TOKENIZER.pad_id}
    tokens = torch.tensor([[ids.get(x, ord(x)) for x in row]])
    mask, wanted = (torch.tensor([[x == "^" for x in flags]]) for flags in (mask, wanted))
    assert torch.equal(selfcheck.said_by_assistant(tokens, mask, TOKENIZER), wanted[:, 1:])


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


TWICE = [
    ("gpt", {"dropout": 0.2}),
    ("sft", {"dropout": 0.2, "dtype": "bfloat16"}),
    ("rm", {}),
    ("ppo", {"dtype": "bfloat16"}),
    ("ppo", {"critic": "none", "freeze_layers": 1}),
]


@pytest.mark.parametrize("stage, flags", TWICE, ids=str)
def test_a_checked_run_is_bit_for_bit_the_unchecked_one(start, tmp_path, stage, flags):
    """Its weights, its optimizer's state, and where its random generators stand."""
    for check in (False, True):
        out = str(tmp_path / str(check))
        SCRIPTS[stage].main(config(stage, start, out_dir=out, check=check, **flags))
    a, b = tmp_path / "False", tmp_path / "True"
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()
    for name in ("weights.pt", "state.pt"):
        assert same(*[torch.load(checkpoint.find(x) / name, weights_only=True) for x in (a, b)])


def test_a_resumed_run_and_no_check_are_not_checked(start, tmp_path, capsys):
    cfg = config("sft", start, out_dir=str(tmp_path), max_steps=1)
    for again, checked in (({}, True), ({"resume": True}, False), ({"check": False}, False)):
        train_sft.main(replace(cfg, **again))
        assert ("[sft] checks: " in capsys.readouterr().out) == checked


# ---- broken runs -------------------------------------------------------------------------------


def pad_is_eos(patch):
    load = Tokenizer.load

    def broken(path):
        tokenizer = load(path)
        tokenizer.pad_id = tokenizer.eos_id
        return tokenizer

    patch.setattr(Tokenizer, "load", broken)


def new_tokens_are_a_place_too_far(patch):
    places = sampling.KVCache.places
    patch.setattr(sampling.KVCache, "places", lambda cache, T: places(cache, T) + (T == 1))


def left_pads_count_as_tokens(patch):
    init = sampling.KVCache.__init__
    blind = lambda cache, config, pads, *a: init(cache, config, 0 * pads, *a)
    patch.setattr(sampling.KVCache, "__init__", blind)


def rows_leak_into_one_another(patch):
    trunk = GPT.trunk

    def leaky(gpt, tokens, n):
        x = trunk(gpt, tokens, n)
        return x + 0.3 * (x.mean(0) - x)

    patch.setattr(GPT, "trunk", leaky)


def demonstrations_with(change):
    """Of (tokens, mask) makes another mask."""

    def inject(patch):
        make = batches.dialogue_batch

        def broken(rows, indices, pad_id):
            batch = make(rows, indices, pad_id)
            mask = change(batch["tokens"], batch["mask"])
            return batch | {"mask": mask, "weight": mask[:, 1:].sum(1).float()}

        patch.setattr(batches, "dialogue_batch", broken)

    return inject


def responses_with(change):
    """Of (responses, mask, ends) makes another mask."""

    def inject(patch):
        good = sampling.response_mask
        bad = lambda responses, ends: change(responses, good(responses, ends), ends)
        patch.setattr(rollout, "response_mask", bad)

    return inject


def dropout_in_ppo(patch):
    load = train_ppo.load_gpt
    patch.setattr(train_ppo, "load_gpt", lambda init, template: load(init, 0.1, template))
    patch.setattr(ActorCritic, "eval", lambda policy: policy.train())


def reference_is_the_policy(patch):
    patch.setattr(train_ppo, "frozen_reference", lambda gpt: gpt)


def reference_is_another_model(patch):
    def other(gpt):
        found = model.frozen_reference(gpt)
        found.ln_f.weight.data *= 1.1
        return found

    patch.setattr(train_ppo, "frozen_reference", other)


def samples_with(**changed):
    """Of the rollout's call of generate."""

    def inject(patch):
        def broken(gpt, prompts, mask, n, ends, pad_id, noise, temperature):
            settings = {"temperature": temperature} | changed
            return sampling.generate(gpt, prompts, mask, n, ends, pad_id, noise, **settings)

        patch.setattr(rollout, "generate", broken)

    return inject


def logprobs_without_temperature(patch):
    good = functional.logprobs_from_logits
    forgets = lambda logits, tokens, temperature: good(logits, tokens)
    patch.setattr(functional, "logprobs_from_logits", forgets)


def update_at_temperature_1(patch):
    loss = train_ppo.ppo_loss
    forgets = lambda cfg, *a: loss(replace(cfg, temperature=1.0), *a)
    patch.setattr(train_ppo, "ppo_loss", forgets)


def own_ratio(patch):
    """The old log-probs are taken from the update's own forward pass."""
    good = functional.policy_loss
    bad = lambda new, old, *rest: good(new, new.detach(), *rest)
    patch.setattr(functional, "policy_loss", bad)


def score_on_every_token(patch):
    bad = lambda scores, kl, mask, c: (scores[:, None] - c * kl).masked_fill(~mask, 0)
    patch.setattr(functional, "shaped_rewards", bad)


def score_read_at(place):
    def inject(patch):
        read = lambda net, tokens, mask: net(tokens).gather(1, place(mask)[:, None])[:, 0]
        patch.setattr(RewardModel, "score", read)

    return inject


last_column = score_read_at(lambda mask: torch.full((len(mask),), mask.shape[1] - 1))
before_the_eos = score_read_at(lambda mask: mask.sum(1) - 2)


BROKEN = [  # stage, what is broken, which check says so
    ("sft", pad_is_eos, "pad"),
    ("ppo", pad_is_eos, "pad"),
    ("gpt", new_tokens_are_a_place_too_far, "cache"),
    ("ppo", new_tokens_are_a_place_too_far, "cache"),
    ("sft", left_pads_count_as_tokens, "padding"),
    ("ppo", left_pads_count_as_tokens, "padding"),
    ("rm", rows_leak_into_one_another, "padding"),
    ("ppo", rows_leak_into_one_another, "padding"),
    ("sft", demonstrations_with(lambda ids, mask: mask & (ids != EOS)), "eos"),
    ("sft", demonstrations_with(lambda ids, mask: mask.roll(1, 1)), "mask"),
    ("sft", demonstrations_with(lambda ids, mask: mask | True), "mask"),
    ("ppo", responses_with(lambda ids, mask, ends: mask & ~sampling.is_end(ids, ends)), "eos"),
    ("ppo", responses_with(lambda ids, mask, ends: mask | True), "mask"),
    ("ppo", dropout_in_ppo, "ratio"),
    ("ppo", reference_is_the_policy, "reference"),
    ("ppo", reference_is_another_model, "kl"),
    ("ppo", samples_with(temperature=1.0), "sampling"),
    ("ppo", samples_with(top_k=5), "sampling"),
    ("ppo", logprobs_without_temperature, "logprobs"),
    ("ppo", update_at_temperature_1, "ratio"),
    ("ppo", own_ratio, "old"),
    ("ppo", score_on_every_token, "rewards"),
    ("rm", last_column, "mask"),
    ("rm", before_the_eos, "mask"),
    ("ppo", last_column, "score"),
]


def checked_name(said):
    """Which of the checks says this."""
    (name,) = [name for name, m in selfcheck.MISTAKES.items() if matches(m, said)]
    return name


def matches(message, said):
    blank = re.sub(r"\\{.*?\\}", ".*", re.escape(message))
    return re.fullmatch(f"check failed: {blank}; --no-check runs anyway", said)


def named(x):
    return getattr(x, "__qualname__", str(x)).split(".")[0]


ROUNDED = "cache padding ratio kl sampling logprobs score".split()  # may hide in bfloat16
CASES = [("float32", *case) for case in BROKEN]
CASES += [("bfloat16", *case) for case in BROKEN if case[0] == "ppo" and case[2] in ROUNDED]


@pytest.mark.parametrize("dtype, stage, broken, name", CASES, ids=named)
def test_what_is_broken_is_named_in_one_line(start, monkeypatch, dtype, stage, broken, name):
    broken(monkeypatch)
    said = verdict(stage, start, dtype=dtype)
    assert said and checked_name(said) == name and "\n" not in said, said


def test_every_message_has_a_broken_run_above():
    assert {name for *_, name in BROKEN} == set(selfcheck.MISTAKES)


def test_a_failed_check_ends_the_run_with_one_line_and_status_2(start, monkeypatch, capsys):
    pad_is_eos(monkeypatch)
    with pytest.raises(SystemExit) as end:
        train_sft.main(config("sft", start))
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert end.value.code == 2 and len(errors) == 1 and "check failed: pad is eos" in errors[0]
