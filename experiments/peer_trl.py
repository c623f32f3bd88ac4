"""TRL's last PPOTrainer (1.10; removed since), from our exported models: one more of `algorithms`.

    pip install 'transformers>=5' accelerate datasets
    pip download --no-deps trl==1.10.0 && python -m zipfile -e trl-1.10.0-*.whl trl_1_10
    python -m experiments.algorithms --trl trl_1_10

It has our PPO's settings. It differs in having a value network of its own, which starts as a copy
of the reward model, in computing in float32, and in subtracting 3 from the score of a response that
has no end, where ours puts -3 in its place.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from nanorlhf.config import arg, die
from nanorlhf.data import dialogue, world
from nanorlhf.loading import load_gpt
from nanorlhf.tools import export

TRL_FILE = "trl/__init__.py"
LM, SCORE = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
TRL_MODELS = {"model": LM, "ref_model": LM, "reward_model": SCORE, "value_model": SCORE}

TRL_NEEDS = ("transformers", "datasets", "accelerate", "trl")


@dataclass
class Config:
    """TRL's PPO from our SFT and reward model; the policy stays in Hugging Face layout."""

    out_dir: str = arg("out/trl", "folder for the policy, and for the exported models")
    trl: str = arg("", "folder that holds the unpacked package")
    init: str = arg("out/sft", "checkpoint of the policy and of its frozen reference")
    reward: str = arg("out/rm", "reward-model folder")
    seed: int = arg(1, "of prompts and sampling")
    max_steps: int = arg(24, "PPO iterations, of 128 prompts each")
    kl_coef: float = arg(0.05, "weight of the per-token KL penalty")
    learning_rate: float = arg(3e-4, "at the start; falls linearly to 0")


def import_from(flag, folder, file):
    """Let Python import from a folder. Exits 2 where it does not hold the file."""
    if folder and not Path(folder, file).is_file():
        die(f"{flag} {folder}: no {file} there")
    if folder:
        sys.path.insert(0, str(Path(folder).resolve()))


def trl_trainer(folder, tokenizer, model_of, prompts, **flags):
    """TRL's PPOTrainer, which answers each prompt (token ids) once, and says and saves nothing.
    model_of(name of a class of `transformers`) makes a model."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dataset = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    flags |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    flags |= {"num_sample_generations": 0, "logging_steps": 10**6, "gradient_checkpointing": False}
    flags |= {"temperature": 1.0, "total_episodes": len(prompts)}
    settings = PPOConfig(output_dir=folder, **flags)
    parts = {"train_dataset": dataset, "eval_dataset": dataset.select(range(2))}
    parts |= {name: model_of(kind) for name, kind in TRL_MODELS.items()}
    return PPOTrainer(args=settings, processing_class=tokenizer, **parts)


def main(cfg):
    import_from("--trl", cfg.trl or "(no folder)", TRL_FILE)
    if missing := [package for package in TRL_NEEDS if find_spec(package) is None]:
        die(f"TRL needs {', '.join(missing)}: pip install them")
    import transformers

    sft, judge = f"{cfg.out_dir}/sft_hf", f"{cfg.out_dir}/rm_hf"
    export.main(export.Config(cfg.init, sft))
    export.main(export.Config(cfg.reward, judge))
    tokenizer = load_gpt(cfg.init)[1].tokenizer
    prompts = dict.fromkeys(world.prompts("train", 160 * cfg.max_steps, cfg.seed))
    ids = [dialogue.encode_prompt(tokenizer, [("user", prompt)]) for prompt in prompts]
    flags = {"use_cpu": not torch.cuda.is_available(), "bf16": False, "seed": cfg.seed}
    flags |= {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 2}
    flags |= {"num_mini_batches": 2, "num_ppo_epochs": 2, "local_rollout_forward_batch_size": 128}
    flags |= {"response_length": 128, "stop_token": "eos", "missing_eos_penalty": 3.0}
    flags |= {"learning_rate": cfg.learning_rate, "kl_coef": cfg.kl_coef}

    def model_of(kind):
        folder = sft if kind == LM else judge
        return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)

    transformers.set_seed(cfg.seed)
    theirs = transformers.AutoTokenizer.from_pretrained(sft)
    ids = ids[: 128 * cfg.max_steps]
    trainer = trl_trainer(f"{cfg.out_dir}/trainer", theirs, model_of, ids, **flags)
    trainer.train()
    trainer.model.policy.save_pretrained(cfg.out_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(cfg.out_dir, name).write_text(Path(sft, name).read_text())
