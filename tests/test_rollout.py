"""A rollout, whose rows are read in groups, against each of its rows alone."""

import random

import pytest
import torch

import train_ppo
from nanorlhf import functional as f
from nanorlhf.data import dialogue
from nanorlhf.model import GPT, ActorCritic, GPTConfig, freeze_layers
from nanorlhf.tokenizer import byte_tokenizer


@pytest.mark.parametrize("freeze", [0, 1])
@torch.no_grad()
def test_a_rollout_is_measured_as_each_row_would_be_alone(freeze):
    """Whatever its prompt's length, its own, and the group that it was read in."""
    torch.manual_seed(0)
    tokenizer, rng = byte_tokenizer(), random.Random(1)
    sizes = GPTConfig(tokenizer.vocab_size, 64, 2, 2, 16)
    gpt = GPT(sizes)
    gpt.wte.weight.data *= 3
    policy = ActorCritic(gpt).eval()
    torch.nn.init.normal_(policy.value_head.weight)
    reference = GPT(sizes)
    for ours, theirs in zip(reference.h[:freeze], gpt.h):
        ours.load_state_dict(theirs.state_dict())
    if freeze:
        reference.wte, reference.wpe = gpt.wte, gpt.wpe
    freeze_layers(gpt, freeze)
    freeze_layers(reference, freeze)
    rows = [[rng.randrange(256) for _ in range(n)] for n in (3, 17, 1, 9, 30, 12)]
    prompts = [dialogue.Prompt(row, "", "", {}) for row in rows]
    cfg = train_ppo.Config(max_new_tokens=20, minibatch_size=3, freeze_layers=freeze)
    models = policy, reference.eval()
    rollout = train_ppo.make_rollout(cfg, *models, prompts, tokenizer, 0, train_ppo.measure)
    for i, prompt in enumerate(prompts):
        row, n = prompt.ids + rollout["ids"][i], len(rollout["ids"][i])
        states = slice(len(prompt.ids) - 1, len(row) - 1)
        response = torch.tensor([rollout["ids"][i]])
        assert rollout["tokens"][i, : len(row)].tolist() == row
        for name, model in (("logprobs", gpt), ("ref_logprobs", reference)):
            logits = model(torch.tensor([row]))[:, states]
            wanted = f.logprobs_from_logits(logits, response)
            torch.testing.assert_close(rollout[name][i : i + 1, :n], wanted, rtol=0, atol=1e-4)
        hidden = gpt.hidden(torch.tensor([row]))[0, states]
        wanted = policy.value_head(hidden)[:, 0]
        torch.testing.assert_close(rollout["values"][i, :n], wanted, rtol=0, atol=1e-4)
