"""How far people agree with each other, with themselves and with a reward model, and whose
responses they prefer."""

from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass
from itertools import chain, combinations, groupby, product, starmap
from statistics import fmean, variance

from nanorlhf.config import DeviceConfig, arg, die, note
from nanorlhf.data import dialogue, examples, files, values
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run.checkpoint import load_model
from nanorlhf.scoring import score_responses

# what a labeler says of a response -> its worth
WORTH = {"rankings": lambda rank: -rank, "ratings": examples.stars, "thumbs": examples.like}

# One of the responses that were judged at once; `place`: on the page, `worth`: the more the better,
# `models`: all who wrote it
Response = namedtuple("Response", "text place worth models")

# What a labeler says of two responses, a and b, which are sorted by their texts, whatever the order
# in which they were shown. `question`: the prompt's turns and the two texts. `says`: 1 where a is
# better, -1 where b is, 0 for a tie. Or what a labeler says of one response, which is a and b:
# `question` has its text once, and `says` is its rating, or 1 for a like and 0 for a dislike.
# Sorted verdicts on one question are in the order of the labelers' names, and what a labeler was
# asked again comes after the first.
Verdict = namedtuple("Verdict", "question labeler is_repeat says a b")


@dataclass
class Config(DeviceConfig):
    """Agreement of the judgements in files that `label` wrote, and win rates of models. Intervals
    hold 95 % and take judgements as independent of each other."""

    IDLE = "device dtype: reward=0"
    files: list[str] = arg([], "files of judgements", positional=True)
    reward: str = arg("", "a reward model to compare with")


def main(cfg):
    verdicts = read_verdicts(cfg.files)
    levels = [v for v in verdicts if len(v.question) == 2]
    orders = [v for v in verdicts if len(set(v.question)) == 3]  # equal texts are not judged
    first = [v for v in orders if not v.is_repeat]
    alone = f", {sum(not v.is_repeat for v in levels):,} by themselves" if levels else ""
    labelers = ", ".join(sorted({v.labeler for v in verdicts}))
    note(f"{len(first):,} pairs of responses{alone}, judged by {labelers}")
    if levels:
        show_agreement(levels, "", alpha)
    show_agreement(orders, " on the order" if levels else "", kappa)
    decided = [v for v in first if v.says]
    show("the one shown first wins", [(v.says > 0) == (v.a.place < v.b.place) for v in decided])
    if cfg.reward and decided:
        show("the reward model agrees", [margin > 0 for margin in margins(cfg, decided)])
    for (one, other), points in sorted(contests(verdicts).items()):
        n_equal = sum(len(set(question)) == 2 for _, question, _ in points)
        ties = f", {n_equal:,} of them equal texts" if n_equal else ""
        show(f"{one} beats {other}", list(points.values()), ties)


def read_verdicts(paths):
    """Verdicts on all responses, by themselves where they were rated, and in pairs where several
    were judged at once."""
    verdicts = []
    judgements = examples.standing(files.read_records(paths), keep=True)
    for (_, *answer), lines in groupby(starmap(judged, judgements), lambda line: line[0]):
        verdicts += verdicts_of(chain(*(said for _, said in lines)), *answer)
    return verdicts or die(f"{' '.join(paths) or 'no file'}: no judgement in it")


def judged(source, record):
    """A line that `label` wrote -> (which answer it is part of, to what, of which kind, by whom,
    whether asked again), [(a response's text, worth, models)]."""
    is_ours = {"judgement_id", "prompt"} <= record.keys() and isinstance(record.get("models"), list)
    try:
        read = examples.recognise(record) if is_ours else {}
        kind, texts, target = (read.get(key, ()) for key in ("kind", "completions", "target"))
        models = [x if isinstance(x, list) else [x] for x in record["models"]] if kind else []
        words = [record.get("labeler"), *texts, *chain(*models)]
        if not kind or len(models) != len(texts) or {*map(type, words)} != {str}:
            raise values.Misfit("no judgement that `label` wrote, with texts, labeler and models")
        worths = [WORTH[kind](value) for value in target]
    except (values.LeftOut, values.Misfit) as error:
        die(f"{source}: {error}")
    answer = record["judgement_id"], tuple(read["prompt"]), kind, record["labeler"]
    return (*answer, "repeat_of" in record), list(zip(texts, worths, map(tuple, models)))


def verdicts_of(said, turns, kind, *head):
    """Verdicts on the responses that one answer judges."""
    responses = sorted(Response(text, place, *of) for place, (text, *of) in enumerate(said))
    if kind != "rankings":
        yield from (Verdict((turns, r.text), *head, r.worth, r, r) for r in responses)
    # a text with itself, too: the models that wrote it tie
    for a, b in [*combinations(responses, 2), *zip(responses, responses)]:
        sign = (a.worth > b.worth) - (a.worth < b.worth)
        yield Verdict((turns, a.text, b.text), *head, sign, a, b)


def contests(verdicts):
    """{(a model, another): {(labeler, question, whether the first model wrote the first text): what
    the first model gets, 1, or a half for a tie, or 0}}: a labeler's word on two texts of two
    models counts once."""
    points = defaultdict(dict)
    for v in verdicts:
        for a, b in product(v.a.models, v.b.models):
            if a != b and len(v.question) == 3 and not v.is_repeat:
                one, other = sorted((a, b))
                key = v.labeler, v.question, a == one or v.a.text == v.b.text
                points[one, other][key] = (1 + (v.says if a == one else -v.says)) / 2
    return points


def show_agreement(verdicts, on_what, beyond_chance):
    """Two lines: how often two labelers say the same, and one labeler who was asked again."""
    pairs = pairs_of(verdicts)
    own = [(a, b) for a, b in pairs if a.labeler == b.labeler and a.is_repeat != b.is_repeat]
    others = [(a, b) for a, b in pairs if a.labeler != b.labeler and not a.is_repeat | b.is_repeat]
    again = "asked again, agrees" if on_what else "a labeler, asked again, agrees"
    for what, group in (("two labelers agree", others), (again, own)):
        value = beyond_chance(group)
        more = "" if value is None else f", {beyond_chance.__name__} {value:.2f}"
        show(what + on_what, [a.says == b.says for a, b in group], more)


def grouped(items, key):
    """Lists of the items that have the same key, in the order of the keys."""
    return [list(group) for _, group in groupby(sorted(items, key=key), key)]


def pairs_of(verdicts):
    """Pairs of verdicts on the same two responses, in the order of the labelers' names."""
    groups = grouped(sorted(verdicts), lambda v: v.question)
    return [pair for group in groups for pair in combinations(group, 2)]


def kappa(pairs):
    """Cohen's kappa (1960): the share of equal verdicts, p, beyond what chance gives, e, as a part
    of what is possible beyond it: (p - e) / (1 - e). Of more than two labelers, the mean over any
    two, by how often they judged the same. None where chance leaves nothing."""
    kappas = []
    for group in grouped(pairs, lambda pair: [v.labeler for v in pair]):
        ones, others = (Counter(v.says for v in side) for side in zip(*group))
        chance = sum(ones[says] * others[says] for says in ones) / len(group) ** 2
        if chance < 1:
            same = fmean(a.says == b.says for a, b in group)
            kappas += [(same - chance) / (1 - chance)] * len(group)
    return fmean(kappas) if kappas else None


def alpha(pairs):
    """Krippendorff's alpha for numbers ("Computing Krippendorff's Alpha-Reliability", 2011):

        alpha = 1 - D_o / D_e,    D the mean of (x - y)^2

    over pairs of values of one response for D_o, each value of m weighing 1 / (m - 1), and over any
    two values for D_e. By sums of squares D_o is twice the mean over all values of the variance
    within their response, and D_e twice their variance. 1: all say the same; 0: as by chance.
    None where all values are equal."""
    units = defaultdict(dict)  # a response, also of one labeler asked again -> {by whom: value}
    for pair in pairs:
        unit = units[pair[0].question, len({v.labeler for v in pair}) == 1 and pair[0].labeler]
        unit.update({(v.labeler, v.is_repeat): v.says for v in pair})
    within = [list(unit.values()) for unit in units.values()]
    expected = variance([value for unit in within for value in unit]) if within else 0
    observed = (variance(unit) for unit in within for _ in unit)
    return 1 - fmean(observed) / expected if expected else None


def wilson(mean, n, z=1.96):
    """The 95 % interval of a share of n by Wilson (1927), which stays within 0 and 1."""
    middle, scale = mean + z * z / (2 * n), 1 + z * z / n
    half = z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5
    return max(middle - half, 0.0) / scale, min((middle + half) / scale, 1.0)


def show(what, points, more=""):
    """A line with the mean of points from 0 to 1 and its interval."""
    interval, n = "-", len(points)
    if points:
        low, high = wilson(fmean(points), n)
        interval = f"{fmean(points):.3f} [{low:.3f}, {high:.3f}] of {n:,}"
    note(f"  {what:34} {interval}{more}")


def margins(cfg, verdicts):
    """By how much the reward model scores that response higher which a labeler prefers."""
    model, checkpoint = load_model(cfg.reward, "reward")
    device, tokenizer = pick_device(cfg), checkpoint.tokenizer
    cast(model, pick_dtype(cfg, device), device).eval()
    prompts = [dialogue.encode_prompt(tokenizer, list(v.question[0])) for v in verdicts]
    texts = [tokenizer.encode(v.question[side]) for side in (1, 2) for v in verdicts]
    first, second = score_responses(model, tokenizer, prompts * 2, texts).view(2, -1).tolist()
    return [v.says * (a - b) for v, a, b in zip(verdicts, first, second)]
