"""Talk to a checkpoint in the terminal."""

import signal
from dataclasses import dataclass

from nanorlhf.config import arg, die, template_flag
from nanorlhf.data import dialogue
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses


@dataclass
class Talk:
    """The flags of whatever talks with a person."""

    template: str = template_flag()
    seed: int = arg(1, "fixes sampling", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))
    temperature: float = arg(0.7, "0 is greedy")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0: from all")
    top_p: float = arg(
        0.95, "sample from the fewest tokens that hold this probability", low=1e-6, high=1
    )
    max_new_tokens: int = arg(128, "length limit of an answer")
    system: str = arg("", "said before your first words, as in the data's system turns")
    keep_turns: str = arg(
        "auto",
        "whether a model reads the conversation so far; auto: where its training data did",
        choices=("auto", "yes", "no"),
    )


@dataclass
class Config(Talk):
    """Chat with any language model; one that is no chat model goes on with what you type."""

    model: str = arg(
        "out/ppo", "checkpoint, GPT-2 or a Llama (gpt2, hf:owner/name, a folder)", positional=True
    )


def main(cfg):
    gpt, found = load_gpt(cfg.model, template=cfg.template)
    device = pick_device(cfg)
    cast(gpt, pick_dtype(cfg, device), device).eval()
    tokenizer = found.tokenizer
    keeps, n_answers, messages = keeps_turns(cfg, found), 0, []
    room = dialogue.room_for_prompts(cfg.max_new_tokens, gpt.config.block_size)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which raises KeyboardInterrupt
    print(f"{found.path} ({found.stage}); empty line: start over, Ctrl-C: stop it, Ctrl-D: leave")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            die("what was typed is not UTF-8 text")
        if not text.strip():
            messages = []
            continue
        messages = (messages if keeps else []) + [("user", text)]
        if not found.chat:
            ids = dialogue.encode_document(tokenizer, text)[-room:]
        else:
            messages, ids = what_fits(tokenizer, cfg.system, messages, room)
        try:
            response = sample_responses(
                gpt,
                tokenizer,
                [ids],
                cfg.max_new_tokens,
                cfg.seed,
                n_answers,  # so that every answer has other noise
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
            )[0]
        except KeyboardInterrupt:
            print("(stopped; Ctrl-C once more leaves)")
            messages.pop()
            continue
        n_answers += 1
        reply = tokenizer.decode(response)
        messages.append(("assistant", reply))
        print(reply if found.chat else text + reply)


def keeps_turns(cfg, found):
    """Whether the model reads the conversation so far; says so, and why."""
    most = next((c["user_turns"] for c in checkpoint.ancestors(found) if "user_turns" in c), None)
    keeps = found.chat and (cfg.keep_turns == "yes" or cfg.keep_turns == "auto" and most != 1)
    learned = {None: "", 1: ", trained on single questions"}
    why = learned.get(most, f", trained on dialogues of up to {most} questions")
    reads = "the conversation so far" if keeps else "each text by itself"
    print(f"reads {reads} (--keep_turns {cfg.keep_turns}{why})")
    return keeps


def what_fits(tokenizer, system, messages, room):
    """(messages, ids): the end of the conversation that fits into `room` tokens. It is cut in pairs
    of a question and its answer; a last question that is too long by itself loses its left."""
    while True:
        ids = dialogue.encode_prompt(tokenizer, told(system, messages))
        if len(ids) <= room or len(messages) <= 2:
            return messages, ids[-room:]
        messages = messages[2:]


def told(system, messages):
    """The messages with what the system says, if anything, in front of the first."""
    return [("system", system), *messages] if system else messages
