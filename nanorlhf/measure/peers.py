"""The same work on a model of the same architecture, by others' code: what `bench --vs` compares.

    hf               Hugging Face's generate: sampling with its dynamic cache
    trl=DIR          TRL's PPOTrainer (DIR holds the unpacked package `trl`, 1.10 or earlier)
    nanogpt=DIR      nanoGPT's model and optimizer (DIR holds its model.py)

Each runs in the way that is best for it. nanoGPT is under autocast and, on a GPU, compiled, as in
its train.py. HF's weights are in the dtype itself, which on a CPU is faster than autocast. TRL does
what it does by itself: steps under accelerate's mixed precision, generation and frozen models in
float32, and a value model of its own, a fourth network.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from nanorlhf.config import die, reason
from nanorlhf.measure.timing import say, synchronize

KNOWN = ("hf", "trl", "nanogpt")
NEEDS = {
    "hf": ("transformers",),
    "trl": ("transformers", "datasets", "accelerate", "tokenizers", "trl.experimental.ppo"),
    "nanogpt": (),
}
FILE = {"trl": "trl/__init__.py", "nanogpt": "model.py"}


def parse(vs):
    """`hf,trl=DIR,nanogpt=DIR` -> {name: folder}. Exits 2 where one of them cannot be imported."""
    folders = {}
    for item in filter(None, vs.split(",")):
        name, _, folder = item.partition("=")
        if name not in KNOWN:
            die(f"--vs {item}: not one of hf, trl=DIR, nanogpt=DIR")
        if name in FILE and not Path(folder, FILE[name]).is_file():
            die(f"--vs {item}: no {FILE[name]} in {folder or 'no folder'}")
        if name == "trl":
            sys.path.insert(0, str(Path(folder).resolve()))
        folders[name] = folder
        for package in NEEDS[name]:
            try:
                with quiet():
                    importlib.import_module(package)
            except ImportError as error:
                die(f"--vs {name}: {package} cannot be imported: {reason(error)}")
    return folders


@contextlib.contextmanager
def quiet():
    """Keep their progress bars, warnings and prints out of our output."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in ("transformers", "trl", "accelerate", "datasets"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield


# ---- training ----------------------------------------------------------------------------------


def nanogpt_training(folder, cfg, dtype, device):
    """A workload: one step as in nanoGPT's train.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    with quiet():
        spec.loader.exec_module(module)
        sizes = module.GPTConfig(
            block_size=cfg.seq_len,
            vocab_size=cfg.vocab_size,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            n_embd=cfg.d_model,
            dropout=0.0,
            bias=True,
        )
        gpt = module.GPT(sizes).to(device)
        optimizer = gpt.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    if device.type == "cuda":
        gpt = torch.compile(gpt)
    tokens = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.seq_len + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def work():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = gpt(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


# ---- generation --------------------------------------------------------------------------------


def hf_config(cfg, **more):
    from transformers import AutoConfig, GPT2Config

    more |= {"eos_token_id": None, "pad_token_id": 1}
    if cfg.init:
        return AutoConfig.from_pretrained(cfg.init, **more)
    return GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.prompt_tokens + cfg.max_new_tokens + 1,
        n_embd=cfg.d_model,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        **more,
    )


def hf_model(cfg):
    from transformers import AutoModelForCausalLM

    config = hf_config(cfg, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def hf_generation(cfg, dtype, device):
    """A workload: HF's `generate`, all responses of full length."""
    with quiet():
        gpt = hf_model(cfg).to(device, dtype)
    prompts = torch.randint(2, cfg.vocab_size, (cfg.rows, cfg.prompt_tokens), device=device)

    @torch.no_grad()
    def work():
        with quiet():
            return gpt.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=cfg.max_new_tokens,
                min_new_tokens=cfg.max_new_tokens,
                do_sample=True,
                top_k=0,
                temperature=1.0,
                pad_token_id=1,
            )

    return work


# ---- PPO ---------------------------------------------------------------------------------------


def trl_race(cfg, dtype, device, ours):
    """The seconds of TRL's iterations after the first, which is a warm-up. Between two iterations,
    with the clock stopped, ours(i) runs repetition i of everything else."""
    from transformers import TrainerCallback

    seconds = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronize(device)
            seconds.append(time.perf_counter() - self.start)
            say(f"iteration {len(seconds) - 1} of {cfg.repeats} beside TRL's: {seconds[-1]:.2f} s")
            if len(seconds) > 1:
                ours(len(seconds) - 2)
            synchronize(device)
            self.start = time.perf_counter()

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = trl_trainer(cfg, dtype, device, folder)
        trainer.add_callback(Clock())
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        trainer.train()
    return seconds[1:]


def trl_trainer(cfg, dtype, device, folder):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = models.WordLevel({f"t{i}": i for i in range(cfg.vocab_size)}, unk_token="t2")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words),
        eos_token="t0",
        pad_token="t1",
        unk_token="t2",
        padding_side="left",
    )
    iterations = cfg.repeats + 1
    ids = torch.randint(2, cfg.vocab_size, (cfg.rows * iterations, cfg.prompt_tokens)).tolist()
    prompts = Dataset.from_list([{"input_ids": row} for row in ids])
    bf16 = dtype == torch.bfloat16
    # PPOTrainer makes an Accelerator without telling it of bf16. That one reads the variable which
    # `accelerate launch --mixed_precision` sets; without it, transformers 5 trains in float32
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    args = PPOConfig(
        output_dir=folder,
        report_to="none",
        use_cpu=device.type == "cpu",
        bf16=bf16,
        per_device_train_batch_size=cfg.rows,
        gradient_accumulation_steps=1,
        num_mini_batches=cfg.minibatches,
        num_ppo_epochs=cfg.ppo_epochs,
        local_rollout_forward_batch_size=cfg.rows,
        total_episodes=cfg.rows * iterations,
        response_length=cfg.max_new_tokens,
        num_sample_generations=0,
        temperature=1.0,
        learning_rate=1e-5,
        logging_steps=10**6,
        save_strategy="no",
        gradient_checkpointing=False,
        stop_token=None,
        disable_tqdm=True,
    )
    head = lambda: AutoModelForSequenceClassification.from_config(
        hf_config(cfg, num_labels=1), dtype=torch.float32
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=hf_model(cfg),
        ref_model=hf_model(cfg),
        reward_model=head(),
        value_model=head(),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
    )
    del os.environ["ACCELERATE_MIXED_PRECISION"]
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    return trainer
