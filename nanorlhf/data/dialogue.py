"""Records -> token ids, in the tokenizer's chat template, as far as the model's context reaches."""

from dataclasses import dataclass

from nanorlhf.config import die, warn
from nanorlhf.data.values import all_said, as_turns


def encode_document(tokenizer, text):
    """Ids of plain text as a base model has learned it, with what stands before every text."""
    return [*tokenizer.start_ids, *tokenizer.encode(text)]


def encode_prompt(tokenizer, messages):
    """Ids of a dialogue, and of what stands before the assistant's answer."""
    return tokenizer.dialogue(messages, answer=True)[0]


def encode_demonstrations(tokenizer, examples, block_size):
    """SFT examples -> rows of (ids, is_loss, source), cut as `fit` does."""
    encoded = [tokenizer.dialogue(e.messages) for e in examples]
    n_response = [last_answer(is_loss) for _, is_loss in encoded]
    fitting, kept = fit([ids for ids, _ in encoded], n_response, block_size, "dialogues")
    return [(ids, encoded[i][1][-block_size:], examples[i].source) for ids, i in zip(fitting, kept)]


def last_answer(is_loss):
    """How many ids the assistant's last turn has, from the first that carries loss."""
    end = len(is_loss) - is_loss[::-1].index(True)
    return len(is_loss) - end + is_loss[:end][::-1].index(False)


def encode_feedback(tokenizer, examples, block_size):
    """RM examples -> rows of ([ids per completion], [tokens of its last turn], target, source), cut
    as `fit` does. An example with a completion that does not fit is left out as a whole."""
    encoded, n_response, n_answer = [], [], []
    for e in examples:
        n_prompt = len(encode_prompt(tokenizer, e.messages))
        for reply in e.completions:
            ids, is_loss = encode_pair(tokenizer, e.messages, reply)
            encoded.append(ids)
            n_response.append(len(ids) - n_prompt)
            n_answer.append(last_answer(is_loss) if any(is_loss[n_prompt:]) else n_response[-1])
    fitting = dict(zip(*reversed(fit(encoded, n_response, block_size, "completions"))))
    rows, end = [], 0
    for e in examples:
        start, end = end, end + len(e.completions)
        if all(k in fitting for k in range(start, end)):
            completions = [fitting[k] for k in range(start, end)]
            rows.append((completions, n_answer[start:end], e.target, e.source))
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
    cut, _ = fit(encoded, [0] * len(encoded), room, "prompts")
    return [Prompt(ids, all_said(e.messages), e.source, e.columns) for ids, e in zip(cut, examples)]


def encode_pair(tokenizer, messages, completion):
    """(ids, is_loss) of a prompt with one completion, up to its eos: what the reward model reads,
    whatever the template writes behind that."""
    ids, is_loss = tokenizer.dialogue([*messages, *as_turns(completion)])
    end = len(ids) - ids[::-1].index(tokenizer.eos_id)
    return ids[:end], is_loss[:end]


def closed(tokenizer, response):
    """The ids of a response as the reward model reads it: with the template's end of a turn,
    whichever end it has, or none."""
    words = response[:-1] if response and response[-1] in tokenizer.ends else response
    return [*words, tokenizer.eos_id]


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
