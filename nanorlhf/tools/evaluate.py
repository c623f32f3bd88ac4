"""The ladder: demonstrations, base GPT, few-shot, SFT, best-of-n, PPO and any other models, each a
rung, on the same held-out prompts.

    python -m nanorlhf evaluate                           # the four stages under out/
    python -m nanorlhf evaluate --models out/rloo b=out/beta02    # and two rungs more

Everything is judged by the embedded world's gold utility, which no stage has learned from.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from nanorlhf import engine
from nanorlhf import functional as f
from nanorlhf.config import arg, die, template_flag
from nanorlhf.data import batches, dialogue, world
from nanorlhf.data.files import write_records
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine import durable
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.report import right_pairs, share
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import score_responses
from nanorlhf.tools import plot

BEST_OF = (4, 16)
DEFAULT = "demonstrations base base_fewshot sft best_of_4 best_of_16 ppo".split()


@dataclass
class Config:
    """Compare all stages under --out, and --models, on held-out prompts of the embedded world."""

    out: str = arg("out", "folder that holds gpt/, sft/, rm/ and ppo/, or some of them")
    models: list[str] = arg([], "more language models: FOLDER, or NAME=FOLDER to name the rung")
    labeler: str = arg(
        "", "whose true taste is `gold`; default: the population's", choices=("", *world.PANEL)
    )
    template: str = template_flag()
    seed: int = arg(1, "fixes prompts and sampling", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))
    prompts: int = arg(1024, "held-out prompts, one sample each", low=2)  # one has no interval
    best_of_prompts: int = arg(256, "of these, for best-of-n", low=2)
    max_new_tokens: int = arg(128, "length limit of a response")
    shots: int = arg(2, "examples in the few-shot prompt of the base GPT")


@dataclass
class Rung:
    """One line of the ladder, before anyone has judged it."""

    name: str
    ids: list  # responses to all prompts; best-of-n answers the first of them only
    kl: float | None = None  # KL(this || SFT), in nats per response
    lm_loss: float | None = None  # nats per token of unseen documents


def main(cfg):
    models, reward_model, tokenizer = load_models(cfg)
    prompts = world.prompts("held_out", cfg.prompts, f"ladder/{cfg.seed}")
    chat = [dialogue.encode_prompt(tokenizer, [("user", p)]) for p in prompts]
    block_size = min(gpt.config.block_size for gpt, _ in models.values())
    dialogue.room_for_prompts(cfg.max_new_tokens, block_size, max(map(len, chat)))
    rng = random.Random(f"ladder/{cfg.seed}")
    written = [tokenizer.encode(world.demonstrate(rng, p)) + [tokenizer.eos_id] for p in prompts]
    pages = [few_shot(cfg, rng, p) for p in prompts]
    documents = world.corpus(100, f"ladder/{cfg.seed}")

    rungs = [Rung("demonstrations", written)]
    accuracy = None  # the reward model's, against gold
    sft, _ = models.get("sft", (None, None))
    for name, (gpt, is_chat) in models.items():
        lm_loss = text_loss(gpt, tokenizer, documents)
        kl = None
        if is_chat:
            ids = answer(cfg, gpt, tokenizer, chat, name)
            if sft:
                kl = 0.0 if gpt is sft else mean_kl(gpt, sft, tokenizer, chat, ids)
        else:
            ids = complete(cfg, gpt, tokenizer, [p + "\n" for p in prompts], name)
        rungs.append(Rung(name, ids, kl, lm_loss))
        if name == "base":
            ids = complete(cfg, gpt, tokenizer, pages, "base_fewshot")
            rungs.append(Rung("base_fewshot", ids, None, lm_loss))
        if name == "sft" and reward_model:
            best, accuracy = best_of(cfg, gpt, tokenizer, prompts, chat, reward_model)
            for n in BEST_OF:
                kl = math.log(n) - (n - 1) / n  # an upper bound, arXiv:2401.01879
                rungs.append(Rung(f"best_of_{n}", best[n], kl, lm_loss))

    of_sft = (golds(cfg, prompts, tokenizer, r.ids) for r in rungs if r.name == "sft")
    gold_of_sft = next(of_sft, None)
    rows = [describe(cfg, rung, tokenizer, prompts, gold_of_sft) for rung in rungs]
    if reward_model:
        for rung, row in zip(rungs, rows):
            scores = score_responses(reward_model, tokenizer, chat[: len(rung.ids)], rung.ids)
            row["reward_model"] = scores.mean().item()
    write(cfg, rows, prompts, tokenizer, rungs)
    print_table(rows)
    if accuracy is not None:
        print(f"reward model against gold, all pairs of 16 SFT samples: {accuracy:.3f}")
    plot.ladder(cfg.out, rows)
    return rows


# ---- models ------------------------------------------------------------------------------------


def load_models(cfg):
    """({rung: (GPT, whether it is a chat model)}, RewardModel or None, their common tokenizer)."""
    device = pick_device(cfg)
    ready = lambda model: cast(model, pick_dtype(cfg, device), device).eval()
    loaded = {
        name: load_gpt(folder, template=cfg.template) for name, folder in folders(cfg).items()
    }
    checkpoints = [found for _, found in loaded.values()]
    reward_model = None
    if is_there(cfg, "rm", "best-of-n and the reward model's scores are"):
        reward_model, found = checkpoint.load_reward_model(f"{cfg.out}/rm")
        reward_model = ready(reward_model)
        checkpoints.append(found)
    for other in checkpoints[1:]:
        checkpoint.same_vocabulary(checkpoints[0], other)
    models = {name: (ready(gpt), found.chat) for name, (gpt, found) in loaded.items()}
    return models, reward_model, checkpoints[0].tokenizer


def folders(cfg):
    """{rung: folder} of the language models: of the stages that are there, and of --models."""
    found = {}
    for rung, stage, left_out in (
        ("base", "gpt", "base and base_fewshot are"),
        ("sft", "sft", "sft, best-of-n, and win rate and KL against SFT are"),
        ("ppo", "ppo", "ppo is"),
    ):
        if is_there(cfg, stage, left_out):
            found[rung] = f"{cfg.out}/{stage}"
    for word in cfg.models:
        name, folder = named(word)
        if name in DEFAULT or name in found:
            die(f"--models {word}: {name} is another rung's name; NAME={folder} gives it a new one")
        found[name] = folder
    return found or die(f"{cfg.out}: no checkpoint in gpt, sft or ppo, and no --models to compare")


def is_there(cfg, stage, left_out):
    """Whether a stage has a checkpoint; if not, says what the ladder leaves out."""
    there = checkpoint.find(f"{cfg.out}/{stage}") is not None
    if not there:
        print(f"{cfg.out}/{stage}: no checkpoint there; {left_out} left out")
    return there


def named(word):
    """(name, folder) of NAME=FOLDER; a bare FOLDER has its own name. The name is that of a file,
    so a word with a / before its = is a bare folder."""
    name, equals, folder = word.partition("=")
    if not equals or "/" in name:
        name, folder = Path(word).resolve().name, word
    if not name or not folder:
        die(f"--models {word}: neither FOLDER nor NAME=FOLDER")
    return name, folder


# ---- answers -----------------------------------------------------------------------------------


def few_shot(cfg, rng, prompt):
    """A page of training prompts, each with a careful demonstration, that ends with the prompt."""
    requests = world.prompts("train", cfg.shots, rng.random())
    stories = [world.demonstrate(rng, request, world.GOOD) for request in requests]
    return world.page([*requests, prompt], stories)


def complete(cfg, gpt, tokenizer, texts, name):
    """A base model goes on with plain text, up to the end of the line or of the document."""
    newline = tokenizer.encode("\n")[0]
    room = gpt.config.block_size - cfg.max_new_tokens
    prompts = [dialogue.encode_document(tokenizer, text)[-room:] for text in texts]
    sampled = sample_responses(
        gpt, tokenizer, prompts, cfg.max_new_tokens, cfg.seed, progress=name, eos_id=newline
    )
    responses = []
    for ids in sampled:
        ends = [i for i, token in enumerate(ids) if token in (newline, tokenizer.eos_id)]
        responses.append(ids[: ends[0]] + [tokenizer.eos_id] if ends else ids)
    return responses


def answer(cfg, gpt, tokenizer, chat, name):
    return sample_responses(gpt, tokenizer, chat, cfg.max_new_tokens, cfg.seed, progress=name)


def best_of(cfg, sft, tokenizer, prompts, chat, reward_model):
    """({n: for each prompt the response with the highest score of n}, the reward model's accuracy:
    over all pairs of one prompt's samples with unequal gold)."""
    n, most = min(cfg.best_of_prompts, len(chat)), max(BEST_OF)
    repeated = [chat[i] for i in range(n) for _ in range(most)]
    sampled = sample_responses(
        sft, tokenizer, repeated, cfg.max_new_tokens, cfg.seed, 1, progress=f"best of {most}"
    )
    scores = score_responses(reward_model, tokenizer, repeated, sampled).tolist()
    best, right = {k: [] for k in BEST_OF}, []
    for i in range(n):
        group = slice(i * most, (i + 1) * most)  # the samples of prompt i
        for k in BEST_OF:
            winner = max(range(k), key=scores[group].__getitem__)
            best[k].append(sampled[group][winner])
        gold = golds(cfg, [prompts[i]] * most, tokenizer, sampled[group])
        right += right_pairs(scores[group], gold)
    return best, share(right)[0]


# ---- measures ----------------------------------------------------------------------------------


def golds(cfg, prompts, tokenizer, responses):
    """What the population truly thinks of responses, or --labeler."""
    weights = world.PANEL[cfg.labeler] if cfg.labeler else world.GOLD_WEIGHTS
    texts = [tokenizer.decode(ids) for ids in responses]
    return [world.utility(weights, p, text) for p, text in zip(prompts, texts)]


def interval(values):
    """(mean, [low, high]), a 95 % interval of the mean in the normal approximation."""
    n = len(values)
    mean = sum(values) / n
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, [mean - half, mean + half]


def describe(cfg, rung, tokenizer, prompts, gold_of_sft):
    """One row of the ladder, without the reward model's score."""
    responses = rung.ids
    texts = [tokenizer.decode(ids) for ids in responses]
    golds_here = golds(cfg, prompts, tokenizer, responses)
    gold, gold_ci = interval(golds_here)
    win_rate = win_rate_ci = None
    if gold_of_sft and rung.name != "sft":  # a tie is half a win
        wins = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(golds_here, gold_of_sft)]
        win_rate, win_rate_ci = interval(wins)
    parsed = [world.grammatical(text) for text in texts]
    n_sentences = sum(n for _, n in parsed)
    return {
        "model": rung.name,
        "gold": gold,
        "gold_ci": gold_ci,
        "win_rate_vs_sft": win_rate,
        "win_rate_ci": win_rate_ci,
        "reward_model": None,
        "kl": rung.kl,
        "eos_rate": sum(ids[-1:] == [tokenizer.eos_id] for ids in responses) / len(responses),
        "length": sum(map(len, responses)) / len(responses),
        "grammatical": sum(good for good, _ in parsed) / n_sentences if n_sentences else None,
        "lm_loss": rung.lm_loss,
        "n_prompts": len(responses),
        "sample": {"prompt": prompts[0], "response": texts[0]},
    }


@torch.no_grad()
def mean_kl(policy, reference, tokenizer, prompts, responses, chunk=128, temperature=1.0):
    """Exact KL(policy || reference) per response, in nats, averaged over responses."""
    total, device = 0.0, policy.device
    for i in range(0, len(prompts), chunk):
        pairs = list(zip(prompts[i : i + chunk], responses[i : i + chunk]))
        tokens, _ = batches.pad([p + r for p, r in pairs], tokenizer.pad_id)
        mask, _ = batches.pad([[0] * (len(p) - 1) + [1] * len(r) for p, r in pairs], 0)
        tokens, mask = tokens.to(device)[:, :-1], mask.to(device) > 0  # (b, S)
        # logits of the n response tokens alone: with a large vocabulary they are most of the work
        mine, theirs = (gpt.head(gpt.hidden(tokens)[mask]) for gpt in (policy, reference))  # (n, V)
        total += f.kl_exact(mine, theirs, temperature).sum().item()
    return total / len(prompts)


@torch.no_grad()
def text_loss(gpt, tokenizer, texts):
    """Next-token loss in nats per token of documents that no stage has seen."""
    device, mean = gpt.device, engine.WeightedMean()
    ids = [dialogue.encode_document(tokenizer, t)[: gpt.config.block_size] for t in texts]
    for i in range(0, len(ids), 32):
        tokens, mask = (x.to(device) for x in batches.pad(ids[i : i + 32], tokenizer.pad_id))
        loss = f.lm_loss(gpt(tokens[:, :-1]), tokens[:, 1:], mask[:, 1:])
        mean.add({"loss": loss}, float(mask[:, 1:].sum()))
    return mean.result()["loss"]


# ---- output ------------------------------------------------------------------------------------


def write(cfg, rows, prompts, tokenizer, rungs):
    """out/ladder.json, and every rung's texts in out/ladder/NAME.jsonl."""
    for rung in rungs:
        texts = [tokenizer.decode(ids) for ids in rung.ids]
        records = [{"prompt": p, "response": t} for p, t in zip(prompts, texts)]
        write_records(f"{cfg.out}/ladder/{rung.name}.jsonl", records)
    durable.write_text(f"{cfg.out}/ladder.json", json.dumps(rows, indent=1))


def print_table(rows):
    number = lambda x, digits: "-" if x is None else f"{x:.{digits}f}"
    width = max(15, *(len(r["model"]) for r in rows))
    print(
        f"\n{'model':{width}} {'gold, 95 %':>19} {'win vs SFT':>10} {'RM':>6} {'KL':>6} "
        f"{'ends':>6} {'length':>6} {'gramm.':>6} {'LM loss':>7}"
    )
    for r in rows:
        low, high = r["gold_ci"]
        print(
            f"{r['model']:{width}} {r['gold']:5.2f} [{low:5.2f},{high:5.2f}] "
            f"{number(r['win_rate_vs_sft'], 3):>10} {number(r['reward_model'], 2):>6} "
            f"{number(r['kl'], 2):>6} {r['eos_rate']:6.3f} {r['length']:6.1f} "
            f"{number(r['grammatical'], 3):>6} {number(r['lm_loss'], 3):>7}"
        )
    print(f"\nprompt: {rows[0]['sample']['prompt']}")
    for r in rows:
        print(f"{r['model']:>{width}} | {r['sample']['response']}")
    print()
