"""A vocabulary from the user's own text: byte-pair encoding."""

import heapq
from collections import Counter, defaultdict

import regex

from nanorlhf.tokenizer import PATTERN, Tokenizer

LONGEST_WORD = 32  # characters; a BPE is trained on the parts of a longer one


def train_bpe(texts, vocab_size):
    """Byte-pair encoding, arXiv:1508.07909, over bytes: merge the most frequent pair, repeat.

    Works on counts of distinct words, so megabytes take seconds. Ties go to the pair with the
    smaller bytes, so the result depends on the counts alone. vocab_size counts the 256 bytes and
    the 4 special tokens; fewer merges are made where the text has no pair left.
    """
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, text))
    for word in [w for w in counts if len(w) > LONGEST_WORD]:  # merging it would take hours
        n = counts.pop(word)
        for i in range(0, len(word), LONGEST_WORD):
            counts[word[i : i + LONGEST_WORD]] += n
    words = [[bytes([b]) for b in w.encode("utf-8", errors="replace")] for w in counts]
    weights = list(counts.values())
    pairs, where = Counter(), defaultdict(set)  # pair -> count; pair -> words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weights[i]
            where[pair].add(i)
    ranks = {bytes([b]): b for b in range(256)}
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while heap and len(ranks) + 4 < vocab_size:
        count, best = heapq.heappop(heap)
        if -count != pairs[best]:
            continue  # its count has changed since: a newer entry has the true one
        if count > -2:
            break
        ranks.setdefault(best[0] + best[1], len(ranks))
        changed = set()
        for i in where.pop(best):
            old, words[i] = words[i], merge(words[i], best)
            for pair in zip(old, old[1:]):
                pairs[pair] -= weights[i]
                changed.add(pair)
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += weights[i]
                where[pair].add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(heap, (-pairs[pair], pair))
    return Tokenizer(PATTERN, ranks)


def merge(word, pair):
    """[a, b, c] with pair (a, b) -> [ab, c], from the left."""
    merged, i = [], 0
    while i < len(word):
        n = 2 if tuple(word[i : i + 2]) == pair else 1
        merged.append(b"".join(word[i : i + n]))
        i += n
    return merged
