"""What answers are worth, against what it is by hand."""

import copy
import random

import pytest
import torch

import train_gpt
import train_sft
from nanorlhf import judging, rollout
from nanorlhf.data import dialogue, world
from nanorlhf.data.dialogue import Prompt
from nanorlhf.data.examples import Example
from nanorlhf.sampling import sample_responses
from tests.tools.test_evaluate import TOKENIZER, make_gpt

PROMPTS = [Prompt([i], str(i), "", {}) for i in range(20)]
EOS = 99


def test_a_base_model_goes_on_up_to_the_end_of_a_line_or_whichever_end_of_a_text():
    gpt, tokenizer, texts = make_gpt(1), copy.copy(TOKENIZER), ["a", "b", "c", "d"]
    prompts = [dialogue.encode_document(TOKENIZER, text) for text in texts]
    full = sample_responses(gpt, TOKENIZER, prompts, 30, 1, ends=(-1,))
    newline, other = ord("\n"), full[0][5]
    tokenizer.ends = (tokenizer.eos_id, other)
    for ids, response in zip(full, judging.complete(gpt, tokenizer, texts, 30, 1)):
        n = min((i for i, t in enumerate(ids) if t in (newline, *tokenizer.ends)), default=30)
        assert response == ids[:n] + [tokenizer.eos_id] * (n < 30)
    assert other not in (newline, tokenizer.eos_id)


def test_the_best_of_several_replies_belongs_to_its_own_prompt():
    ids = [[1], [9], [5], [8], [2], [10]]  # three to each of two prompts
    scores = torch.tensor(ids).view(2, 3)
    assert judging.best_of(3, scores, ids) == [[9], [10]]
    assert judging.best_of(2, scores, ids) == [[9], [8]]
    assert judging.best_of(1, scores, ids) == [[1], [8]]


def test_the_best_constant_is_best_over_all_prompts_and_not_where_it_was_given():
    def reward(asked, ids):  # reply 3 suits its own prompt only, reply 7 all a little; 5 never ends
        assert len(asked) == len(ids)
        pairs = [(p.ids, r[0]) for p, r in zip(asked, ids)]
        return [9.0 if p == [r] == [3] else {7: 1.0, 5: 8.0}.get(r, 0.0) for p, r in pairs]

    replies = [[i, EOS] if i != 5 else [5] for i in range(20)]
    scored = list(zip(replies, reward(PROMPTS, replies)))
    assert judging.best_constant(reward, PROMPTS, scored, [EOS], 20) == [7, EOS]
    # one candidate only:
    assert judging.best_constant(reward, PROMPTS, scored, [EOS], 1) == [3, EOS]
    assert judging.best_constant(reward, PROMPTS, [([5], 8.0)] * 20, [EOS], 1) is None


@torch.no_grad()
def test_loss_is_the_mean_over_all_tokens_of_all_replies():
    gpt, prompts, replies = make_gpt(1), [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]
    nats = []
    for prompt, reply in zip(prompts, replies):
        for i, token in enumerate(reply):
            logits = gpt(torch.tensor([prompt + reply[:i]]))[0, -1]
            nats.append(-logits.log_softmax(-1)[token].item())
    loss = judging.mean_loss(gpt, TOKENIZER, prompts, replies)
    assert loss == pytest.approx(sum(nats) / 6, rel=1e-5)


def test_a_reply_over_several_turns_is_read_whole():
    asked = [("user", "q")]
    turns = [("assistant", "a"), ("user", "b"), ("assistant", "c")]
    for reply, said in ((turns, asked + turns), ("a", [*asked, ("assistant", "a")])):
        ids = judging.reply_ids(TOKENIZER, asked, reply)
        whole, _ = dialogue.encode_pair(TOKENIZER, said[:-1], said[-1][1])
        assert dialogue.encode_prompt(TOKENIZER, asked) + ids == whole
        assert ids[-1] == TOKENIZER.eos_id


def test_variety_counts_repetitions_within_a_text_and_between_texts():
    found = judging.variety(["a b a b", "a b c d e", "a b c d f", "a b a b"])
    assert found == {"bigrams": (2 / 3 + 1 + 1 + 2 / 3) / 4, "distinct": 3 / 4, "starts": 2 / 4}
    assert judging.variety(["", "word"])["bigrams"] == 0


def test_an_equals_sign_in_a_path_is_no_name():
    assert judging.named("b=out/beta=2/") == ("b", "out/beta=2/")
    assert judging.named("out/beta=2/") == ("beta=2", "out/beta=2/")
    assert judging.named("out/x/step_4") == ("step_4", "out/x/step_4")


@torch.no_grad()
def test_kl_is_summed_over_the_tokens_of_a_response_and_over_no_others():
    policy, reference = make_gpt(1), make_gpt(2)
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9, 10, 11, 12], [13]]
    wanted = 0.0
    for prompt, response in zip(prompts, responses):
        for i in range(len(response)):  # the state in which token i was chosen
            tokens = torch.tensor([prompt + response[:i]])
            p, q = (gpt(tokens)[0, -1].div(0.7).log_softmax(-1) for gpt in (policy, reference))
            wanted += (p.exp() * (p - q)).sum().item() / 3
    models = policy, reference
    found = judging.mean_kl(*models, TOKENIZER, prompts, responses, temperature=0.7)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_what_models_say_is_shown_and_not_obeyed(monkeypatch, capsys):
    """In the samples of every stage and in the ladder."""
    hiding, shown = "a\x1b[1A\x1b[2Kb", "a\\x1b[1A\\x1b[2Kb"
    gpt, ids = make_gpt(1), TOKENIZER.encode(hiding)
    for stage in (train_gpt, train_sft):
        monkeypatch.setattr(stage, "sample_responses", lambda *args: [ids])
    train_gpt.print_samples(gpt, TOKENIZER, train_gpt.Config(block_size=48))
    example = Example([("user", hiding), ("assistant", "c")], "f.jsonl:1")
    train_sft.print_samples(gpt, TOKENIZER, [example], train_sft.Config())
    measured = {"kl_exact": torch.zeros(1, 2), "response_mask": torch.ones(1, 2).bool()}
    asked = [Prompt(ids, hiding, "", {})]
    rollout.show_samples(asked, measured | {"texts": [hiding]}, [0.0])
    row = {"model": "m", "sample": {"prompt": hiding, "response": hiding}, "n_prompts": 1}
    judging.print_table([row])
    printed = capsys.readouterr().out
    assert printed.count(shown) == 7 and "\x1b" not in printed


def test_labelers_prefer_the_better_text_and_equal_ones_by_half():
    prompts = world.prompts("held_out", 200, 1)
    rng = random.Random(2)
    good = [world.demonstrate(rng, prompt, world.GOOD) for prompt in prompts]
    poor = [world.demonstrate(rng, prompt, world.POOR) for prompt in prompts]
    win = judging.preferred(prompts, good, poor, world.TRAIN_LABELERS, 1)
    assert win > 0.8
    assert judging.preferred(prompts, poor, good, world.TRAIN_LABELERS, 1) < 0.2
    assert judging.preferred(prompts, good, good, world.TRAIN_LABELERS, 1) == 0.5
