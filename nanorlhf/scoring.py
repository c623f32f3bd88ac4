"""Who judges: a reward model, any Python function of prompts and responses, or gold.

Shapes: B prompts, K completions of each, N texts in all, T positions.
"""

import copy

import torch
import torch.nn.functional as F

from nanorlhf.config import die, warn
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


def make_scorer(spec, init, device, dtype, prompts=()):
    """score(prompts, ids, texts) -> (N,) for --reward, with prompts as `dialogue.encode_prompts`
    makes them. `init`: the policy's checkpoint; the reward model must share its vocabulary.
    `prompts`: as of `judge_file.load_judge`."""
    if ".py:" in spec or spec.endswith(".py"):
        from nanorlhf.judge_file import load_judge  # here: a reward model needs none

        judge = load_judge(spec, "--reward", prompts)
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


def check_unit(cfg, scores, ended):
    """Warn where most of the first rollout is cut, and where its scores (B,) are not in the unit
    that --kl_coef and --missing_eos_score are meant for. ended (B,): whether a response ended by
    itself."""
    missing, n_cut = f"--missing_eos_score {cfg.missing_eos_score:g}", int((~ended).sum())
    if 2 * n_cut > len(ended) and not cfg.score_unended:
        warn(
            f"{n_cut / len(ended):.0%} of the responses are cut, and have {missing} whatever they "
            f"say: try more --max_new_tokens than {cfg.max_new_tokens}, or --score_unended"
        )
    scores = scores[ended].float()
    poor = (scores <= cfg.missing_eos_score).float().mean()  # nan where none has ended
    if poor > 1 / 6 and not cfg.score_unended:  # of normal scores so many lie an sd below the mean
        warn(
            f"{poor:.0%} of the responses that ended score no higher than {missing}, their mean is "
            f"{scores.mean():.3g}: not to end would be the best answer; set it below usual scores"
        )
    if ".py:" in cfg.reward or len(scores) < 16:
        return  # a function has its own unit; a few scores have no spread to speak of
    mean, sd = scores.mean().item(), scores.std().item()
    if abs(mean) > 1 or not 0.5 < sd < 2:
        warn(
            f"scores of the first rollout have mean {mean:.2f} and sd {sd:.2f}, and not 0 and 1: "
            f"the unit of {cfg.reward} is of other texts (see its report.json), and --kl_coef acts "
            f"{1 / max(sd, 1e-3):.2g} times as strongly; train_rm.py --sft {cfg.init} measures anew"
        )


def make_gold(cfg, prompts=()):
    """gold(prompts, texts) -> mean: the user's function, or what the embedded world truly likes,
    to be looked at and never learned from; None where there is neither."""
    if cfg.gold:
        from nanorlhf.judge_file import load_judge

        judge = load_judge(cfg.gold, "--gold", prompts)
    elif cfg.data:
        return None
    else:
        judge = lambda p, texts: torch.tensor([world.gold(x.text, t) for x, t in zip(p, texts)])
    return lambda prompts, texts: ranks.on_main(lambda: judge(prompts, texts).mean())


def make_critic(cfg, gpt):
    """What ActorCritic takes for --critic. A separate value function starts as a copy of the
    reward model, constants included, as InstructGPT's does; under --reward path.py:function there
    is none, and it starts from the policy's weights."""
    if cfg.critic != "separate":
        return cfg.critic
    if ".py:" in cfg.reward:
        return RewardModel(copy.deepcopy(gpt).requires_grad_(True))
    return checkpoint.load_model(cfg.reward, "reward")[0]
