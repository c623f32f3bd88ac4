"""Talk to a language model in the terminal."""

import signal
import sys
from dataclasses import dataclass

from nanorlhf.config import arg, die, visible
from nanorlhf.speaker import ChatConfig, Speaker


@dataclass
class Config(ChatConfig):
    """Chat with any language model; one that is no chat model goes on with what you type."""

    IDLE = "seed top_k top_p: temperature=0"
    model: str = arg("out/ppo", "a checkpoint, or another model as --init takes", positional=True)


def main(cfg):
    speaker = Speaker(cfg, cfg.model)
    checkpoint, messages, n_answers = speaker.checkpoint, [], 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which raises KeyboardInterrupt
    # a model that somebody else trained went through no stage of ours
    what = type(speaker.gpt).__name__ if checkpoint.stage == "gpt" else checkpoint.stage
    print(f"{checkpoint.path} ({what})")
    print("an empty line starts over, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")  # piped words are not on the screen
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            die("what was typed is not UTF-8 text")
        if not text.strip():
            messages = []
            continue
        messages.append(("user", text))
        reply = ""
        print("" if checkpoint.tokenizer.chat else text, end="")
        try:
            for piece in speaker.answer(messages, cfg.temperature, n_answers):
                print(visible(piece), end="", flush=True)
                reply += piece
        except KeyboardInterrupt:
            print("\n(stopped; Ctrl-C once more leaves)")
            messages.pop()
            continue
        print()
        n_answers += 1
        messages.append(("assistant", reply))
