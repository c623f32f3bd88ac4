"""One page on which every token of a rollout shows what PPO makes of it: inspect.html.

The policy answers held-out prompts with the noise of the run's own evaluation; the numbers are
those of train_ppo.py's functions.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from nanorlhf.config import DeviceConfig, arg, die, note
from nanorlhf.functional import kl_estimate
from nanorlhf.loading import load_gpt
from nanorlhf.machine import durable
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.machine.python_file import load_script
from nanorlhf.model import ActorCritic, freeze_layers, frozen_reference
from nanorlhf.rollout import make_rollout
from nanorlhf.run import checkpoint
from nanorlhf.scoring import make_critic, make_gold, make_rewards
from nanorlhf.sources import ppo_prompts

PAGE = Path(__file__).with_name("inspect.html")
# of each token; inspect.html says what they are
QUANTITIES = "kl kl_exact advantages rewards values returns logprobs ref_logprobs entropy".split()


@dataclass
class Config(DeviceConfig):
    """Sample answers of a PPO run to held-out prompts, and write a page that shows each token's KL,
    reward, value, advantage and log-probability."""

    run: str = arg("out/ppo", "a run's folder, or one of its steps", positional=True)
    to: str = arg("", "file to write; default: inspect.html in the run's folder")
    prompts: int = arg(24, "held-out prompts, one answer each", low=2)  # one has no whitening


def main(cfg):
    trained = checkpoint.load(cfg.run, "lm")
    stage, flags = load_script("train_ppo"), trained.config["flags"]
    if "kl_coef" not in flags:
        die(f"{trained.path}: made by the stage {trained.stage}; this shows runs of train_ppo.py")
    names = {field.name for field in fields(stage.Config)} & flags.keys()
    here = {"device": cfg.device, "dtype": cfg.dtype, "eval_prompts": cfg.prompts, "shard": False}
    run = stage.Config(**{name: flags[name] for name in names} | here)
    to = cfg.to or trained.path.parent / "inspect.html"
    durable.write_text(to, page(page_data(run, stage, trained)))
    note(f"{to}: open it in a browser")


def page(data):
    """The page with its data in it."""
    text = json.dumps(data).replace("<", "\\u003c")  # no text can end the script that holds it
    return PAGE.read_text("utf-8").replace("DATA", text, 1)


def page_data(cfg, stage, trained):
    """{"about", "answers"}: what the page shows of a run's rollout."""
    device = pick_device(cfg)
    dtype = pick_dtype(cfg, device)
    gpt, init = load_gpt(cfg.init, template=cfg.template)
    tokenizer = init.tokenizer
    _, prompts = ppo_prompts(cfg, init)
    score = make_rewards(cfg, init, device, dtype, prompts)
    gold = make_gold(cfg, prompts)
    freeze_layers(gpt, cfg.freeze_layers)
    reference = frozen_reference(gpt)
    policy = ActorCritic(gpt, make_critic(cfg, gpt))
    checkpoint.restore(policy, trained.weights, trained.path)
    models = [cast(model, dtype, device).eval() for model in (policy, reference)]
    noise_of = 2**32 - 1  # the step by which train_ppo.py's own evaluation draws its noise

    with torch.no_grad():
        rollout = make_rollout(cfg, *models, prompts, tokenizer, noise_of, stage.measure)
        scores = stage.score_rollout(cfg, score, prompts, rollout)
        rollout["kl"] = kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")
        if trained.stage == "ppo":  # a fork has another estimate, which is not known here
            rollout |= stage.ppo_advantages(cfg, rollout, scores, cfg.kl_coef)
    answers = []
    for i, (prompt, ids) in enumerate(zip(prompts, rollout["ids"])):
        numbers = {k: rollout[k][i, : len(ids)].tolist() for k in QUANTITIES if k in rollout}
        answer = {"prompt": prompt.text, "masked": rollout["responses"].shape[1] - len(ids)}
        answer["tokens"] = [tokenizer.token_text(token) for token in ids]
        answer["numbers"] = {k: [round(x, 4) for x in row] for k, row in numbers.items()}
        answer |= {"ended": bool(rollout["ended"][i]), "score": round(scores[i].item(), 3)}
        answer["gold"] = gold and round(gold([prompt], [rollout["texts"][i]]).item(), 3)
        answers.append(answer)
    about = {"run": str(trained.path), "reference": cfg.init, "reward": " ".join(cfg.reward)}
    about |= {"kl_coef": cfg.kl_coef, "missing_eos_score": cfg.missing_eos_score}
    return {"about": about, "answers": answers}
