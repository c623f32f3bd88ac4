"""Dialogues -> token ids: the chat template, and what fits into the model's context.

The template, used by every stage after pretraining and defined here only:
<|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several turns.
"""

from dataclasses import dataclass

from nanorlhf.config import die, warn
from nanorlhf.data.values import as_turns

TEMPLATE = "nanorlhf"  # its name, the `template` of a chat model's tokenizer


def encode_document(tokenizer, text):
    """Ids of plain text as a base model has learned it: behind the eos of the document before."""
    return [tokenizer.eos_id, *tokenizer.encode(text)]


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue, and the role token after which the assistant answers."""
    return encode_dialogue(tokenizer, messages)[0] + [tokenizer.assistant_id]


def encode_dialogue(tokenizer, messages):
    """(ids, is_loss) of a dialogue in the chat template. is_loss has a bool for each id: True on
    the assistant's words and their eos, but for turns that are "unlearned"."""
    ids, is_loss = [], []
    for role, content in messages:
        words = tokenizer.encode(content)
        if role == "user":
            ids += [tokenizer.user_id, *words]
            is_loss += [False] * (1 + len(words))
        else:
            ids += [tokenizer.assistant_id, *words, tokenizer.eos_id]
            is_loss += [False] + [role == "assistant"] * (len(words) + 1)
    return ids, is_loss


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source), cut as `fit` does."""
    encoded = [encode_dialogue(tokenizer, e.messages) for e in examples]
    n_response = [len(tokenizer.encode(e.messages[-1][1])) + 1 for e in examples]
    fitting, kept = fit([ids for ids, _ in encoded], n_response, block_size, "dialogues")
    return [(ids, encoded[i][1][-block_size:], examples[i].source) for ids, i in zip(fitting, kept)]


def encode_feedback(tokenizer, examples, block_size):
    """Feedback -> rows of ([ids per completion], target, source), cut as `fit` does. An example
    with a completion that does not fit is left out as a whole."""
    flat = [(i, e.messages, c) for i, e in enumerate(examples) for c in e.completions]
    encoded = [encode_pair(tokenizer, messages, c) for _, messages, c in flat]
    # without the first role token, which belongs to the prompt
    n_response = [len(encode_pair(tokenizer, [], c)) - 1 for *_, c in flat]
    completions_of = {}  # index of an example -> ids of its completions that fit
    for ids, k in zip(*fit(encoded, n_response, block_size, "completions")):
        completions_of.setdefault(flat[k][0], []).append(ids)
    rows = [
        (completions, examples[i].target, examples[i].source)
        for i, completions in completions_of.items()
        if len(completions) == len(examples[i].completions)
    ]
    if not rows:
        die(f"no prompt has all its completions within {block_size} tokens")
    return rows


@dataclass
class Prompt:
    """A prompt ready for PPO."""

    ids: list
    text: str  # all that was said, a line per turn: what a reward function sees
    source: str
    columns: dict  # of its record, by name: for reward functions that ask for them


def encode_prompts(tokenizer, examples, room):
    """PPO examples -> Prompts of at most `room` tokens, cut from the left."""
    encoded = [encode_prompt(tokenizer, e.messages) for e in examples]
    fitting, _ = fit(encoded, [0] * len(encoded), room, "prompts")
    texts = ["\n".join(content for _, content in e.messages) for e in examples]
    return [Prompt(i, text, e.source, e.columns) for i, text, e in zip(fitting, texts, examples)]


def encode_pair(tokenizer, messages, completion):
    """Ids of a prompt with one completion and its eos: what the reward model reads."""
    return encode_dialogue(tokenizer, [*messages, *as_turns(completion)])[0]


def room_for_prompts(max_new_tokens, block_size, longest=2):
    """How many tokens a response of max_new_tokens leaves for its prompt. Exits 2 where these are
    fewer than `longest`: the tokens of the longest prompt, if prompts must not be cut; by default
    those of an empty one, its two role tokens."""
    room = block_size - max_new_tokens
    if room < longest:
        die(
            f"--max_new_tokens {max_new_tokens} leaves no room for prompts of {longest} tokens "
            f"in a context of {block_size}"
        )
    return room


def fit(rows, n_response, block_size, what):
    """Cut rows of ids from the left to block_size. A response, the last n_response[i] ids of row
    i, is never cut: where it does not fit with one token of its prompt, the row is dropped.
    Returns (the other rows, their indices in `rows`). `what` names the rows in warnings."""
    kept = [i for i, n in enumerate(n_response) if n < block_size]
    cut = sum(len(rows[i]) > block_size for i in kept)
    if cut:
        warn(f"{cut} of {len(rows)} {what} exceed {block_size} tokens: prompts cut from the left")
    if dropped := len(rows) - len(kept):
        warn(f"{dropped} of {len(rows)} {what} dropped: the response alone is too long")
    if not kept:
        die(f"no {what} fits into {block_size} tokens")
    return [rows[i][-block_size:] for i in kept], kept
