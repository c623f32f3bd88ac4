"""Text and dialogues -> token ids: a BPE (bpe.py trains one), GPT-2's, or plain bytes.

All are a `tiktoken.Encoding` with four special tokens, and are saved whole with every checkpoint,
so no later stage can be run with another vocabulary by mistake. Another project's tokenizer,
hf/tokenizer.py, has the same methods.
"""

import base64
import json
from pathlib import Path

import numpy as np
import regex
import tiktoken

from nanorlhf.config import die
from nanorlhf.data.values import system_as

# GPT-2's split into words, without its contractions: each piece is merged on its own
PATTERN = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOS, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL = (EOS, PAD, USER, ASSISTANT)  # in the order of their ids, behind all others
PROBE = "It's 1234 é🦊,\n\n  <|x|>\t\x00 "  # a pattern that leaves any of it out would lose text
SPACES = regex.compile(r"(\s{100000})")  # of four times as many tiktoken runs out of stack


class Tokenizer:
    """A tiktoken.Encoding plus four special tokens. Only code can produce these: text that spells
    one is encoded as plain text. `chat`: whether the model of the tokenizer's checkpoint has
    learned the chat template; a base model has not, and goes on with text.
    """

    chat = False

    def __init__(self, pattern, ranks):
        """pattern: the regex that splits text; ranks: {bytes: id}, the lower the id, the earlier
        two parts are merged into these bytes. The special tokens stand behind them."""
        has_bytes = {bytes([b]) for b in range(256)} <= ranks.keys()
        if not has_bytes or sorted(ranks.values()) != [*range(len(ranks))]:
            raise ValueError("a byte is missing from the vocabulary, or its ids have gaps")
        pieces = [match.group() for match in regex.finditer(pattern, PROBE)]
        if "".join(pieces) != PROBE or "" in pieces:
            raise ValueError(f"the pattern {pattern!r} does not cut text into words")
        self.pattern, self.ranks, self.vocab_size = pattern, ranks, len(ranks) + len(SPECIAL)
        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
        self.eos_id, self.pad_id, self.user_id, self.assistant_id = self.special.values()
        self.ends = (self.eos_id,)  # the ids that end a response
        self.bos_id = self.eos_id  # a text stands behind the end of the one before
        self.start_ids = [self.bos_id]
        vocabulary = {"mergeable_ranks": ranks, "special_tokens": self.special}
        self.encoding = tiktoken.Encoding("nanorlhf", pat_str=pattern, **vocabulary)
        self.text_of = {i: token for token, i in ranks.items()}

    def has_template(self, template):
        """Whether the chat template is the one for which --template stands."""
        return template in ("", "nanorlhf")

    def encode(self, text):
        """Any text -> list of ids, none of them special. Lone surrogates become U+FFFD."""
        if len(text) < 100_000:
            return self.encoding.encode_ordinary(text)
        return [i for part in SPACES.split(text) for i in self.encoding.encode_ordinary(part)]

    def dialogue(self, messages, answer=False):
        """Turns -> (ids, is_loss), the chat template: <|user|>prompt<|assistant|>completion
        <|endoftext|>, repeated. What the system says stands in front of the user's words. is_loss
        has a bool for each id: True on the assistant's words and their eos, but for turns that are
        "unlearned". With `answer` it ends where the assistant answers."""
        ids, is_loss = [], []
        for role, content in system_as("user", messages):
            words = self.encode(content)
            if role == "user":
                ids += [self.user_id, *words]
                is_loss += [False] * (1 + len(words))
            else:
                ids += [self.assistant_id, *words, self.eos_id]
                is_loss += [False] + [role == "assistant"] * (len(words) + 1)
        if answer:
            ids, is_loss = [*ids, self.assistant_id], [*is_loss, False]
        return ids, is_loss

    def tokens_per_byte(self, ids):
        """Tokens for each byte of the text that an array of ids spells; special ones spell none."""
        n_bytes = np.zeros(self.vocab_size)
        n_bytes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return len(ids) / max(n_bytes[ids].sum(), 1)

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

    def save(self, folder):
        tokens = sorted(self.ranks, key=self.ranks.get)
        saved = {"pattern": self.pattern, "ranks": [base64.b64encode(t).decode() for t in tokens]}
        Path(folder, "tokenizer.json").write_text(json.dumps(saved))

    @classmethod
    def load(cls, folder):
        saved = json.loads(Path(folder, "tokenizer.json").read_text())
        if saved.keys() != {"pattern", "ranks"}:
            raise ValueError("of an early format, which is no longer read; make it again")
        tokens = [base64.b64decode(t) for t in saved["ranks"]]
        return cls(saved["pattern"], {token: i for i, token in enumerate(tokens)})

    def __eq__(self, other):
        same = type(other) is Tokenizer and self.pattern == other.pattern
        return same and self.ranks == other.ranks


def byte_tokenizer():
    """256 bytes and the special tokens: for tests, and for text with no regularity."""
    return Tokenizer(PATTERN, {bytes([b]): b for b in range(256)})


def gpt2_tokenizer():
    """GPT-2's vocabulary; its <|endoftext|> keeps id 50256, ours for chat come behind it."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the download raises: there is one thing to say
        why = f"could not get GPT-2's vocabulary ({type(error).__name__})"
        die(f"{why}; connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it")
    return Tokenizer(GPT2_PATTERN, gpt2._mergeable_ranks)
