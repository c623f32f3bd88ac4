"""Who judges: a reward model, any Python function of prompts and responses, or gold.

Shapes: B prompts, K completions of each, N texts in all, T positions.
"""

import copy

import torch
import torch.nn.functional as F

from nanorlhf.config import die, is_function, warn
from nanorlhf.data import world
from nanorlhf.data.batches import pad
from nanorlhf.data.dialogue import closed
from nanorlhf.machine import ranks
from nanorlhf.machine.device import cast
from nanorlhf.model import RewardModel
from nanorlhf.run import checkpoint


def score_rows(model, tokens, mask, lengths, size):
    """Scores (N,) of texts tokens, mask (N, T) with lengths (N,), which are on the CPU. They are
    read `size` at a time, sorted by length, so that little is padding."""
    order, scores = lengths.argsort().split(size), []
    for index in order:
        T, n = int(lengths[index[-1]]), len(index)
        # repeated shapes are fast, see GPT.blocks
        index = F.pad(index, (0, -n % 8), value=int(index[-1]))
        scores.append(model.score(tokens[index, :T], mask[index, :T])[:n])
    return torch.cat(scores)[torch.cat(order).argsort()]


def completion_scores(model, rows, parts=4):
    """Scores (B, K) of the completions of a feedback batch, 0 where there is none. Each completion
    is read on its own, and all of them in `parts` pieces."""
    present, lengths = rows["present"], rows["n_completion"]
    lengths = lengths[lengths > 0]  # (N,)
    tokens, mask = rows["tokens"][present], rows["mask"][present]  # (N, T)
    scores = score_rows(model, tokens, mask, lengths, -(-len(lengths) // (8 * parts)) * 8)  # (N,)
    return torch.zeros_like(present, dtype=scores.dtype).masked_scatter(present, scores)


@torch.no_grad()
def score_responses(model, tokenizer, prompts, responses, chunk=256):
    """Standardised scores (N,) of lists of prompt ids and response ids; each text is closed with
    an eos, which is where the reward model reads it, as in its training."""
    rows = [p + closed(tokenizer, r) for p, r in zip(prompts, responses)]
    rows = [row[-model.gpt.config.block_size :] for row in rows]
    tokens, mask = (x.to(model.gpt.device) for x in pad(rows, tokenizer.pad_id))
    return score_rows(model, tokens, mask, torch.tensor([len(row) for row in rows]), chunk)


def must_be_standardised(model, where=""):
    if float(model.score_mean) == 0 and float(model.score_sd) == 1:
        die(f"{where}scores are not standardised, train_rm.py did not finish; --resume it")


def is_one_model(cfg):
    """Whether --reward is one reward model, whose scores are taken as they are."""
    is_plain = cfg.reward_mix == "sum" and not cfg.reward_weights
    return is_plain and len(cfg.reward) == 1 and not is_function(cfg.reward[0])


def make_rewards(cfg, init, device, dtype, prompts):
    """`make_scorer` of --reward. Its scores are (J, N) of J judges, unless that is one reward
    model; `one_score` makes (N,) of them."""
    as_they_are = is_one_model(cfg)
    if not as_they_are:
        from nanorlhf import mixing  # here: one reward model needs none

        mixing.check(cfg)
    made = device, dtype, prompts, "--reward", cfg.reward_timeout
    judges = [make_scorer(spec, init, *made) for spec in cfg.reward]
    return judges[0] if as_they_are else lambda *x: torch.stack([j(*x).cpu() for j in judges])


def one_score(cfg, rollout, scores):
    """Scores (B,) of a rollout by what `make_rewards` says of it: (B,), or (J, B)."""
    if scores.dim() == 1:
        return scores
    from nanorlhf import mixing

    return mixing.one_of_several(cfg, rollout, scores)


def make_scorer(spec, init, device, dtype, prompts=(), flag="--reward", timeout=0.0):
    """score(prompts, ids, texts) -> (N,) by one judge, with prompts as `dialogue.encode_prompts`
    makes them; nan where the judge leaves a text out, as functions may. `init`: the policy's
    checkpoint; a reward model must share its vocabulary. `prompts`, `timeout`: as of
    `judge_file.load_judge`."""
    if is_function(spec):
        from nanorlhf.judge_file import load_judge  # here: a reward model needs none

        judge = load_judge(spec, flag, prompts, timeout)
        return lambda p, ids, texts: ranks.on_main(lambda: judge(p, texts))
    model, its_checkpoint = checkpoint.load_model(spec, "reward")
    checkpoint.same_vocabulary(init, its_checkpoint)
    must_be_standardised(model, f"{its_checkpoint.path}: ")
    cast(model, dtype, device).eval().requires_grad_(False)

    def score(prompts, ids, texts):
        pairs = [(tuple(prompts[i].ids), tuple(ids[i])) for i in ranks.rows(len(ids))]
        # equal texts are read once: in bfloat16 a score depends a little on its place in the batch
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        unique = [[list(x) for x in part] for part in zip(*place)]
        scores = score_responses(model, init.tokenizer, *unique)
        return ranks.gather(scores[[place[pair] for pair in pairs]], len(ids))

    return score


def check_unit(cfg, scores, rollout):
    """Warn where most of the first rollout is cut, and where its scores (B,) are not in the unit
    that --kl_coef and --missing_eos_score are meant for."""
    judged = rollout["response_mask"].any(1)  # (B,), all but what every judge left out
    scores, ended = scores[judged], rollout["ended"][judged]
    missing, n_cut = f"--missing_eos_score {cfg.missing_eos_score:g}", int((~ended).sum())
    if 2 * n_cut > len(ended) and not cfg.score_unended:
        cut = f"{n_cut / len(ended):.0%} of the responses are cut, and have {missing}"
        warn(f"{cut}: try more --max_new_tokens than {cfg.max_new_tokens}, or --score_unended")
    scores = scores[ended].float()
    poor = (scores <= cfg.missing_eos_score).float().mean()  # nan where none has ended
    if poor > 1 / 6 and not cfg.score_unended:  # of normal scores so many lie an sd below the mean
        low = f"{poor:.0%} of the responses that ended score no higher than {missing}"
        best = f"their mean is {scores.mean():.3g}: not to end would be the best answer"
        warn(f"{low}, {best}; set it below usual scores")
    if not is_one_model(cfg) or len(scores) < 16:
        return  # others have their own unit; a few scores have no spread to speak of
    mean, sd = scores.mean().item(), scores.std().item()
    if abs(mean) > 1 or not 0.5 < sd < 2:
        unit = f"scores of the first rollout have mean {mean:.2f} and sd {sd:.2f}, and not 0 and 1"
        strength = f"--kl_coef acts {1 / max(sd, 1e-3):.2g} times as strongly"
        warn(f"{unit}: {strength}; train_rm.py --sft {cfg.init} measures their unit anew")


def make_gold(cfg, prompts=()):
    """gold(prompts, texts) -> mean: the user's function, or what the embedded world truly likes,
    to be looked at and never learned from; None where there is neither."""
    if cfg.gold:
        from nanorlhf.judge_file import load_judge

        judge = load_judge(cfg.gold, "--gold", prompts, cfg.reward_timeout)
    elif cfg.data:
        return None
    else:
        judge = lambda p, texts: torch.tensor([world.gold(x.text, t) for x, t in zip(p, texts)])
    return lambda prompts, texts: ranks.on_main(lambda: judge(prompts, texts).nanmean())


def make_critic(cfg, gpt):
    """What ActorCritic takes for --critic. A separate value function starts as a copy of the
    reward model, the first one that --reward names, constants included, as InstructGPT's does;
    where all are functions, it starts from the policy's weights."""
    if cfg.critic != "separate":
        return cfg.critic
    for spec in cfg.reward:
        if not is_function(spec):
            return checkpoint.load_model(spec, "reward")[0]
    return RewardModel(copy.deepcopy(gpt).requires_grad_(True))
