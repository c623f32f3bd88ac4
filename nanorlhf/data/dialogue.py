"""Dialogues -> token ids: the chat templates, and what fits into the model's context.

A dialogue is written as <|user|>prompt<|assistant|>completion<|endoftext|>, repeated for several
turns, unless the model came with another template. Every stage after pretraining goes by it.
"""

import re
from dataclasses import dataclass
from os.path import commonprefix

from nanorlhf.config import die, warn
from nanorlhf.data.values import all_said, as_turns, system_as

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Template:
    """What stands around the words of each role, special tokens by their names; {eos} is the
    tokenizer's end of a text. Behind an assistant's words that comes first, and carries loss."""

    before: dict  # role -> text; a role that is not there has no turn of its own
    after: dict
    start: str = ""  # of a dialogue
    strips: bool = False  # words lose the white space around them


TEMPLATES = {
    "nanorlhf": Template(
        {"user": "<|user|>", "assistant": "<|assistant|>"}, {"user": "", "assistant": "{eos}"}
    ),
    "chatml": Template(  # SmolLM2, Qwen
        {role: f"<|im_start|>{role}\n" for role in ROLES}, dict.fromkeys(ROLES, "<|im_end|>\n")
    ),
    "llama3": Template(
        {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ROLES},
        dict.fromkeys(ROLES, "<|eot_id|>"),
        start="<|begin_of_text|>",
        strips=True,
    ),
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}  # what {eos} must be there


def encode_document(tokenizer, text):
    """Ids of plain text as a base model has learned it: behind the eos of the document before."""
    return [tokenizer.eos_id, *tokenizer.encode(text)]


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue, and of what stands before the assistant's answer."""
    ids, tail = marks(tokenizer, TEMPLATES[tokenizer.style].before["assistant"])
    return encode_dialogue(tokenizer, messages)[0] + ids + tokenizer.encode(tail)


def encode_dialogue(tokenizer, messages):
    """(ids, is_loss) of a dialogue in the chat template. is_loss has a bool for each id: True on
    the assistant's words and their eos, but for turns that are "unlearned"."""
    template = TEMPLATES[tokenizer.style]
    ids, _ = marks(tokenizer, template.start)
    is_loss = [False] * len(ids)
    for role, content in written(tokenizer, messages):
        speaker = "assistant" if role == "unlearned" else role
        before, tail = marks(tokenizer, template.before[speaker])
        after, rest = marks(tokenizer, template.after[speaker])
        words, n_tail = tokenizer.encode(tail + content), 0
        if tail:  # a word that begins in it and ends in what is said is not learned
            alone = tokenizer.encode(tail)
            n_tail = len(commonprefix([alone, words]))
            n_tail = min(n_tail + (n_tail < len(alone)), len(words))
        learned = role == "assistant"
        rest = tokenizer.encode(rest)
        ids += before + words + after + rest
        is_loss += [False] * (len(before) + n_tail) + [learned] * (len(words) - n_tail)
        is_loss += [learned and i == 0 for i in range(len(after))] + [False] * len(rest)
    return ids, is_loss


def written(tokenizer, messages):
    """The turns that a template writes: what the system says is the user's, where the template has
    no role for it."""
    template = TEMPLATES[tokenizer.style]
    if "system" not in template.before:
        return system_as("user", messages)
    turns = system_as("system", messages)
    if tokenizer.system and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", tokenizer.system))
    return [(role, text.strip() if template.strips else text) for role, text in turns]


def as_text(tokenizer, messages):
    """A dialogue as its template writes it, with the names of special tokens, up to where the
    assistant answers."""
    template = TEMPLATES[tokenizer.style]
    before, after = template.before, template.after
    turns = [before[r] + words + after[r] for r, words in written(tokenizer, messages)]
    text = template.start + "".join(turns) + before["assistant"]
    return text.replace("{eos}", tokenizer.eos)


def assistant_mark(tokenizer):
    """The last special token before the assistant's words."""
    return marks(tokenizer, TEMPLATES[tokenizer.style].before["assistant"])[0][-1]


def marks(tokenizer, text):
    """(ids, the rest) of a part of a template up to its last special token, and the plain text
    behind that, which is encoded together with what is said."""
    names = "|".join(map(re.escape, tokenizer.special))
    *pieces, rest = re.split(f"({names})", text.replace("{eos}", tokenizer.eos))
    ids = []
    for piece in pieces:
        ids += [tokenizer.special[piece]] if piece in tokenizer.special else tokenizer.encode(piece)
    return ids, rest


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source), cut as `fit` does."""
    encoded = [encode_dialogue(tokenizer, e.messages) for e in examples]
    n_response = [last_answer(is_loss) for _, is_loss in encoded]
    fitting, kept = fit([ids for ids, _ in encoded], n_response, block_size, "dialogues")
    return [(ids, encoded[i][1][-block_size:], examples[i].source) for ids, i in zip(fitting, kept)]


def last_answer(is_loss):
    """How many ids the assistant's last turn has, from the first that carries loss."""
    end = len(is_loss) - is_loss[::-1].index(True)
    return len(is_loss) - end + is_loss[:end][::-1].index(False)


def encode_feedback(tokenizer, examples, block_size):
    """RM examples -> rows of ([ids per completion], target, source), cut as `fit` does. An example
    with a completion that does not fit is left out as a whole."""
    encoded, n_response = [], []
    for e in examples:
        n_prompt = len(encode_prompt(tokenizer, e.messages))
        encoded += [encode_pair(tokenizer, e.messages, reply) for reply in e.completions]
        n_response += [len(ids) - n_prompt for ids in encoded[len(n_response) :]]
    fitting = dict(zip(*reversed(fit(encoded, n_response, block_size, "completions"))))
    rows, end = [], 0
    for e in examples:
        start, end = end, end + len(e.completions)
        if all(k in fitting for k in range(start, end)):
            rows.append(([fitting[k] for k in range(start, end)], e.target, e.source))
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
    return [
        Prompt(ids, all_said(e.messages), e.source, e.columns) for ids, e in zip(fitting, examples)
    ]


def encode_pair(tokenizer, messages, completion):
    """Ids of a prompt with one completion, up to its eos: what the reward model reads."""
    ids, _ = encode_dialogue(tokenizer, [*messages, *as_turns(completion)])
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_id)]


def context(cfg, model_config):
    """How many tokens a dialogue may have: --max_seq_len, or all that the model can read."""
    return min(cfg.max_seq_len or model_config.block_size, model_config.block_size)


def room_for_prompts(max_new_tokens, block_size, longest=2):
    """How many tokens a response of max_new_tokens leaves for its prompt. Exits 2 where these are
    fewer than `longest`: the tokens of the longest prompt, if prompts must not be cut; by default
    those of an empty one, its two role tokens."""
    room = block_size - max_new_tokens
    if room < longest:
        what = f"prompts of {longest} tokens in a context of {block_size}"
        die(f"--max_new_tokens {max_new_tokens} leaves no room for {what}")
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
