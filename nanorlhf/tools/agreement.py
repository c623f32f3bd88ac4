"""How far people agree with each other, with themselves and with a reward model, and whose
responses they prefer."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations

from nanorlhf.config import arg, die, note
from nanorlhf.data import dialogue
from nanorlhf.data.examples import standing
from nanorlhf.data.files import read_records
from nanorlhf.data.values import prompt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run.checkpoint import load_model
from nanorlhf.scoring import score_responses


@dataclass
class Config:
    """Agreement of the judgements in files that `label` wrote, and win rates of models. Intervals
    hold 95 % and take judgements as independent of each other."""

    files: list[str] = arg([], "files of judgements", positional=True)
    reward: str = arg("", "a reward model to compare with")
    disputed: int = arg(3, "questions to show that labelers agree on least", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Verdict:
    """A labeler's judgement of two responses to a prompt, which stand in the order of their texts,
    whatever the order in which they were shown."""

    messages: tuple  # the prompt, as turns
    texts: tuple
    sign: int  # 1: the first is better, -1: the second, 0: a tie
    labeler: str
    models: tuple  # who wrote each
    is_swapped: bool  # shown in the other order
    is_repeat: bool


def main(cfg):
    if not cfg.files:
        die("which judgements? python -m nanorlhf agreement FILE ...; --help lists the flags")
    verdicts = read_verdicts(cfg.files)
    first = [v for v in verdicts if not v.is_repeat]
    labelers = sorted({v.labeler for v in first})
    note(f"{len(first):,} pairs of responses, judged by {', '.join(labelers)}")
    pairs = pairs_of(verdicts)
    others = [(a, b) for a, b in pairs_of(first) if a.labeler != b.labeler]
    own = [(a, b) for a, b in pairs if a.labeler == b.labeler and a.is_repeat != b.is_repeat]
    show("two labelers agree", agreements(others), kappa(others))
    show("a labeler, asked again, agrees", agreements(own), kappa(own))
    decided = [v for v in first if v.sign]
    show("the one shown first wins", [(v.sign > 0) != v.is_swapped for v in decided])
    if cfg.reward and decided:
        margins = score_margins(cfg, decided)
        show("the reward model agrees", [v.sign * m > 0 for v, m in zip(decided, margins)])
    for (one, other), points in sorted(contests(first).items()):
        show(f"{one} beats {other}", points)
    show_disputed(others, cfg.disputed)


def read_verdicts(files):
    """Verdicts on all pairs of responses that were judged at once."""
    answers = defaultdict(list)  # (file, question, labeler) -> records
    for file in files:
        for source, record in standing(read_records([file]), keep=True):
            if not {"judgement_id", "labeler", "models"} <= record.keys():
                die(f"{source}: no judgement that `label` wrote")
            answers[file, record["judgement_id"], record["labeler"]].append(record)
    verdicts = []
    for (_, _, labeler), records in answers.items():
        messages = tuple(prompt({"prompt": records[0]["prompt"]}))
        is_repeat = "repeat_of" in records[0]
        for pair in combinations(responses_of(records), 2):
            texts, worths, models = zip(*sorted(pair, key=lambda response: response[0]))
            sign = (worths[0] > worths[1]) - (worths[0] < worths[1])
            is_swapped = pair[0][0] > pair[1][0]
            verdict = Verdict(messages, texts, sign, labeler, models, is_swapped, is_repeat)
            verdicts.append(verdict)
    return verdicts or die(f"{files[0]}: no two responses were judged together")


def responses_of(records):
    """(text, worth, model) of each response that one answer judges, in the order of the page."""
    record = records[0]
    if "ranks" in record:
        return zip(record["completions"], [-rank for rank in record["ranks"]], record["models"])
    return [(r["completion"], r.get("rating", r.get("label")), *r["models"]) for r in records]


def pairs_of(verdicts):
    """Pairs of verdicts on the same two responses, in the order of the labelers' names; of one
    labeler's the earlier comes first."""
    verdicts = sorted(verdicts, key=lambda v: (v.labeler, v.is_repeat))
    groups = grouped(verdicts, lambda v: (v.messages, v.texts)).values()
    return [pair for group in groups for pair in combinations(group, 2)]


def grouped(items, key):
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def agreements(pairs):
    return [one.sign == other.sign for one, other in pairs]


def share(pairs):
    return sum(agreements(pairs)) / len(pairs)


def kappa(pairs):
    """Cohen's kappa (1960): the share of equal verdicts, p, beyond what chance gives, e, as a part
    of what is possible beyond it: (p - e) / (1 - e). Of more than two labelers, the mean over any
    two, by how often they judged the same. None where chance leaves nothing."""
    total = n = 0
    for group in grouped(pairs, lambda pair: (pair[0].labeler, pair[1].labeler)).values():
        ones, others = (Counter(v.sign for v in side) for side in zip(*group))
        chance = sum(ones[sign] * others[sign] for sign in ones) / len(group) ** 2
        if chance < 1:
            total += len(group) * (share(group) - chance) / (1 - chance)
            n += len(group)
    return total / n if n else None


def wilson(mean, n, z=1.96):
    """The 95 % interval of a share of n by Wilson (1927), which stays within 0 and 1."""
    middle, scale = mean + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return (middle - half) / scale, (middle + half) / scale


def show(what, points, kappa=None):
    if not points:
        print(f"  {what:34} -")
        return
    mean = sum(points) / len(points)
    low, high = wilson(mean, len(points))
    beyond = "" if kappa is None else f", kappa {kappa:.2f}"
    print(f"  {what:34} {mean:.3f} [{low:.3f}, {high:.3f}] of {len(points):,}{beyond}")


def contests(verdicts):
    """{two models: points of the first for each pair of their responses, half a point for a tie}"""
    points = defaultdict(list)
    for v in verdicts:
        sign = v.sign if v.models[0] < v.models[1] else -v.sign
        if len(set(v.models)) == 2:
            points[tuple(sorted(v.models))].append((1 + sign) / 2)
    return points


def score_margins(cfg, verdicts):
    """By how much the reward model scores the first of each two responses higher."""
    model, checkpoint = load_model(cfg.reward, "reward")
    device, tokenizer = pick_device(cfg), checkpoint.tokenizer
    cast(model, pick_dtype(cfg, device), device).eval()
    prompts = [dialogue.encode_prompt(tokenizer, list(v.messages)) for v in verdicts]
    texts = [tokenizer.encode(v.texts[side]) for side in (0, 1) for v in verdicts]
    first, second = score_responses(model, tokenizer, prompts * 2, texts).view(2, -1)
    return (first - second).tolist()


def show_disputed(pairs, n):
    """The pairs of responses on which labelers agree least."""
    groups = grouped(pairs, lambda pair: (pair[0].messages, pair[0].texts))
    disputed = [key for key, group in groups.items() if share(group) < 1]
    for messages, texts in sorted(disputed, key=lambda key: share(groups[key]))[:n]:
        signs = {v.labeler: v.sign for pair in groups[messages, texts] for v in pair}
        print("", *(f"{role}: {content}" for role, content in messages), sep="\n")
        for text, sign in zip(texts, (1, -1)):
            fans = [labeler for labeler in signs if signs[labeler] == sign]
            print(f"  {', '.join(fans) or 'nobody'} for | {text}")
