"""The embedded world: gold ranks as a person would, labelers are noisy but oriented like gold."""

import math
import random
import re
from dataclasses import replace
from itertools import combinations
from statistics import correlation, mean

import pytest

from nanorlhf.data import world
from nanorlhf.data.split import is_held_out
from nanorlhf.data.world import GOLD_WEIGHTS, HELD_OUT_LABELERS, PANEL, TRAIN_LABELERS, Care, gold

CLEAN = Care(on_topic=1, kind=0.4, sad=0.3, rude=0.3, broken=0, repeat=0, close=0.8)
TOPIC = {"hero": "fox", "thing": "kite", "place": "river"}
PROMPT = "Tell me a story about a fox, a kite and the river."
BEST = sum(max(weight, 0) for weight in GOLD_WEIGHTS.values())


def say(kind, i=0, **topic):
    """The i-th sentence of a kind, with the first word of each list where TOPIC says nothing."""
    words = {slot: options[0] for slot, options in world.WORDS.items()}
    return world.SENTENCES[kind][i].format(**words | TOPIC | topic)


def tell(ending="kind", third="event", **topic):
    """A complete story of six sentences, as a list."""
    kinds = ("open", "find", third, "event", ending, "close")
    return [say(kind, int(i == 3), **topic) for i, kind in enumerate(kinds)]


def backwards(sentence):
    return " ".join(reversed(sentence[:-1].split())) + "."


OTHER = {"hero": "goat", "thing": "drum", "place": "hill"}
SAID = tell()
KIND, PLAIN, SAD = (" ".join(tell(ending)) for ending in ("kind", "plain", "sad"))
OFF_TOPIC = " ".join(tell("sad", **OTHER))
RUDE = " ".join(tell("sad", "rude", **OTHER))
UNGRAMMATICAL = RUDE.replace(say("find", **OTHER), backwards(say("find", **OTHER)))
FROM_GOOD_TO_BAD = [KIND, PLAIN, SAD, OFF_TOPIC, RUDE, UNGRAMMATICAL]  # one more fault each
GIBBERISH = "Fnord blep gna. Wug wug mimsy. Tove ot slithy. Brillig in wabe. Gimble gyre."


def fill(rng, template):
    return template.format(**{slot: rng.choice(words) for slot, words in world.WORDS.items()})


def slots(text):
    """Heroes, things and places masked: what is left is the phrasing."""
    return re.sub(
        r"\b("
        + "|".join(world.WORDS["hero"] + world.WORDS["thing"] + world.WORDS["place"])
        + r")\b",
        "_",
        text,
    )


# ---- gold --------------------------------------------------------------------------------------


def test_gold_ranks_stories_as_a_person_would():
    utilities = [gold(PROMPT, text) for text in FROM_GOOD_TO_BAD]
    assert utilities == sorted(set(utilities), reverse=True)
    for worse in (GIBBERISH, ""):
        assert gold(PROMPT, worse) < gold(PROMPT, RUDE)


def test_each_step_of_that_ranking_changes_one_feature():
    for better, worse in zip(FROM_GOOD_TO_BAD, FROM_GOOD_TO_BAD[1:]):
        a, b = world.features(PROMPT, better), world.features(PROMPT, worse)
        assert sum(a[name] != b[name] for name in GOLD_WEIGHTS) - (a["colour"] != b["colour"]) == 1


def test_a_complete_kind_story_has_the_most_there_is():
    assert gold(PROMPT, KIND) == pytest.approx(BEST)
    rng = random.Random(1)
    stories = [world.story(rng, world.GOOD, TOPIC) for _ in range(300)]
    assert max(gold(PROMPT, text) for text in stories) == pytest.approx(BEST)


@pytest.mark.parametrize(
    "feature, change, sentences",
    [
        ("ending", -1, tell("plain")),
        ("ending", -2, tell("sad")),
        ("ingredients", -1 / 3, tell(thing="drum")),
        ("ingredients", -2 / 3, tell(thing="drum", place="hill")),
        ("rude", 1, tell(third="rude")),
        ("broken", 1, [*SAID[:2], backwards(SAID[2]), *SAID[3:]]),
        ("repeated", 1, SAID[:3] + SAID[2:]),
        ("closed", -1, SAID[:-1]),
        ("off_length", 1, SAID[:2] + SAID[-2:]),
        ("off_length", 1, SAID[:4] + [say("event", i) for i in (2, 3, 4)] + SAID[4:]),
    ],
)
def test_one_fault_alone_costs_its_weight(feature, change, sentences):
    text = " ".join(sentences)
    before, after = world.features(PROMPT, KIND), world.features(PROMPT, text)
    moved = {k: after[k] - before[k] for k in GOLD_WEIGHTS if after[k] != before[k]}
    moved.pop("colour", None)
    assert moved == pytest.approx({feature: change})
    cost = GOLD_WEIGHTS[feature] * change
    assert cost < 0 and gold(PROMPT, text) - gold(PROMPT, KIND) == pytest.approx(cost)


def test_a_text_that_breaks_off_is_worse_than_its_whole_sentences():
    for whole, cut in ((KIND, KIND + " The fo"), (PLAIN, PLAIN[:-1]), (SAD, SAD + " One day")):
        assert gold(PROMPT, cut) < gold(PROMPT, whole)


def test_words_of_the_request_and_the_close_count_once_and_as_whole_words():
    assert world.features(PROMPT, KIND + " The fox, fox, kite, river.")["ingredients"] == 1
    assert world.features(PROMPT, "Foxes flew kites over rivers.")["ingredients"] == 0
    assert world.features(PROMPT, KIND + " The end.")["closed"] == 0  # twice is not closed


def test_gold_is_a_fixed_function_of_prompt_and_text():
    assert gold(PROMPT, KIND) == gold(PROMPT, KIND)
    assert gold(PROMPT.replace("fox", "bear"), KIND) < gold(PROMPT, KIND)


# ---- the grammar -------------------------------------------------------------------------------


def test_every_sentence_the_grammar_makes_parses_to_its_own_kind():
    rng = random.Random(1)
    for kind, templates in world.SENTENCES.items():
        for template in templates:
            for _ in range(100):
                sentence = fill(rng, template)
                assert world.parse(sentence) == kind, sentence


def test_a_sentence_parses_whole_or_not_at_all():
    for sentence in SAID:
        assert world.parse(sentence)
        for other in (sentence[:-1], sentence[:-1] + "!", "And " + sentence, sentence + " And."):
            assert world.parse(other) is None, other


@pytest.mark.parametrize("kind, sad, ending", [(1, 0, "kind"), (0, 1, "sad"), (0, 0, "plain")])
def test_a_story_without_faults_has_its_sentences_in_their_order(kind, sad, ending):
    rng = random.Random(2)
    for _ in range(300):
        text = world.story(rng, replace(CLEAN, kind=kind, sad=sad), TOPIC)
        kinds = list(map(world.parse, world.split_sentences(text)))
        first, second, *events, last = [k for k in kinds if k != "close"]
        assert (first, second, last) == ("open", "find", ending), text
        assert set(events) <= {"event", "rude"} and events.count("rude") <= 1
        n = len(kinds)
        assert world.grammatical(text) == (n, n) and 4 <= n <= 8
        assert gold(PROMPT, text) <= BEST + 1e-9


def test_a_shuffled_sentence_does_not_parse():
    rng, tried = random.Random(3), 0
    for kind in world.SENTENCES:
        for _ in range(200):
            words = fill(rng, rng.choice(world.SENTENCES[kind]))[:-1].split()
            shuffled = rng.sample(words, len(words))
            if shuffled != words:
                assert world.parse(" ".join(shuffled) + ".") is None, shuffled
                tried += 1
    assert tried > 1000


def test_care_decides_how_often_faults_occur():
    rng = random.Random(4)

    def share(feature, **care):
        stories = [world.story(rng, replace(CLEAN, **care), TOPIC) for _ in range(300)]
        return mean(min(world.features(PROMPT, text)[feature], 1) for text in stories)

    assert share("ingredients", on_topic=1) == 1 and share("ingredients", on_topic=0) < 0.2
    assert share("broken", broken=0) == 0 and share("broken", broken=1) > 0.95
    assert share("repeated", repeat=0) == 0 and share("repeated", repeat=1) == 1
    assert share("rude", rude=0) == 0 and 0.2 < share("rude", rude=0.3) < 0.4
    assert share("closed", close=0) == 0 and share("closed", close=1) == 1
    assert share("ending", kind=1) == 1 and share("ending", kind=0, sad=0) == 0


# ---- prompts, demonstrations, corpus -----------------------------------------------------------


def test_training_and_held_out_prompts_never_overlap():
    train, held_out = (world.prompts(split, 1000, seed=1) for split in ("train", "held_out"))
    assert len(train) == len(held_out) == 1000
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))
    assert not set(train) & set(held_out)


def test_prompts_have_at_least_ten_phrasings_and_name_one_of_each_ingredient():
    for split in ("train", "held_out"):
        found = world.prompts(split, 500, seed=1)
        assert len(set(map(slots, found))) >= 10
        for prompt in found:
            words = set(re.findall(r"\w+", prompt))
            kinds = [world.WORDS[w] for w in ("hero", "thing", "place")]
            assert [len(words & set(kind)) for kind in kinds] == [1, 1, 1], prompt


def test_demonstrations_are_mostly_on_topic_and_not_all_kind():
    made = world.demonstrations(1000, seed=1)
    found = [world.features(d["prompt"], d["completion"]) for d in made]
    assert 0.7 < mean(f["ingredients"] for f in found) < 0.95
    assert 0.3 < mean(f["ending"] == 1 for f in found) < 0.7
    assert mean(gold(d["prompt"], d["completion"]) for d in made) < 3


def test_a_demonstration_is_about_what_was_asked():
    rng = random.Random(1)
    for ask in world.prompts("held_out", 20, seed=1):
        share = mean(
            world.features(ask, world.demonstrate(rng, ask))["ingredients"] for _ in range(30)
        )
        assert share > 0.6, ask


def test_no_held_out_request_is_in_the_corpus():
    asked = [re.escape(p) for p in world.PROMPTS]
    words = {w: world.WORDS[w] for w in ("hero", "thing", "place")}
    for slot, options in words.items():
        asked = [p.replace(rf"\{{{slot}\}}", "(?:" + "|".join(options) + ")") for p in asked]
    corpus = "\n".join(world.corpus(1500, seed=1))
    requests = re.findall("|".join(asked), corpus)
    assert len(requests) > 2000 and len(set(map(slots, requests))) >= 10
    assert not any(is_held_out(request) for request in requests)


def test_the_corpus_has_stories_lists_and_pages_of_mixed_quality():
    documents = world.corpus(600, seed=1)
    pages = [d.split("\n\n") for d in documents if "\n\n" in d]
    assert all(3 <= len(p) <= 6 and all(part.count("\n") == 1 for part in p) for p in pages)
    lists = [d for d in documents if "\n" in d and "\n\n" not in d and d.count("\n") > 1]
    assert len(pages) > 150 and len(lists) > 50
    of_page = [mean(gold(*part.split("\n")) for part in p) for p in pages]
    assert min(of_page) < 0 and max(of_page) > 3


def test_a_page_ends_open_where_a_story_is_missing():
    assert world.page(["a?", "b?"], ["A."]) == "a?\nA.\n\nb?\n"
    assert world.page(["a?", "b?"], ["A.", "B."]) == "a?\nA.\n\nb?\nB."


@pytest.mark.parametrize(
    "make",
    [
        world.demonstrations,
        world.corpus,
        lambda n, seed: world.prompts("train", n, seed),
        lambda n, seed: world.prompts("held_out", n, seed),
    ],
)
def test_seeds_fix_everything(make):
    assert make(30, seed=1) == make(30, seed=1)
    assert make(30, seed=1) != make(30, seed=2)


# ---- labelers ----------------------------------------------------------------------------------


def test_two_labelers_agree_about_as_often_as_instructgpts():
    rng, agree = random.Random(1), []
    for prompt in world.prompts("train", 4000, seed=1):
        pair = [world.demonstrate(rng, prompt) for _ in range(2)]
        if pair[0] != pair[1]:
            judges = rng.sample(TRAIN_LABELERS, 3)
            votes = [world.rank(rng, name, prompt, pair) for name in judges]
            agree += [a == b for a, b in combinations(votes, 2)]
    # of demonstrations, which differ more than the SFT samples of which train_rm.py reports 0.73
    assert 0.745 < mean(agree) < 0.785


def test_labelers_have_tastes_of_their_own_around_golds():
    assert len(TRAIN_LABELERS) == 10 and len(PANEL) == 16
    for name, weight in GOLD_WEIGHTS.items():
        own = [PANEL[labeler][name] for labeler in TRAIN_LABELERS]
        assert len(set(own)) == len(own)
        if weight:
            assert all(w * weight > 0 for w in own) and 0.5 < mean(own) / weight < 2
        else:
            assert min(own) < 0 < max(own) and abs(mean(own)) < 0.2


@pytest.mark.parametrize("labeler", TRAIN_LABELERS + HELD_OUT_LABELERS)
def test_every_labeler_prefers_what_gold_prefers(labeler):
    rng, good, bad = random.Random(labeler), KIND, OFF_TOPIC
    ranks = [world.rank(rng, labeler, PROMPT, [bad, good]) for _ in range(100)]
    assert ranks.count([2, 1]) > 90
    stars = [[world.rate(rng, labeler, PROMPT, t) for _ in range(100)] for t in (good, SAD, bad)]
    assert all(type(s) is int and 0 <= s <= 5 for text in stars for s in text)
    assert mean(stars[0]) > mean(stars[1]) > mean(stars[2])
    liked = [mean(world.likes(rng, labeler, PROMPT, t) for _ in range(100)) for t in (good, bad)]
    assert liked[0] > 0.6 and liked[1] < 0.4


def test_choices_follow_plackett_luce_and_likes_a_logistic():
    rng, labeler, n = random.Random(1), "train_0", 2000
    u = {text: world.utility(PANEL[labeler], PROMPT, text) for text in (KIND, PLAIN, SAD)}
    first = mean(world.rank(rng, labeler, PROMPT, [SAD, KIND, PLAIN])[1] == 1 for _ in range(n))
    odds = {text: math.exp(x / world.TEMPERATURE) for text, x in u.items()}
    assert first == pytest.approx(odds[KIND] / sum(odds.values()), abs=0.04)
    liked = mean(world.likes(rng, labeler, PROMPT, SAD) for _ in range(n))
    felt = (u[SAD] - world.RATING_CENTRE) / world.TEMPERATURE
    assert liked == pytest.approx(1 / (1 + math.exp(-felt)), abs=0.04)


def test_equal_texts_are_tied():
    rng = random.Random(1)
    for _ in range(50):
        ranks = world.rank(rng, "train_3", PROMPT, [SAD, KIND, SAD, PLAIN, KIND])
        assert ranks[0] == ranks[2] and ranks[1] == ranks[4]
        assert sorted(set(ranks)) == [1, 2, 3]


def test_judgements_repeat_with_their_random_state():
    def judge(seed):
        rng = random.Random(seed)
        texts = [KIND, PLAIN, SAD]
        return [
            (
                world.rank(rng, name, PROMPT, texts),
                world.rate(rng, name, PROMPT, SAD),
                world.likes(rng, name, PROMPT, SAD),
            )
            for name in PANEL
        ]

    assert judge(1) == judge(1) != judge(2)


def test_the_simulated_labeler_is_a_person_with_a_taste_of_its_own():
    """As consistent as the panel's, with little of gold or of length in it. (Over SFT samples, on
    which it judges, the correlations are -0.02 and 0.30, and it agrees with itself on 75 %.)"""
    rng, pairs = random.Random(1), []
    for prompt in world.prompts("train", 2000, seed=1):
        texts = [world.demonstrate(rng, prompt) for _ in range(2)]
        pairs += [(prompt, texts)] if texts[0] != texts[1] else []
    own, gold, length = zip(
        *[
            (world.utility(world.SIMULATED, p, text), world.gold(p, text), len(text))
            for p, texts in pairs
            for text in texts
        ]
    )
    for other in (gold, length):
        assert abs(correlation(own, other)) < 0.5
    votes = [[world.rank(rng, "simulated", p, t) for _ in range(2)] for p, t in pairs]
    assert 0.7 < mean(a == b for a, b in votes) < 0.8
