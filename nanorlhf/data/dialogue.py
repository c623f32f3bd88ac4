"""Dialogues -> token ids: the chat template, and what fits into the model's context.

The template, used by every stage after pretraining and defined here only:
<|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several turns.
"""

from dataclasses import dataclass

from nanorlhf.config import die, warn

TEMPLATE = "nanorlhf"  # its name, the `template` of a chat model's tokenizer


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue up to where the assistant speaks next."""
    return encode_dialogue(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_dialogue(tokenizer, messages):
    """(ids, is_loss): the template, and True on the assistant's words and their eos."""
    ids, is_loss = [], []
    for role, content in messages:
        words = tokenizer.encode(content)
        if role == "user":
            ids += [tokenizer.user_id, *words]
            is_loss += [False] * (1 + len(words))
        else:
            ids += [tokenizer.assistant_id, *words, tokenizer.eos_id]
            is_loss += [False] + [True] * (len(words) + 1)
    return ids, is_loss


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source) that fit block_size."""
    encoded = [encode_dialogue(tokenizer, e.messages) for e in examples]
    last = [len(tokenizer.encode(e.messages[-1][1])) + 1 for e in examples]
    ids, kept = fit([ids for ids, _ in encoded], last, block_size, "dialogues")
    return [(r, encoded[i][1][-block_size:], examples[i].source) for r, i in zip(ids, kept)]


def encode_feedback(tokenizer, examples, block_size):
    """Feedback -> rows of ([ids per completion], target, source); all of one fit, or none."""
    flat = [(i, e.messages, c) for i, e in enumerate(examples) for c in e.completions]
    rows = [encode_pair(tokenizer, messages, c) for _, messages, c in flat]
    n_response = [len(tokenizer.encode(c)) + 1 for *_, c in flat]
    found = {}  # index of an example -> its completions that fit
    for row, k in zip(*fit(rows, n_response, block_size, "completions")):
        found.setdefault(flat[k][0], []).append(row)
    whole = [(rows, examples[i]) for i, rows in found.items()]
    kept = [(rows, e.target, e.source) for rows, e in whole if len(rows) == len(e.completions)]
    return kept or die(f"no prompt has all its completions within {block_size} tokens")


@dataclass
class Prompt:
    """A prompt ready for PPO."""

    ids: list
    text: str  # what a reward function sees
    source: str


def encode_prompts(tokenizer, examples, room):
    """PPO examples -> Prompts of at most `room` tokens, cut from the left."""
    ids = [encode_prompt(tokenizer, e.messages) for e in examples]
    ids, _ = fit(ids, [0] * len(ids), room, "prompts")
    texts = ["\n".join(content for _, content in e.messages) for e in examples]
    return [Prompt(row, text, e.source) for row, text, e in zip(ids, texts, examples)]


def encode_pair(tokenizer, messages, completion):
    """Ids of a prompt with one completion and its eos, what the reward model reads."""
    return encode_dialogue(tokenizer, messages + [("assistant", completion)])[0]


def room_for_prompts(max_new_tokens, block_size, longest=2):
    """How many tokens a prompt may have, so that its response fits behind it. `longest` is how
    many the longest one has, where none may be cut; a cut one keeps two at least: the template's
    own."""
    room = block_size - max_new_tokens
    if room < longest:
        die(
            f"--max_new_tokens {max_new_tokens} leaves no room for prompts of {longest} tokens "
            f"in a context of {block_size}"
        )
    return room


def fit(rows, n_response, block_size, what):
    """Cut rows of ids from the left to block_size; the last n_response[i] ids are sacred. Returns
    (rows, kept): kept are the indices of rows whose response fits with one prompt token."""
    kept = [i for i, n in enumerate(n_response) if n < block_size]
    cut = sum(len(rows[i]) > block_size for i in kept)
    if cut:
        warn(f"{cut} of {len(rows)} {what} exceed {block_size} tokens: prompts cut from the left")
    if dropped := len(rows) - len(kept):
        warn(f"{dropped} of {len(rows)} {what} dropped: the response alone is too long")
    if not kept:
        die(f"no {what} fits into {block_size} tokens")
    return [rows[i][-block_size:] for i in kept], kept
