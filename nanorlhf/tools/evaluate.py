"""The ladder: what several models, best-of-n and people answer to the same held-out prompts.

    python -m nanorlhf evaluate                           # the four stages under out/
    python -m nanorlhf evaluate --models out/rloo b=out/beta02    # and two rungs more
    python -m nanorlhf evaluate --data held_out.jsonl --models out/sft out/ppo \\
        --judge out/judge my.py:function --constant 64 --people

Without --data everything is judged by the embedded world's gold utility, which no stage has learned
from; nobody knows the gold of other data. `reward_model` is what PPO was trained on, and a --judge
is best something that it was not. KL is to the SFT model. With --constant a row is the one reply
that --reward likes best whatever is asked: a policy that scores no more has learned a phrase.
`lm_loss` is each model's own loss on text of the world that no stage has seen; with --data,
`reply_loss` is what --lm thinks of the replies: a policy that has left the language reads worse.
"""

import json
import math
import random
from dataclasses import dataclass

import torch

from nanorlhf import judging, picture
from nanorlhf.config import arg, die, warn
from nanorlhf.data import batches, dialogue, examples, files, split, world
from nanorlhf.functional import rank_of
from nanorlhf.machine import durable
from nanorlhf.report import ranked_alike
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import make_scorer
from nanorlhf.speaker import SpeakerConfig, load_speaker

STAGES = {"base": "gpt", "sft": "sft", "ppo": "ppo"}  # rung -> its stage
OTHERS = "demonstrations base_fewshot best_of_4 best_of_16 constant preferred not_preferred".split()


@dataclass
class Config(SpeakerConfig):
    """Compare all stages under --out, and other models, on held-out prompts: quality, KL, text."""

    IDLE = "labeler shots: data; val_data lm: data=0; best_of_prompts: data best_of=0"
    out: str = arg("out", "folder that holds gpt/, sft/, rm/ and ppo/, or some of them")
    models: list[str] = arg([], "more models, or with --data all: FOLDER, or NAME=FOLDER")
    data: list[str] = arg([], "prompts, of which a tenth is held out; default: the embedded world")
    val_data: list[str] = arg([], "held-out prompts; default: that tenth of --data")
    reward: str = arg("", "what PPO was trained on: FOLDER or path.py:function; default: OUT/rm")
    judge: list[str] = arg([], "what no stage has learned from: FOLDER or path.py:function")
    labeler: str = arg("", "whose taste `gold` is; default: all", choices=("", *world.PANEL))
    lm: str = arg("", "with --data: whose loss on the replies is shown; default: the first model")
    prompts: int = arg(1024, "held-out prompts, one sample each", low=2)  # one has no interval
    best_of: list[int] = arg([], "rungs for the best of N by --reward; default: 4 16, --data: none")
    best_of_prompts: int = arg(256, "of the prompts, for best-of-n", low=2)
    constant: int = arg(0, "a rung for the best constant reply of so many candidates; 0: none")
    reward_timeout: float = arg(600.0, "seconds until a judging function is given up; 0: never")
    people: bool = arg(False, "rungs for the replies that people judged, if --data holds feedback")
    temperature: float = arg(1.0, "of sampling and of the KL", low=0.01)
    shots: int = arg(2, "examples in the few-shot prompt of the base GPT")


@dataclass
class Rung:
    """One line of the ladder, before anyone has judged it."""

    name: str
    prompts: list  # of data.dialogue.Prompt; best-of-n answers the first of them only
    ids: list  # a response to each
    kl: float | None = None  # KL(this || SFT), in nats per response
    lm_loss: float | None = None  # nats per token of unseen documents


def main(cfg):
    if cfg.people and not cfg.data:
        die("--people shows the replies that --data holds judgements of")
    models, lm = load_models(cfg)
    reference = "sft" if "sft" in models or not cfg.data else next(iter(models))
    first, init = next(iter(models.values()))
    tokenizer = init.tokenizer
    block_size = min(gpt.config.block_size for gpt, _ in models.values())
    prompts = held_out_prompts(cfg, tokenizer, block_size)
    judges = judges_of(cfg, first, init, prompts)
    rng, rungs = random.Random(f"ladder/{cfg.seed}"), []
    if not cfg.data:
        stories = [tokenizer.encode(world.demonstrate(rng, p.text)) for p in prompts]
        rungs.append(Rung("demonstrations", prompts, [s + [tokenizer.eos_id] for s in stories]))
    for name in models:
        rungs += rungs_of(cfg, name, models, reference, prompts, rng)
        if name == reference and judges["reward_model"] and (cfg.best_of or not cfg.data):
            rungs += best_of(cfg, rungs[-1], models[name][0], tokenizer, judges)
    if cfg.constant:
        rungs += constant(cfg, [r for r in rungs if r.name in models], judges, tokenizer)
    rungs += people(cfg, tokenizer, block_size - cfg.max_new_tokens) if cfg.people else []
    sft = next((rung for rung in rungs if rung.name == "sft"), None)
    rows = [describe(cfg, rung, tokenizer, judges, sft, lm) for rung in rungs]
    write(cfg, rungs, rows, tokenizer)
    judging.print_table(rows)
    return rows


# ---- models, prompts, judges -------------------------------------------------------------------


def load_models(cfg):
    """({rung: (GPT, its Checkpoint)}, the GPT of --lm), all of one vocabulary."""
    names = folders(cfg) | ({"--lm": cfg.lm} if cfg.lm else {})
    models = {name: load_speaker(cfg, folder) for name, folder in names.items()}
    first = next(iter(models.values()))
    for _, other in models.values():
        checkpoint.same_vocabulary(first[1], other)
    lm, _ = models.pop("--lm", first)
    return models, lm


def folders(cfg):
    """{rung: folder} of the language models: of the stages that are there, and of --models."""
    stages = {} if cfg.data and cfg.models else STAGES
    folders = {rung: f"{cfg.out}/{name}" for rung, name in stages.items() if is_there(cfg, name)}
    for word in cfg.models:
        name, folder = judging.named(word)
        if name in folders or name in OTHERS:
            die(f"--models {word}: {name} is another rung's name; NAME={folder} gives it a new one")
        folders[name] = folder
    return folders or die(f"{cfg.out}: no checkpoint in gpt, sft or ppo, and no --models")


def is_there(cfg, stage):
    """Whether a stage has a checkpoint; says so if it has none."""
    there = checkpoint.find(f"{cfg.out}/{stage}") is not None
    if not there:
        print(f"{cfg.out}/{stage}: no checkpoint there; what needs one is left out")
    return there


def held_out_prompts(cfg, tokenizer, block_size):
    """Prompts that no stage has seen. Those of the world have to fit; others lose their left."""
    longest = 2
    if cfg.data:
        load = examples.load_prompts
        held_out = split.split_held_out(load(cfg.data), load(cfg.val_data))[1]
        held_out = batches.drawn(held_out, cfg.prompts, cfg.seed)
    else:
        texts = world.prompts("held_out", cfg.prompts, f"ladder/{cfg.seed}")
        held_out = [examples.Example([("user", text)], "") for text in texts]
        longest = max(len(dialogue.encode_prompt(tokenizer, e.messages)) for e in held_out)
    room = dialogue.room_for_prompts(cfg.max_new_tokens, block_size, longest)
    return dialogue.encode_prompts(tokenizer, held_out, room)


def judges_of(cfg, gpt, init, prompts):
    """{name: judge(prompts, ids) -> a number for each response}. `gold` is what the embedded world
    truly thinks; `reward_model` is None where there is no reward."""
    weights = world.PANEL[cfg.labeler] if cfg.labeler else world.GOLD_WEIGHTS
    decode = init.tokenizer.decode

    def gold(prompts, ids):
        return [world.utility(weights, p.text, decode(row)) for p, row in zip(prompts, ids)]

    def judge(spec, flag):
        dtype, limit = gpt.wte.weight.dtype, cfg.reward_timeout
        score = make_scorer(spec, init, gpt.device, dtype, prompts, flag, limit)
        return lambda prompts, ids: score(prompts, ids, [decode(row) for row in ids]).tolist()

    judges = {"reward_model": None} if cfg.data else {"gold": gold, "reward_model": None}
    if cfg.reward or is_there(cfg, "rm"):
        judges["reward_model"] = judge(cfg.reward or f"{cfg.out}/rm", "--reward")
    elif cfg.best_of or cfg.constant:
        die("--best_of and --constant go by a --reward")
    return judges | {spec: judge(spec, "--judge") for spec in cfg.judge}


# ---- rungs -------------------------------------------------------------------------------------


def rungs_of(cfg, name, models, reference, prompts, rng):
    """A model's own rung; the GPT of the stages has a second one, with examples in its prompt."""
    gpt, model = models[name]
    tokenizer, lm_loss, flags = model.tokenizer, None, sampling(cfg, name)
    if not cfg.data:
        lm_loss = judging.text_loss(gpt, tokenizer, world.corpus(100, f"ladder/{cfg.seed}"))
    if model.tokenizer.chat:
        prompt_ids = [p.ids for p in prompts]
        ids = sample_responses(gpt, tokenizer, prompt_ids, **flags)
        sft, _ = models.get(reference, (None, None))
        kl = sft and judging.mean_kl(gpt, sft, tokenizer, prompt_ids, ids, cfg.temperature)
        return [Rung(name, prompts, ids, kl, lm_loss)]
    pages = {name: [p.text + "\n" for p in prompts]}
    if name == "base" and not cfg.data:
        pages["base_fewshot"] = [judging.few_shot(rng, p.text, cfg.shots) for p in prompts]
    complete = lambda texts: judging.complete(gpt, tokenizer, texts, **flags)
    return [Rung(name, prompts, complete(texts), None, lm_loss) for name, texts in pages.items()]


def sampling(cfg, name):
    flags = {"max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "progress": name}
    return flags | {"temperature": cfg.temperature}


def best_of(cfg, sft, gpt, tokenizer, judges):
    """Rungs that train nothing: of n responses by the SFT model the one with the highest reward.
    `sft` is its own rung."""
    sizes = cfg.best_of or (4, 16)
    most, prompts, rungs = max(sizes), sft.prompts[: cfg.best_of_prompts], []
    repeated = [p for p in prompts for _ in range(most)]
    flags = sampling(cfg, f"best of {most}") | {"step": 1}
    ids = sample_responses(gpt, tokenizer, [p.ids for p in repeated], **flags)
    scores = torch.tensor(to_rank(judges["reward_model"](repeated, ids))).view(len(prompts), most)
    for n in sizes:
        kl = math.log(n) - (n - 1) / n  # an upper bound, arXiv:2401.01879
        rungs += [Rung(f"best_of_{n}", prompts, judging.best_of(n, scores, ids), kl, sft.lm_loss)]
    if not cfg.data:
        gold = torch.tensor(judges["gold"](repeated, ids), dtype=torch.float64).view_as(scores)
        accuracy, _ = ranked_alike(scores.tolist(), rank_of(gold).tolist())
        share = "-" if accuracy is None else f"{accuracy:.3f}"
        print(f"reward model against gold, all pairs of {most} SFT samples: {share}")
    return rungs


def to_rank(scores):
    """Scores by which replies are put in order, and so of all of them."""
    if n := sum(x != x for x in scores):
        die(f"--reward leaves out {n} of {len(scores)} replies; --best_of and --constant need all")
    return scores


def constant(cfg, rungs, judges, tokenizer):
    """The one reply that the reward likes best whatever is asked, of what the models have said."""
    reward, prompts = (lambda *x: to_rank(judges["reward_model"](*x))), rungs[0].prompts
    scored = [pair for r in rungs for pair in zip(r.ids, reward(r.prompts, r.ids))]
    reply = judging.best_constant(reward, prompts, scored, tokenizer.ends, cfg.constant)
    if not reply:
        warn("no reply ends by itself, so there is no rung for a constant one")
    return [Rung("constant", prompts, [reply] * len(prompts))] if reply else []


def people(cfg, tokenizer, room):
    """What people judged best of the held-out judgements, and the others."""
    load = lambda paths: examples.load_feedback(paths)[1] if paths else []
    judged, rungs = split.split_held_out(load(cfg.data), load(cfg.val_data))[1], []
    replies = [(e, *judgement) for e in judged for judgement in zip(e.completions, e.target)]
    for name, is_best in (("preferred", True), ("not_preferred", False)):
        pairs = [(e, reply) for e, reply, target in replies if (target == 1) == is_best]
        pairs = batches.drawn(pairs, cfg.prompts, cfg.seed)
        ids = [judging.reply_ids(tokenizer, e.messages, reply) for e, reply in pairs]
        prompts = dialogue.encode_prompts(tokenizer, [e for e, _ in pairs], room)
        rungs += [Rung(name, prompts, ids)] if ids else []
    return rungs


# ---- the table ---------------------------------------------------------------------------------


def describe(cfg, rung, tokenizer, judges, sft, lm):
    """One row of the ladder."""
    texts = [tokenizer.decode(ids) for ids in rung.ids]
    row = {"model": rung.name}
    for name, judge in judges.items():
        scores = judge and [x for x in judge(rung.prompts, rung.ids) if x == x]  # nan: left out
        row[name], row[f"{name}_ci"] = judging.interval(scores)
        if name == "gold":
            others = judge(sft.prompts, sft.ids) if sft and rung is not sft else []
            wins = judging.wins(scores, others)
            row["win_rate_vs_sft"], row["win_rate_ci"] = judging.interval(wins)
    row["kl"] = rung.kl
    row["eos_rate"] = sum(ids[-1] in tokenizer.ends for ids in rung.ids) / len(texts)
    row["length"] = sum(map(len, rung.ids)) / len(texts)
    if cfg.data:
        prompt_ids = [p.ids for p in rung.prompts]
        row["reply_loss"] = judging.mean_loss(lm, tokenizer, prompt_ids, rung.ids)
        row |= judging.variety(texts)
    else:
        n_good, n_sentences = map(sum, zip(*map(world.grammatical, texts)))
        row["grammatical"] = n_good / n_sentences if n_sentences else None
        row["lm_loss"] = rung.lm_loss
    sample = {"prompt": rung.prompts[0].text, "response": texts[0]}
    return row | {"n_prompts": len(texts), "sample": sample}


def write(cfg, rungs, rows, tokenizer):
    """ladder.json, its picture, and every rung's texts in ladder/NAME.jsonl; with --data these are
    called replies."""
    to = f"{cfg.out}/{'replies' if cfg.data else 'ladder'}"
    for rung in rungs:
        pairs = zip(rung.prompts, rung.ids)
        records = [{"prompt": p.text, "response": tokenizer.decode(ids)} for p, ids in pairs]
        files.write_records(f"{to}/{rung.name}.jsonl", records)
    durable.write_text(f"{to}.json", json.dumps(rows, indent=1))
    if not cfg.data:
        picture.ladder(cfg.out, rows, f"{to}.png")
