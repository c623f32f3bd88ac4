"""A language model that answers people: how it is loaded, and what it reads of a conversation.

The commands chat, serve, sample, label and evaluate share it, and stage 3, which samples answers.
"""

from dataclasses import dataclass

import torch

from nanorlhf.config import DeviceConfig, arg, die, note, template_flag
from nanorlhf.data import dialogue
from nanorlhf.loading import ancestors, load_gpt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.sampling import stream, uniforms


@dataclass
class SpeakerConfig(DeviceConfig):
    """The flags of every command in which a model answers."""

    template: str = template_flag()
    seed: int = arg(1, "fixes what is random", low=0)
    max_new_tokens: int = arg(128, "length limit of an answer")
    temperature: float = arg(1.0, "0 is greedy")


@dataclass
class ChatConfig(SpeakerConfig):
    """The flags of every command in which a person talks with a model."""

    temperature: float = arg(0.7, "0 is greedy")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0: from all")
    top_p: float = arg(0.95, "sample from the likeliest tokens of this share", low=1e-6, high=1)
    system: str = arg("", "said before your first words, as in the data's system turns")
    keep_turns: str = arg("auto", "read earlier turns; auto: as in training", ("auto", "yes", "no"))


def load_speaker(cfg, name, must_answer=False):
    """(GPT in eval mode on --device and in --dtype, its Checkpoint without the weights) of whatever
    --init takes. `must_answer`: a base model, which goes on with text, exits 2."""
    gpt, checkpoint = load_gpt(name, template=cfg.template)
    if must_answer and not checkpoint.tokenizer.chat:
        die(f"{name}: a base model, which answers nothing; train_sft.py makes one that does")
    device = pick_device(cfg)
    return cast(gpt, pick_dtype(cfg, device), device).eval(), checkpoint


class Speaker:
    """A model in a conversation."""

    def __init__(self, cfg, name, must_answer=False):
        self.cfg, self.name = cfg, name
        self.gpt, self.checkpoint = load_speaker(cfg, name, must_answer)
        self.tokenizer = self.checkpoint.tokenizer
        self.room = dialogue.room_for_prompts(cfg.max_new_tokens, self.gpt.config.block_size)
        self.keeps_turns = keeps_turns(cfg, self.checkpoint)
        self.system = [("system", cfg.system)] if cfg.system else []

    def answer(self, messages, temperature, number):
        """Yields the text of an answer, piece by piece as it is sampled; a character of several
        tokens comes as a whole. `number`: which answer this is, so that each has other noise."""
        cfg, ids, sent = self.cfg, [], ""
        tokens = torch.tensor([self.prompt_ids(messages)], device=self.gpt.device)  # (1, P)
        noise = uniforms(cfg.seed, number, [0], cfg.max_new_tokens)
        limits = (cfg.max_new_tokens, self.tokenizer.ends)
        for token in stream(self.gpt, tokens, *limits, noise, temperature, cfg.top_k, cfg.top_p):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a part of a character
                yield text[len(sent) :]
                sent = text
        yield self.tokenizer.decode(ids)[len(sent) :]

    def prompt_ids(self, messages):
        """Ids of what the model reads of a conversation that ends with the user."""
        if not self.tokenizer.chat:
            return dialogue.encode_document(self.tokenizer, messages[-1][1])[-self.room :]
        messages = [*self.system, *self.remembered(messages)]
        return dialogue.encode_prompt(self.tokenizer, messages)[-self.room :]

    def remembered(self, messages):
        """The end of a conversation, in whole turns, that the model reads."""
        messages = messages if self.keeps_turns else messages[-1:]
        return what_fits(self.tokenizer, messages, self.room, self.system)


def keeps_turns(cfg, checkpoint):
    """Whether a model reads the conversation so far; says so, and why. --keep_turns auto goes by
    the longest dialogue in the training data of the model, or of the one that it started from."""
    counts = (config["user_turns"] for config in ancestors(checkpoint) if "user_turns" in config)
    most = next(counts, None)
    wants = cfg.keep_turns == "yes" or cfg.keep_turns == "auto" and most != 1
    keeps = checkpoint.tokenizer.chat and wants
    reads = "the conversation so far" if keeps else "each text by itself"
    why = f", trained on dialogues of {most} questions at most" if most else ""
    note(f"reads {reads} (--keep_turns {cfg.keep_turns}{why})")
    return keeps


def what_fits(tokenizer, messages, room, system=()):
    """The end of a conversation that fits into `room` tokens behind the system's turns. What is cut
    are pairs of a question and its answer; the last question stays, however long it is."""
    while len(messages) > 2 and len(dialogue.encode_prompt(tokenizer, [*system, *messages])) > room:
        messages = messages[2:]
    return messages
