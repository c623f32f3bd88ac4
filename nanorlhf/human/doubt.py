"""Which questions teach most: those that reward models are unsure about."""

import torch

from nanorlhf.config import die
from nanorlhf.data import dialogue
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run import checkpoint
from nanorlhf.scoring import score_responses


def most_doubtful_first(cfg, questions):
    """Questions in the order in which to ask them: by how nearly one reward model (--reward) gives
    their responses the same score; of several, by how little these agree on how far the responses
    lie apart (query by committee, Seung et al. 1992)."""
    if cfg.feedback not in ("comparisons", "rankings"):
        die(f"--next uncertain goes with comparisons and rankings, not with {cfg.feedback}")
    pairs = [(q.turns, text) for q in questions for text in q.responses]
    scores = torch.stack([scores_of(cfg, folder, pairs) for folder in cfg.reward])  # (M, N)
    each = scores.split([len(question.responses) for question in questions], dim=1)
    if len(cfg.reward) == 1:
        doubt = [-s.std(1, correction=0).mean() for s in each]
    else:  # the sd over models of each response's score, the mean of all taken off
        doubt = [(s - s.mean(1, keepdim=True)).std(0).mean() for s in each]
    return [questions[i] for i in torch.stack(doubt).argsort(descending=True).tolist()]


def scores_of(cfg, folder, pairs):
    """A reward model's scores (N,) of N pairs of a dialogue and a response."""
    model, found = checkpoint.load_reward_model(folder)
    device, tokenizer = pick_device(cfg), found.tokenizer
    cast(model, pick_dtype(cfg, device), device).eval()
    asked = [dialogue.encode_prompt(tokenizer, turns) for turns, _ in pairs]
    said = [tokenizer.encode(text) + [tokenizer.eos_id] for _, text in pairs]
    return score_responses(model, tokenizer, asked, said).cpu()
