"""How far people agree with each other, with themselves and with a reward model, and whose
responses they prefer."""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations

from nanorlhf.config import arg, die, note
from nanorlhf.data.examples import standing
from nanorlhf.data.files import read_records
from nanorlhf.data.values import prompt
from nanorlhf.human.doubt import scores_of


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
    """What a labeler said of two responses to a prompt: 1, the first is better, -1, or 0 for a
    tie. The two stand in the order of their texts, whatever the order in which they were shown."""

    messages: tuple  # the prompt, as turns
    texts: tuple
    said: int
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
    pairs = met(first, lambda a, b: a.labeler != b.labeler)
    show("two labelers agree", [a.said == b.said for a, b in pairs], kappa(pairs))
    own = met(verdicts, lambda a, b: a.labeler == b.labeler and a.is_repeat != b.is_repeat)
    show("a labeler, asked again, agrees", [a.said == b.said for a, b in own], kappa(own))
    decided = [v for v in first if v.said]
    show("the one shown first wins", [(v.said > 0) != v.is_swapped for v in decided])
    if cfg.reward and decided:
        liked = margins(cfg, decided)
        show("the reward model agrees", [v.said * m > 0 for v, m in zip(decided, liked)])
    for (one, other), points in sorted(contests(first).items()):
        show(f"{one} beats {other}", points)
    show_disputed(pairs, cfg.disputed)


def read_verdicts(files):
    """Verdicts on all pairs of responses that were judged at once."""
    judged = defaultdict(list)
    for file in files:
        for source, record in standing(read_records([file]), keep=True):
            if not {"judgement_id", "labeler", "models"} <= record.keys():
                die(f"{source}: no judgement that `label` wrote")
            judged[file, record["judgement_id"], record["labeler"]].append(record)
    found = []
    for (_, _, labeler), records in judged.items():
        about = records[0]
        if "ranks" in about:
            texts, worth = about["completions"], [-rank for rank in about["ranks"]]
            models = about["models"]
        else:
            texts = [r["completion"] for r in records]
            worth = [r.get("rating", r.get("label")) for r in records]
            models = [m for r in records for m in r["models"]]
        for i, j in combinations(range(len(texts)), 2):
            is_swapped = texts[i] > texts[j]
            a, b = (j, i) if is_swapped else (i, j)
            said = (worth[a] > worth[b]) - (worth[a] < worth[b])
            both = (texts[a], texts[b]), said, labeler, (models[a], models[b])
            asked = tuple(prompt({"prompt": about["prompt"]}))
            found.append(Verdict(asked, *both, is_swapped, "repeat_of" in about))
    return found or die(f"{files[0]}: no two responses were judged together")


def met(verdicts, do_count):
    """Pairs of verdicts on the same two responses, those that count, in the order of the labelers'
    names; of one labeler's the earlier comes first."""
    same = defaultdict(list)
    for v in sorted(verdicts, key=lambda v: (v.labeler, v.is_repeat)):
        same[v.messages, v.texts].append(v)
    return [(a, b) for group in same.values() for a, b in combinations(group, 2) if do_count(a, b)]


def kappa(pairs):
    """Cohen's kappa (1960): the share of equal verdicts, p, beyond what chance gives, e, as a part
    of what is possible beyond it: (p - e) / (1 - e). Of more than two labelers, the mean over any
    two, by how often they met. None where chance leaves nothing."""
    groups = defaultdict(list)
    for a, b in pairs:
        groups[a.labeler, b.labeler].append((a.said, b.said))
    found = []
    for said in groups.values():
        ones, others = (Counter(pair[side] for pair in said) for side in (0, 1))
        chance = sum(ones[word] * others[word] for word in ones) / len(said) ** 2
        equal = sum(a == b for a, b in said) / len(said)
        found += [(equal - chance) / (1 - chance)] * len(said) if chance < 1 else []
    return sum(found) / len(found) if found else None


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
    found = defaultdict(list)
    for v in verdicts:
        one, other = v.models
        if one < other:
            found[one, other].append((1 + v.said) / 2)
        elif other < one:
            found[other, one].append((1 - v.said) / 2)
    return found


def margins(cfg, verdicts):
    """By how much the reward model scores the first of each two responses higher."""
    pairs = [(list(v.messages), v.texts[side]) for side in (0, 1) for v in verdicts]
    ones, others = scores_of(cfg, cfg.reward, pairs).view(2, -1)
    return (ones - others).tolist()


def show_disputed(pairs, n):
    """The pairs of responses on which labelers agree least."""
    groups = defaultdict(list)
    for a, b in pairs:
        groups[a.messages, a.texts].append((a, b))
    share = lambda group: sum(a.said == b.said for a, b in group) / len(group)
    disputed = [(key, group) for key, group in groups.items() if share(group) < 1]
    for (asked, texts), group in sorted(disputed, key=lambda item: share(item[1]))[:n]:
        said = {v.labeler: v.said for pair in group for v in pair}
        print("", *(f"{role}: {content}" for role, content in asked), sep="\n")
        for text, sign in zip(texts, (1, -1)):
            fans = [name for name, s in said.items() if s == sign]
            print(f"  {', '.join(fans) or 'nobody'} for | {text}")
