"""What PPO maximises: a reward model's score, or any Python function of prompts and responses."""

import importlib.util
import traceback
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.data.batches import pad
from nanorlhf.machine import ranks
from nanorlhf.run import checkpoint


@torch.no_grad()
def score_responses(model, tokenizer, prompts, responses, chunk=256):
    """Standardised scores (N,) of lists of prompt ids and response ids; each text is closed with
    an eos, which is where the reward model reads it, as in its training."""
    device = model.score_mean.device
    eos = tokenizer.eos_id
    rows = [p + r + ([] if r[-1:] == [eos] else [eos]) for p, r in zip(prompts, responses)]
    rows = [row[-model.gpt.config.block_size :] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding in a chunk
    scores = torch.zeros(len(rows), device=device)
    for i in range(0, len(rows), chunk):
        part = order[i : i + chunk]
        tokens, mask = pad([rows[j] for j in part], tokenizer.pad_id)
        scores[part] = model.score(tokens.to(device), mask.to(device))
    return scores


def load_function(spec, flag="--reward"):
    """`path.py:name` -> the function(prompts, responses) -> list of floats that it names."""
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("user_reward", path)
    if not Path(path).is_file() or module_spec is None:
        die(f"{flag} {spec}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        die(f"{flag} {spec}: {raised(error)}")
    function = getattr(module, name, None)
    if not callable(function):
        die(f"{flag} {spec}: {path} defines no function {name!r}")
    return function


def raised(error):
    """What the user's code raised, and where, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {reason(error)} (at {last.filename}:{last.lineno})"


def call_function(function, prompts, responses):
    """Scores (N,) by the user's function, checked."""
    try:
        returned = function(list(prompts), list(responses))  # it may change its own copies
        scores = torch.tensor([float(score) for score in returned])
    except (Exception, SystemExit) as error:
        die(f"the given function must return a list of floats; {raised(error)}")
    if len(scores) != len(prompts) or not scores.isfinite().all():
        die(
            f"the given function returned {len(scores)} scores for {len(prompts)} responses, "
            f"{int((~scores.isfinite()).sum())} of them not finite"
        )
    return scores


def make_scorer(spec, init, cast):
    """score(prompts, ids, texts) -> (N,) for --reward, with prompts as `batches.encode_prompts`
    makes them; cast(model) readies the reward model."""
    if ".py:" in spec:
        function = load_function(spec)
        call = lambda p, texts: call_function(function, [x.text for x in p], texts)
        return lambda p, ids, texts: ranks.on_main(lambda: call(p, texts))
    model, found = checkpoint.load_reward_model(spec)
    checkpoint.same_vocabulary(init, found)
    if float(model.score_mean) == 0 and float(model.score_sd) == 1:
        die(f"{found.path}: scores are not standardised, train_rm.py did not finish; --resume it")
    cast(model).eval().requires_grad_(False)

    def score(prompts, ids, texts):
        own = ranks.rows(len(ids))
        pairs = [prompts[i].ids for i in own], [ids[i] for i in own]
        return ranks.gather(score_responses(model, init.tokenizer, *pairs), len(ids))

    return score
