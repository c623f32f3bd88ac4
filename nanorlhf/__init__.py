"""nanorlhf: pretrain, fine-tune, learn a reward from human feedback, and optimise it with PPO.

What the stages have made, from a notebook or a fork:

    import nanorlhf

    prompts = ["Tell me a story about a fox."]
    model, tokenizer = nanorlhf.load("out/ppo")
    texts = nanorlhf.generate(model, tokenizer, prompts)
    judge, tokenizer = nanorlhf.load("out/rm")
    scores = nanorlhf.score(judge, tokenizer, prompts, texts)

A mistake raises ValueError with the line that the commands print. PyTorch is imported by the first
call and not before: this file is read at the start of every command.
"""

import os
from contextlib import contextmanager
from numbers import Integral, Real
from types import SimpleNamespace

from nanorlhf.config import Mistake, die, silent


@contextmanager
def mistakes_as_value_errors():
    """A mistake inside ends no program and prints nothing, but raises ValueError with its line."""
    before = silent.set(True)
    try:
        yield
    except Mistake as mistake:
        raise ValueError(str(mistake)) from None
    finally:
        silent.reset(before)


def load(path_or_name, device="auto", dtype="auto", template=""):
    """(model, tokenizer), the model in eval mode: the GPT or the RewardModel of a checkpoint of any
    stage, or what --init takes besides: a folder in Hugging Face layout, gpt2, hf:owner/name.

    `device`, `dtype` and `template` are what --device, --dtype and --template are. `tokenizer.chat`
    is False for a base model, which `generate` lets go on with plain text.
    """
    from nanorlhf.loading import load_model
    from nanorlhf.machine.device import cast, pick_device, pick_dtype

    with mistakes_as_value_errors():
        if not isinstance(path_or_name, (str, os.PathLike)):
            die(f"load needs a folder or a name, not {path_or_name!r}")
        cfg = SimpleNamespace(device=str(device), dtype=str(dtype).removeprefix("torch."))
        if cfg.dtype not in ("auto", "float32", "bfloat16"):
            die(f"--dtype {dtype}: choose from auto, float32, bfloat16")
        device = pick_device(cfg)
        model, checkpoint = load_model(path_or_name, template)
        return cast(model, pick_dtype(cfg, device), device).eval(), checkpoint.tokenizer


def generate(
    model, tokenizer, prompts, max_new_tokens=128, temperature=1.0, top_k=0, top_p=1.0, seed=1
):
    """A text for each prompt, without the prompt; temperature 0 takes the likeliest tokens.

    A prompt is a string, or a list of messages {"role": ..., "content": ...} that ends with the
    user. What a system message says goes in front of the user's next words. A base model reads the
    plain text of a prompt after an eos. A prompt that does not fit into the context loses its left.
    The noise of prompt i is that of (seed, 0, i): its text does not depend on the other prompts.
    """
    from nanorlhf.data.dialogue import encode_document, encode_prompt, room_for_prompts
    from nanorlhf.data.values import all_said
    from nanorlhf.model import GPT
    from nanorlhf.sampling import sample_responses

    with mistakes_as_value_errors():
        if not isinstance(model, GPT):
            die(f"generate needs a language model, not a {type(model).__name__}")
        _check_tokenizer(tokenizer, model)
        numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        numbers |= {"top_k": top_k, "top_p": top_p, "seed": seed}
        numbers = {name: _number(name, value) for name, value in numbers.items()}
        dialogues = _dialogues(prompts)
        if tokenizer.chat:
            ids = [encode_prompt(tokenizer, messages) for messages in dialogues]
        else:
            ids = [encode_document(tokenizer, all_said(messages)) for messages in dialogues]
        room = room_for_prompts(numbers["max_new_tokens"], model.config.block_size)
        responses = sample_responses(model, tokenizer, [r[-room:] for r in ids], **numbers)
        return [tokenizer.decode(row) for row in responses]


def score(model, tokenizer, prompts, responses):
    """The reward model's score of each response to its prompt, in standard deviations of responses
    of the model that PPO starts from. Prompts are as in `generate`."""
    from nanorlhf.data.dialogue import encode_pair, encode_prompt
    from nanorlhf.model import RewardModel
    from nanorlhf.scoring import must_be_standardised, score_responses

    with mistakes_as_value_errors():
        if not isinstance(model, RewardModel):
            die(f"score needs a reward model, not a {type(model).__name__}")
        _check_tokenizer(tokenizer, model.gpt)
        must_be_standardised(model)
        dialogues = _dialogues(prompts)
        prompt_ids = [encode_prompt(tokenizer, messages) for messages in dialogues]
        _check_list("responses", responses, str)
        if len(prompt_ids) != len(responses):
            die(f"{len(prompt_ids)} prompts, but {len(responses)} responses")
        pairs = [encode_pair(tokenizer, *pair)[0] for pair in zip(dialogues, responses)]
        for i, (ids, pair) in enumerate(zip(prompt_ids, pairs)):
            n = len(pair) - len(ids)
            if n >= model.gpt.config.block_size:
                die(f"responses[{i}]: its {n - 1} tokens leave no room for a prompt")
        if not prompt_ids:
            return []
        return score_responses(model, tokenizer, [[]] * len(pairs), pairs).tolist()


def _dialogues(prompts):
    """[(role, content)] of each prompt."""
    from nanorlhf.data.values import Misfit, prompt

    _check_list("prompts", prompts, (str, list))
    dialogues = []
    for i, words in enumerate(prompts):
        try:
            dialogues.append(prompt({"prompt": words}))
        except Misfit as misfit:
            die(f"prompts[{i}]: {misfit}")
    return dialogues


def _check_list(name, values, kinds):
    if not isinstance(values, (list, tuple)):
        die(f"{name} must be a list, not a {type(values).__name__}")
    for i, value in enumerate(values):
        if not isinstance(value, kinds):
            wanted = "a string" if kinds is str else "a string or a list of messages"
            die(f"{name}[{i}] must be {wanted}, not a {type(value).__name__}")


def _check_tokenizer(tokenizer, gpt):
    from nanorlhf.hf.tokenizer import ForeignTokenizer
    from nanorlhf.tokenizer import Tokenizer

    if not isinstance(tokenizer, (Tokenizer, ForeignTokenizer)):
        die(f"the tokenizer must be the one that load returns, not a {type(tokenizer).__name__}")
    if tokenizer.vocab_size != gpt.config.vocab_size:
        die(f"tokenizer of {tokenizer.vocab_size}, model of {gpt.config.vocab_size} ids")


def _number(name, value):
    """The value as `chat` takes its flag of this name: an int or a float, NumPy's too, and nothing
    but a number in the flag's range."""
    from nanorlhf.speaker import ChatConfig

    field = ChatConfig.__dataclass_fields__[name]
    kind, (low, high) = field.type, field.metadata["range"]
    is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        wanted = "a whole number" if kind is int else "a number"
        die(f"--{name}: {value!r} is not {wanted} from {low} to {high}")
    return kind(value)
