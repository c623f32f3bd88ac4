"""How far people agree with each other, with themselves and with a reward model, and whose
responses they prefer."""

from collections import Counter, namedtuple
from dataclasses import dataclass
from itertools import combinations, count, groupby
from statistics import fmean

from nanorlhf.config import arg, die, note
from nanorlhf.data import dialogue
from nanorlhf.data.examples import standing
from nanorlhf.data.files import read_records
from nanorlhf.data.values import prompt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run.checkpoint import load_model
from nanorlhf.scoring import score_responses

ANSWER = ("judgement_id", "labeler")  # the keys that tell answers apart

# One of the responses that were judged at once; `place`: on the page, `worth`: the more the better
Response = namedtuple("Response", "text place worth model")

# A labeler's judgement of two responses, a and b, which are sorted by their texts, whatever the
# order in which they were shown. `question`: the prompt's turns and the two texts. `sign`: 1 where
# a is better, -1 where b is, 0 for a tie. Sorted verdicts on one question are in the order of the
# labelers' names, and what a labeler was asked again comes after the first.
Verdict = namedtuple("Verdict", "question labeler is_repeat sign a b")


@dataclass
class Config:
    """Agreement of the judgements in files that `label` wrote, and win rates of models. Intervals
    hold 95 % and take judgements as independent of each other."""

    files: list[str] = arg([], "files of judgements", positional=True)
    reward: str = arg("", "a reward model to compare with")
    disputed: int = arg(3, "questions to show that labelers agree on least", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))


def main(cfg):
    verdicts = read_verdicts(cfg.files)
    first = [v for v in verdicts if not v.is_repeat]
    labelers = sorted({v.labeler for v in first})
    note(f"{len(first):,} pairs of responses, judged by {', '.join(labelers)}")
    pairs = pairs_of(verdicts)
    own = [(a, b) for a, b in pairs if a.labeler == b.labeler and a.is_repeat != b.is_repeat]
    others = [(a, b) for a, b in pairs_of(first) if a.labeler != b.labeler]
    show("two labelers agree", agreements(others), kappa(others))
    show("a labeler, asked again, agrees", agreements(own), kappa(own))
    decided = [v for v in first if v.sign]
    show("the one shown first wins", [(v.sign > 0) == (v.a.place < v.b.place) for v in decided])
    if cfg.reward and decided:
        show("the reward model agrees", [margin > 0 for margin in margins(cfg, decided)])
    contests = [v for v in first if v.a.model != v.b.model]
    for (one, other), group in grouped(contests, lambda v: sorted([v.a.model, v.b.model])):
        signs = [v.sign if v.a.model == one else -v.sign for v in group]
        show(f"{one} beats {other}", [(1 + sign) / 2 for sign in signs])  # a tie is half a point
    show_disputed(others, cfg.disputed)


def read_verdicts(files):
    """Verdicts on all pairs of responses that were judged at once."""
    verdicts = []
    for file in dict.fromkeys(files):
        judgements = standing(read_records([file]), keep=True)  # those of one answer are neighbours
        for _, group in groupby(judgements, lambda pair: [pair[1].get(key) for key in ANSWER]):
            verdicts += verdicts_of(*zip(*group))
    return verdicts or die(f"{' '.join(files) or 'no file'}: no two responses judged together")


def verdicts_of(sources, records):
    """Verdicts on all pairs of the responses that one answer judges."""
    record = records[0]
    if not {*ANSWER, "models"} <= record.keys():
        die(f"{sources[0]}: no judgement that `label` wrote")
    turns = tuple(prompt({"prompt": record["prompt"]}))
    texts = record.get("completions") or [r["completion"] for r in records]
    worths = [-rank for rank in record.get("ranks", ())]
    worths = worths or [r.get("rating", r.get("label")) for r in records]
    models = [model for r in records for model in r["models"]]
    for a, b in combinations(sorted(map(Response, texts, count(), worths, models)), 2):
        question, sign = (turns, a.text, b.text), (a.worth > b.worth) - (a.worth < b.worth)
        yield Verdict(question, record["labeler"], "repeat_of" in record, sign, a, b)


def grouped(items, key):
    """[(key, the items that have it)], in the order of the keys."""
    return [(value, list(group)) for value, group in groupby(sorted(items, key=key), key)]


def pairs_of(verdicts):
    """Pairs of verdicts on the same two responses, in the order of the labelers' names."""
    groups = grouped(sorted(verdicts), lambda v: v.question)
    return [pair for _, group in groups for pair in combinations(group, 2)]


def agreements(pairs):
    return [one.sign == other.sign for one, other in pairs]


def kappa(pairs):
    """Cohen's kappa (1960): the share of equal verdicts, p, beyond what chance gives, e, as a part
    of what is possible beyond it: (p - e) / (1 - e). Of more than two labelers, the mean over any
    two, by how often they judged the same. None where chance leaves nothing."""
    kappas = []
    for _, group in grouped(pairs, lambda pair: [v.labeler for v in pair]):
        ones, others = (Counter(v.sign for v in side) for side in zip(*group))
        chance = sum(ones[sign] * others[sign] for sign in ones) / len(group) ** 2
        if chance < 1:
            kappas += [(fmean(agreements(group)) - chance) / (1 - chance)] * len(group)
    return fmean(kappas) if kappas else None


def wilson(mean, n, z=1.96):
    """The 95 % interval of a share of n by Wilson (1927), which stays within 0 and 1."""
    middle, scale = mean + z * z / (2 * n), 1 + z * z / n
    half = z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / scale, (middle + half) / scale


def show(what, points, kappa=None):
    """A line with the mean of points from 0 to 1 and its interval."""
    interval = "-"
    if points:
        low, high = wilson(fmean(points), len(points))
        interval = f"{fmean(points):.3f} [{low:.3f}, {high:.3f}] of {len(points):,}"
    print(f"  {what:34} {interval}" + (f", kappa {kappa:.2f}" if kappa is not None else ""))


def margins(cfg, verdicts):
    """By how much the reward model scores that response higher which a labeler prefers."""
    model, checkpoint = load_model(cfg.reward, "reward")
    device, tokenizer = pick_device(cfg), checkpoint.tokenizer
    cast(model, pick_dtype(cfg, device), device).eval()
    prompts = [dialogue.encode_prompt(tokenizer, list(v.question[0])) for v in verdicts]
    texts = [tokenizer.encode(v.question[side]) for side in (1, 2) for v in verdicts]
    first, second = score_responses(model, tokenizer, prompts * 2, texts).view(2, -1).tolist()
    return [v.sign * (a - b) for v, a, b in zip(verdicts, first, second)]


def show_disputed(pairs, n):
    """The pairs of responses on which labelers agree least."""
    groups = [group for _, group in grouped(pairs, lambda pair: pair[0].question)]
    disputed = [group for group in groups if not all(agreements(group))]
    for group in sorted(disputed, key=lambda group: fmean(agreements(group)))[:n]:
        turns, one, other = group[0][0].question
        print("", *(f"{role}: {content}" for role, content in turns), sep="\n")
        for text, sign in ((one, 1), (other, -1)):
            fans = sorted({v.labeler for pair in group for v in pair if v.sign == sign})
            print(f"  {', '.join(fans) or 'nobody'} for | {text}")
