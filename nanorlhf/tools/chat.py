"""Talk to a checkpoint in the terminal."""

from dataclasses import dataclass

from nanorlhf import batches, checkpoint, engine
from nanorlhf.config import arg, die
from nanorlhf.sampling import sample_responses


@dataclass
class Config:
    """Chat with an SFT or PPO checkpoint; a base GPT completes what you type."""

    model: str = arg("out/ppo", "checkpoint folder", positional=True)
    seed: int = arg(1, "fixes sampling")
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))
    temperature: float = arg(0.7, "0 is greedy")
    top_k: int = arg(0, "sample from the k likeliest tokens; 0: from all")
    top_p: float = arg(0.95, "sample from the fewest tokens that hold this probability")
    max_new_tokens: int = arg(128, "length limit of an answer")
    keep_turns: bool = arg(True, "the model reads the conversation so far")


def main(cfg):
    gpt, found = checkpoint.load_gpt(cfg.model)
    device = engine.pick_device(cfg)
    engine.cast(gpt, engine.pick_dtype(cfg, device), device).eval()
    tokenizer, turn, messages = found.tokenizer, 0, []
    room = gpt.config.block_size - cfg.max_new_tokens
    if room < 2:
        die(f"--max_new_tokens must be below the context, {gpt.config.block_size} tokens")
    print(f"{found.path} ({found.stage}); empty line: start over, Ctrl-D: leave")
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            messages = []
            continue
        messages = messages + [("user", text)] if cfg.keep_turns else [("user", text)]
        if found.stage == "gpt":
            ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        else:
            ids = batches.encode_prompt(tokenizer, messages)
        response = sample_responses(
            gpt, tokenizer, [ids[-room:]], cfg.max_new_tokens, cfg.seed, turn, cfg.temperature,
            cfg.top_k, cfg.top_p,
        )[0]  # fmt: skip
        reply, turn = tokenizer.decode(response), turn + 1
        messages.append(("assistant", reply))
        print(text + reply if found.stage == "gpt" else reply)
