"""Text <-> token ids: a BPE trained on the user's text, GPT-2's, another model's, or plain bytes.

All are a `tiktoken.Encoding` with four special tokens of the same use, and are saved whole with
every checkpoint, so no later stage can be run with another vocabulary by mistake.
"""

import base64
import heapq
import json
import unicodedata
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken

from nanorlhf.config import die

# GPT-2's split into words, without its contractions: each piece is merged on its own
PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOS, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL = (EOS, PAD, USER, ASSISTANT)  # in the order of their ids, behind all others
PROBE = "It's 1234 é🦊,\n\n  <|x|>\t\x00 "  # a pattern that leaves any of it out would lose text
LONGEST_WORD = 32  # characters; a BPE is trained on the parts of a longer one
SPACES = regex.compile(r"(\s{100000})")  # of four times as many tiktoken runs out of stack


class Tokenizer:
    """A tiktoken.Encoding plus the ids of the special tokens. Only code can produce those:
    text that spells one is encoded as plain text. `template` names the chat template on which the
    model of the tokenizer's checkpoint was trained; None is a base model, which goes on with text.
    """

    template = None

    def __init__(
        self, pattern, ranks, special=None, eos=EOS, pad=PAD, nfc=False, style="nanorlhf", system=""
    ):
        """pattern: the regex that splits text; ranks: {bytes: id}, the lower the id, the earlier
        two parts are merged into these bytes. special: {name: id}, where that is another model's;
        else the four of SPECIAL stand behind all others. eos, pad: their names. nfc: text is
        normalised to NFC first. style: the chat template of dialogue.py in which dialogues are
        written; system: what its system says where nobody else does."""
        if special is None:
            has_bytes = {bytes([b]) for b in range(256)} <= ranks.keys()
            if not has_bytes or sorted(ranks.values()) != [*range(len(ranks))]:
                raise ValueError("a byte is missing from the vocabulary, or its ids have gaps")
            special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2**24 for i in ids):
            raise ValueError("an id is given twice, or is none")
        roles = (USER, ASSISTANT) if style == "nanorlhf" else ()
        if eos == pad or not {eos, pad, *roles} <= special.keys():
            raise ValueError("eos, pad or a role has no special token of its own")
        pieces = [match.group() for match in regex.finditer(pattern, PROBE)]
        if "".join(pieces) != PROBE or "" in pieces:
            raise ValueError(f"the pattern {pattern!r} does not cut text into words")
        self.pattern, self.ranks, self.special, self.nfc = pattern, ranks, special, nfc
        self.style, self.system = style, system
        self.eos, self.pad, self.vocab_size = eos, pad, max(ids) + 1
        # bytes that the vocabulary lacks get ids that no text is given
        self.lost = bytes(b for b in range(256) if bytes([b]) not in ranks)
        every = ranks | {bytes([b]): self.vocab_size + i for i, b in enumerate(self.lost)}
        self.encoding = tiktoken.Encoding(
            "nanorlhf", pat_str=pattern, mergeable_ranks=every, special_tokens=special
        )
        self.text_of = {i: token for token, i in ranks.items()}
        self.eos_id, self.pad_id = special[eos], special[pad]
        self.user_id, self.assistant_id = special.get(USER), special.get(ASSISTANT)

    def encode(self, text):
        """Any text -> list of ids, none of them special. Lone surrogates become U+FFFD."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        if self.lost and set(self.lost) & set(text.encode("utf-8", "replace")):
            return self._encode_without_lost(text)
        if len(text) < 100_000:
            return self.encoding.encode_ordinary(text)
        return [i for part in SPACES.split(text) for i in self.encoding.encode_ordinary(part)]

    def _encode_without_lost(self, text):
        """As tokenizers does it: what the vocabulary has no byte for is left out of a word, and
        what stands around it may be merged."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        words = (m.group().encode() for m in regex.finditer(self.pattern, text))
        kept = (word.translate(None, self.lost) for word in words)
        return [i for word in kept if word for i in self.encoding._encode_single_piece(word)]

    def tokens_per_byte(self, ids):
        """Tokens for each byte of the text that an array of ids spells; special ones spell none."""
        n_bytes = np.zeros(self.vocab_size)
        n_bytes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return len(ids) / max(n_bytes[ids].sum(), 1)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """Ids -> text; special tokens are dropped, broken UTF-8 is replaced."""
        plain = b"".join(self.text_of.get(i, b"") for i in ids)
        return plain.decode("utf-8", errors="replace")

    def token_text(self, id):
        """A token by itself: a special one's name; where it is a part of a character, its bytes."""
        for name, special_id in self.special.items():
            if special_id == id:
                return name
        return self.encoding.decode_single_token_bytes(id).decode(errors="backslashreplace")

    def save(self, path):
        tokens = sorted(self.ranks, key=self.ranks.get)
        saved = {"pattern": self.pattern, "ranks": [base64.b64encode(t).decode() for t in tokens]}
        saved["ids"] = [self.ranks[t] for t in tokens]
        saved |= {"special": self.special, "eos": self.eos, "pad": self.pad, "nfc": self.nfc}
        saved |= {"style": self.style, "system": self.system}
        with open(path, "w") as file:
            json.dump(saved, file)

    @classmethod
    def load(cls, path):
        """One that was saved before there were other models' has only `pattern` and `ranks`."""
        with open(path) as file:
            saved = json.load(file)
        tokens = [base64.b64decode(t) for t in saved.pop("ranks")]
        ids = saved.pop("ids", range(len(tokens)))
        return cls(ranks=dict(zip(tokens, ids, strict=True)), **saved)

    def __eq__(self, other):
        names = ("pattern", "ranks", "special", "eos", "pad", "nfc", "style", "system")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def byte_tokenizer():
    """256 bytes and the special tokens: for tests, and for text with no regularity."""
    return Tokenizer(PATTERN, {bytes([b]): b for b in range(256)})


def gpt2_tokenizer():
    """GPT-2's vocabulary; its <|endoftext|> keeps id 50256, ours for chat come behind it."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises: there is one thing to say
        die(
            f"could not get GPT-2's vocabulary ({type(error).__name__}); connect once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that has it"
        )
    return Tokenizer(GPT2_PATTERN, gpt2._mergeable_ranks)


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
