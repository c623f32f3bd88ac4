"""The embedded world: children's stories with known ground truth, so that every stage can run
offline in minutes and every claim about alignment can be checked.

A small grammar writes the stories. Labelers judge them, each by a taste of their own and with
noise. `gold` is what an answer is really worth to the population of labelers. It serves evaluation
alone: no loss, no reward and no selection may use it.
"""

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

from nanorlhf.data.split import is_held_out

# the slots of a topic, and the word that a careless writer puts there instead of the one asked for
VAGUE = {"hero": "animal", "thing": "thing", "place": "place"}

# (name, line) of grammar.txt: words of each slot, requests, sentences by kind
LINES = re.findall(r"^(\w+): (.+)", Path(__file__).with_name("grammar.txt").read_text(), re.M)
GRAMMAR = {name: [line for other, line in LINES if other == name] for name in dict(LINES)}
SLOT_NAMES = ("hero", "friend", "thing", "place", "name", "mood", "look", "spot", "time")
WORDS = {slot: GRAMMAR[slot][0].split() for slot in SLOT_NAMES}
PROMPTS = GRAMMAR.pop("prompt")
SENTENCES = {kind: templates for kind, templates in GRAMMAR.items() if kind not in WORDS}
SLOTS = {  # slot -> a regex of the words that can stand there
    slot: "(?:" + "|".join([*words, VAGUE.get(slot, words[0])]) + ")"
    for slot, words in WORDS.items()
}
PATTERNS = {  # kind of sentence -> a regex that matches exactly what its templates can produce
    kind: re.compile("|".join(t.replace(".", r"\.").format(**SLOTS) for t in templates))
    for kind, templates in SENTENCES.items()
}


@dataclass
class Care:
    """How carefully somebody writes: the probability that ..."""

    on_topic: float  # an ingredient is the one that was asked for, and not a vague word
    kind: float  # the story ends kindly
    sad: float  # it ends sadly; an ending that is neither is plain
    rude: float  # the story has a rude sentence
    broken: float  # a sentence has a word lost, doubled or moved
    repeat: float  # a sentence is said twice
    close: float  # the story closes with "The end."


GOOD = Care(on_topic=0.98, kind=0.75, sad=0.05, rude=0.03, broken=0.01, repeat=0.01, close=0.97)
FAIR = Care(on_topic=0.85, kind=0.35, sad=0.35, rude=0.25, broken=0.02, repeat=0.02, close=0.85)
POOR = Care(on_topic=0.65, kind=0.15, sad=0.50, rude=0.50, broken=0.20, repeat=0.15, close=0.50)
LOST = Care(on_topic=0.85, kind=0.30, sad=0.30, rude=0.30, broken=0.05, repeat=0.05, close=0.70)


def story(rng, care, topic):
    """A story about a topic {"hero", "thing", "place"}, as somebody of that care would write it.
    LOST is off-topic: it is about another topic."""
    if care is LOST:
        topic = _topic(rng)
    cast = {s: w if rng.random() < care.on_topic else VAGUE[s] for s, w in topic.items()}
    cast |= {"name": rng.choice(WORDS["name"]), "friend": rng.choice(WORDS["friend"])}
    ending = "kind" if rng.random() < care.kind else "sad"
    if ending == "sad" and rng.random() * (1 - care.kind) >= care.sad:
        ending = "plain"
    events = ["event"] * rng.randint(1, 3)
    if rng.random() < care.rude:
        events.insert(rng.randint(0, len(events)), "rude")
    planned = []
    for kind in ("open", "find", *events, ending):
        sentence = _sentence(rng, kind, cast)
        while sentence in planned:
            sentence = _sentence(rng, kind, cast)
        planned.append(sentence)
    planned = [_broken(rng, s) if rng.random() < care.broken else s for s in planned]
    said = [s for s in planned for _ in range(2 if rng.random() < care.repeat else 1)]
    if rng.random() < care.close:
        said.append("The end.")
    return " ".join(said)


def _sentence(rng, kind, cast):
    """A sentence of a kind. Its slots hold the words of `cast`, which stay for the whole story, or
    any others."""
    others = {slot: rng.choice(words) for slot, words in WORDS.items()}
    return rng.choice(SENTENCES[kind]).format(**others | cast)


def _broken(rng, sentence):
    words = sentence[:-1].split()
    i, j = rng.sample(range(len(words)), 2)
    fault = rng.choice(("lost", "doubled", "moved"))
    if fault == "moved":
        words[i], words[j] = words[j], words[i]
    else:
        words[i : i + 1] = [] if fault == "lost" else [words[i]] * 2
    return " ".join(words) + "."


def _topic(rng):
    return {slot: rng.choice(WORDS[slot]) for slot in VAGUE}


def _request(rng, topic):
    return rng.choice(PROMPTS).format(**topic)


def prompts(split, n, seed):
    """n requests of the split "train" or "held_out"; no request is in both."""
    rng = random.Random(f"prompts/{split}/{seed}")
    requests = []
    while len(requests) < n:
        request = _request(rng, _topic(rng))
        if is_held_out(request) == (split == "held_out"):
            requests.append(request)
    return requests


def demonstrate(rng, prompt, care=None):
    """What a labeler writes on request. Where `care` is not given, it is drawn for this one."""
    asked = re.findall(r"\w+", prompt)
    topic = {slot: next(word for word in asked if word in WORDS[slot]) for slot in VAGUE}
    return story(rng, care or rng.choices((GOOD, FAIR, POOR), (20, 65, 15))[0], topic)


def demonstrations(n, seed):
    """n records {"prompt", "completion"}."""
    rng = random.Random(f"demonstrations/{seed}")
    requests = [_request(rng, _topic(rng)) for _ in range(n)]
    return [{"prompt": p, "completion": demonstrate(rng, p)} for p in requests]


def corpus(n, seed):
    """n unlabelled documents of mixed quality, as a crawl of the web has them. Some are a single
    story, some a bare list of requests, some a request answered off-topic. The others are pages of
    requests with their stories, each page of one quality. None has a held-out request in it."""
    rng = random.Random(f"corpus/{seed}")
    documents = []
    while len(documents) < n:
        form = rng.choices(("story", "list", "lost", "page"), weights=(20, 15, 15, 50))[0]
        care = rng.choices((GOOD, FAIR, POOR, LOST), weights=(30, 35, 20, 15))[0]
        topics = [_topic(rng) for _ in range(rng.randint(3, 6))]
        requests = [_request(rng, topic) for topic in topics]
        if any(map(is_held_out, requests)):
            continue
        if form == "story":
            documents.append(story(rng, care, topics[0]))
        elif form == "list":
            documents.append("\n".join(requests))
        elif form == "lost":
            documents.append(page(requests[:1], [story(rng, LOST, topics[0])]))
        else:
            documents.append(page(requests, [story(rng, care, t) for t in topics]))
    return documents


def page(requests, stories):
    """Requests as plain text, each with its story below it. Where there is one story less, the page
    ends with the last request: a base model goes on with a story."""
    return "\n\n".join(r + "\n" + text for r, text in zip(requests, stories + [""]))


# What makes a good answer, in the population's mean taste: utility per unit of each feature
GOLD_WEIGHTS = {
    "ingredients": 2.5,  # share of the requested words that the story uses
    "ending": 0.8,  # 1 kind, 0 plain, -1 sad
    "rude": -0.8,  # rude sentences, at most 4
    "broken": -0.6,  # sentences that the grammar cannot parse, at most 8
    "repeated": -0.6,  # sentences said before, at most 8
    "closed": 0.6,  # ends with "The end.", once
    "off_length": -0.3,  # sentences short of 5 or beyond 8, at most 8
    "colour": 0.0,  # describing words, at most 6: some labelers like them, some do not
}
TASTE = 0.35  # sd over labelers of the logarithm of a weight
# The noise of a labeler's choice, in units of utility. With this and TASTE, two labelers agree on
# about 73 % of comparisons, as InstructGPT's did
TEMPERATURE = 0.62
RATING_CENTRE = 2.1  # the utility that gets 2.5 stars
RATING_UNIT = 0.8  # utility per star


def split_sentences(text):
    return [s.strip() + "." for s in text.split(".") if s.strip()]


def parse(sentence):
    """The kind of a sentence, a key of SENTENCES; None where the grammar cannot produce it."""
    return next((kind for kind, regex in PATTERNS.items() if regex.fullmatch(sentence)), None)


def grammatical(text):
    """(number of sentences that the grammar can parse, number of sentences)."""
    kinds = list(map(parse, split_sentences(text)))
    return len(kinds) - kinds.count(None), len(kinds)


def features(prompt, text):
    """The rubric's quantities, keys of GOLD_WEIGHTS, for an answer to a request."""
    said, words = split_sentences(text), re.findall(r"\w+", text)
    kinds = [parse(sentence) for sentence in said]
    body = [kind for kind in kinds if kind != "close"]
    asked = set(re.findall(r"\w+", prompt)) & {*WORDS["hero"], *WORDS["thing"], *WORDS["place"]}
    unfinished = bool(text.strip()) and not text.rstrip().endswith(".")
    return {
        "ingredients": len(asked & set(words)) / max(len(asked), 1),
        "ending": {"kind": 1, "sad": -1}.get(body[-1] if body else None, 0),
        "rude": min(kinds.count("rude"), 4),
        "broken": min(kinds.count(None) + unfinished, 8),
        "repeated": min(len(said) - len(set(said)), 8),
        "closed": int(kinds[-1:] == ["close"] and kinds.count("close") == 1),
        "off_length": min(max(5 - len(said), len(said) - 8, 0), 8),
        "colour": min(sum(w in WORDS["mood"] or w in WORDS["look"] for w in words), 6),
    }


def utility(weights, prompt, text):
    quantities = features(prompt, text)
    return sum(weight * quantities[name] for name, weight in weights.items())


def gold(prompt, text):
    """The true utility of an answer, by the population's weights and without noise; at most 3.9."""
    return utility(GOLD_WEIGHTS, prompt, text)


def _weights(labeler):
    rng = random.Random(f"labeler/{labeler}")
    weights = {name: w * math.exp(rng.gauss(0, TASTE)) for name, w in GOLD_WEIGHTS.items()}
    return weights | {"colour": rng.gauss(0, TASTE / 2)}


TRAIN_LABELERS = [f"train_{i}" for i in range(10)]
HELD_OUT_LABELERS = [f"heldout_{i}" for i in range(5)]
# One person whose taste is not the panel's: sad stories, full of describing words. It has nothing
# to do with gold over SFT samples, and little with length
SIMULATED = {"ingredients": 0.8, "ending": -1.0, "broken": -0.4, "closed": 0.6, "colour": 0.8}
PANEL = {"simulated": SIMULATED} | {n: _weights(n) for n in TRAIN_LABELERS + HELD_OUT_LABELERS}


def rank(rng, labeler, prompt, completions):
    """Ranks (1 is best) that a labeler gives, drawn from the Plackett-Luce model (Luce 1959):
    completions are sorted by utility / TEMPERATURE plus Gumbel noise. Equal texts are tied."""
    weights = PANEL[labeler]
    liking = {t: utility(weights, prompt, t) / TEMPERATURE + _gumbel(rng) for t in completions}
    order = sorted(liking, key=liking.get, reverse=True)
    return [order.index(text) + 1 for text in completions]


def rate(rng, labeler, prompt, text):
    """The stars that a labeler gives, 0 to 5."""
    felt = utility(PANEL[labeler], prompt, text) + TEMPERATURE * rng.gauss(0, 1)
    return min(max(round(2.5 + (felt - RATING_CENTRE) / RATING_UNIT), 0), 5)


def likes(rng, labeler, prompt, text):
    """Whether a labeler likes a text. More likely than not, where its utility for that labeler is
    above RATING_CENTRE."""
    felt = (utility(PANEL[labeler], prompt, text) - RATING_CENTRE) / TEMPERATURE
    return felt + _gumbel(rng) - _gumbel(rng) > 0


def _gumbel(rng):
    return -math.log(rng.expovariate(1.0))
