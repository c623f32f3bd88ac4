"""Stage 2: supervised fine-tuning, the next-token loss on the responses of demonstrations.

    python train_sft.py                             # demonstrations of the embedded world
    python train_sft.py --data demos.jsonl --init out/gpt

Departures from InstructGPT (arXiv:2203.02155, section 3.5): the checkpoint with the lowest
validation loss is used; they chose by reward-model score.

Shapes: B dialogues, T positions.
"""

import math
from dataclasses import dataclass

from nanorlhf.config import TrainConfig, arg, from_cli, note
from nanorlhf.data import batches, dialogue
from nanorlhf.data.values import all_said
from nanorlhf.engine import claim, leave, train, unsharded
from nanorlhf.fused import head_loss
from nanorlhf.loading import load_gpt
from nanorlhf.model import freeze_layers
from nanorlhf.run.log import show_sample
from nanorlhf.sampling import sample_responses
from nanorlhf.sources import demonstrations_of


@dataclass
class Config(TrainConfig):
    """Stage 2: fine-tune on (prompt, response). Without --data: the embedded world's."""

    IDLE = "demonstrations: data; disliked: data=0 val_data=0"
    out_dir: str = arg("out/sft", "folder for this stage's checkpoints, metrics and samples")
    init: str = arg("out/gpt", "start: a checkpoint, gpt2, hf:owner/name, or a model's folder")
    data: list[str] = arg([], "demonstrations: files or hf:owner/name; default: the world's")
    val_data: list[str] = arg([], "held-out demonstrations; default: a tenth of the prompts")
    val_examples: int = arg(2000, "held-out examples to evaluate on, at most")
    disliked: str = arg("refuse", "replies that people disliked", ("refuse", "skip", "learn"))
    demonstrations: int = arg(7000, "demonstrations that the embedded world's labelers write")
    dropout: float = arg(0.0, "dropout probability", high=1)
    freeze_layers: int = arg(0, "freeze embeddings, head and so many blocks; 0: nothing")
    epochs: int = arg(1, "passes over the data")
    max_steps: int = arg(0, "stop after this many optimizer steps; 0: --epochs decides")
    batch_size: int = arg(16, "dialogues per optimizer step")
    eval_every: int = arg(200, "steps between evaluations on held-out data")
    save_every: int = arg(200, "steps between checkpoints")
    learning_rate: float = arg(3e-3, "peak learning rate")
    max_new_tokens: int = arg(128, "length limit of the samples printed at the end")


def main(cfg, freeze=freeze_layers, on_row=None):
    claim(cfg)
    gpt, init = load_gpt(cfg.init, cfg.dropout, cfg.template)
    freeze(gpt, cfg.freeze_layers)
    tokenizer, longest = init.tokenizer, dialogue.context(cfg, init.model_config)
    files, train_examples, val_examples = demonstrations_of(cfg)
    train_rows = dialogue.encode_demonstrations(tokenizer, train_examples, longest)
    val_rows = dialogue.encode_demonstrations(tokenizer, val_examples, longest)
    n = len(train_rows)
    print(f"[sft] {n} demonstrations to train on, {len(val_rows)} held out")

    def next_batch(step):
        indices = batches.epoch_batch(n, cfg.batch_size, cfg.seed, step)
        return batches.dialogue_batch(train_rows, indices, tokenizer.pad_id)

    collate = batches.dialogue_batch
    val_batches = batches.batches(val_rows, cfg.batch_size, collate, tokenizer.pad_id)
    n_steps = cfg.max_steps or cfg.epochs * math.ceil(n / cfg.batch_size)
    turns = max(sum(role == "user" for role, _ in e.messages) for e in train_examples)
    details = {"user_turns": turns}  # by which `chat` knows whether to keep a conversation
    what = "sft", cfg, gpt, response_loss, next_batch, val_batches, tokenizer, n_steps
    result = train(*what, files, details, on_row)
    print_samples(unsharded(gpt, cfg).eval(), tokenizer, val_examples, cfg)
    leave()
    return result


def response_loss(model, rows):
    """The next-token loss where rows["mask"] (B, T) is True: on what the assistant says, its end
    token included. (loss, metrics)"""
    inputs, targets = rows["tokens"][:, :-1], rows["tokens"][:, 1:]  # (B, T - 1)
    mask = rows["mask"][:, 1:]
    return head_loss(model.hidden(inputs), model.head_weight, targets, mask), {}


def print_samples(gpt, tokenizer, examples, cfg):
    """What the model says where the assistant spoke last, in three of the examples. A long dialogue
    loses its left."""
    longest = dialogue.context(cfg, gpt.config)
    max_new_tokens = min(cfg.max_new_tokens, longest // 2)
    room = longest - max_new_tokens
    contexts = [e.messages[:-1] for e in batches.drawn(examples, 3, cfg.seed)]
    prompts = [dialogue.encode_prompt(tokenizer, messages)[-room:] for messages in contexts]
    responses = sample_responses(gpt, tokenizer, prompts, max_new_tokens, cfg.seed)
    note("[sft] held-out prompts, and what the trained model answers:")
    for messages, ids in zip(contexts, responses):
        show_sample(all_said(messages), tokenizer.decode(ids))


if __name__ == "__main__":
    main(from_cli(Config))
