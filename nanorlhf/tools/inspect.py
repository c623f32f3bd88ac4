"""One page on which every token of a rollout shows what PPO makes of it: inspect.html.

The policy answers held-out prompts with the noise of the run's own evaluation; the numbers are
those of train_ppo.py's functions.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf.config import arg, die, note
from nanorlhf.data import dialogue
from nanorlhf.functional import kl_estimate
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine import durable
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.machine.python_file import load_script
from nanorlhf.model import ActorCritic, freeze_layers, frozen_reference
from nanorlhf.rollout import make_rollout
from nanorlhf.run import checkpoint
from nanorlhf.scoring import make_critic, make_gold, make_scorer
from nanorlhf.sources import ppo_prompts
from nanorlhf.tools.data import plain

PAGE = Path(__file__).with_name("inspect.html")
ABOUT = {  # quantity -> (what it is, whether its sign matters)
    "kl": ("log-prob under the policy minus that under the reference, in nats (k1)", True),
    "kl_exact": ("KL of the whole next-token distribution, in nats", False),
    "advantages": ("whitened over the rollout: above 0, the token is made likelier", True),
    "rewards": ("-kl_coef times kl, and on the last token the score", True),
    "values": ("what the critic expects of the rest, before the token", True),
    "returns": ("advantage before whitening plus value: what the critic learns", True),
    "logprobs": ("log-probability under the policy", False),
    "ref_logprobs": ("log-probability under the reference", False),
    "entropy": ("of the policy's next-token distribution, in nats", False),
}


@dataclass
class Config:
    """Sample answers of a PPO run to held-out prompts, and write a page that shows each token's KL,
    reward, value, advantage and log-probability."""

    run: str = arg("out/ppo", "a run's folder, or one of its steps", positional=True)
    to: str = arg("", "file to write; default: inspect.html in the run's folder")
    prompts: int = arg(24, "held-out prompts, one answer each", low=2)  # one has no whitening
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))


def main(cfg):
    found = checkpoint.load(cfg.run, "lm")
    stage, flags = load_script("train_ppo"), found.config["flags"]
    if "kl_coef" not in flags:
        die(f"{found.path}: made by the stage {found.stage}; this shows runs of train_ppo.py")
    names = {field.name for field in dataclasses.fields(stage.Config)} & flags.keys()
    here = {"device": cfg.device, "dtype": cfg.dtype, "eval_prompts": cfg.prompts, "shard": False}
    run = stage.Config(**{name: flags[name] for name in names} | here)
    data = rollout_of(run, stage, found)
    folder = Path(cfg.run).parent if Path(cfg.run).name.startswith("step_") else Path(cfg.run)
    to = cfg.to or folder / "inspect.html"
    durable.write_text(to, filled(data))
    note(f"{to}: open it in a browser")


def filled(data):
    """The page with its data in it."""
    text = json.dumps(data).replace("<", "\\u003c")  # no text can end the script that holds it
    return PAGE.read_text("utf-8").replace("DATA", text, 1)


def rollout_of(cfg, stage, found):
    """{"about", "quantities", "answers"} for the page."""
    device = pick_device(cfg)
    gpt, init = load_gpt(cfg.init, template=cfg.template)
    tokenizer, longest = init.tokenizer, dialogue.context(cfg, gpt.config)
    _, prompts = ppo_prompts(cfg, tokenizer, longest)
    score = make_scorer(cfg.reward, init, device, pick_dtype(cfg, device), prompts)
    gold = make_gold(cfg, prompts)
    freeze_layers(gpt, cfg.freeze_layers)
    reference = frozen_reference(gpt)
    policy = ActorCritic(gpt, make_critic(cfg, gpt))
    checkpoint.restore(policy, found.weights, found.path)
    policy, reference = (
        cast(m, pick_dtype(cfg, device), device).eval() for m in (policy, reference)
    )

    with torch.no_grad():
        about = (cfg, policy, reference, prompts, tokenizer, 2**32 - 1)
        rollout = make_rollout(*about, stage.measure)  # with the noise of train_ppo's evaluation
        scores = stage.score_rollout(cfg, score, prompts, rollout)
        rollout["kl"] = kl_estimate(rollout["logprobs"], rollout["ref_logprobs"], "k1")
        if found.stage == "ppo":  # a fork has another estimate, which is not known here
            rollout |= stage.ppo_advantages(cfg, rollout, scores, cfg.kl_coef)
    shown = [name for name in ABOUT if name in rollout]
    answers = []
    for i, prompt in enumerate(prompts):
        ids = rollout["ids"][i]
        numbers = {k: [round(x, 4) for x in rollout[k][i, : len(ids)].tolist()] for k in shown}
        answers.append(
            {
                "prompt": prompt.text,
                "tokens": [plain(tokenizer, token) for token in ids],
                "masked": rollout["responses"].shape[1] - len(ids),
                "ended": bool(rollout["ended"][i]),
                "score": round(scores[i].item(), 3),
                "gold": round(gold([prompt], [rollout["texts"][i]]).item(), 3) if gold else None,
                "numbers": numbers,
            }
        )
    about = {"run": str(found.path), "reference": cfg.init, "reward": cfg.reward}
    about |= {"kl_coef": cfg.kl_coef, "missing_eos_score": cfg.missing_eos_score}
    return {"about": about, "quantities": {k: ABOUT[k] for k in shown}, "answers": answers}
