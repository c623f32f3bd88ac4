"""Stage 3: a reward model from human feedback.

    python train_rm.py                              # samples, asks the embedded world's labelers
    python train_rm.py --data feedback.jsonl        # rankings (of two, or more), ratings or thumbs
    python train_rm.py --feedback ratings           # the world's labelers give 0-5 stars

Departures from InstructGPT (arXiv:2203.02155, section 3.5): the score is standardised over the
responses of the model that PPO starts from, so that kl_coef means standard deviations per nat (they
shift the mean only); every kind of feedback trains the same model, each with its own loss.

Shapes: B prompts, K judged completions of one prompt.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import torch

from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, arg, die, from_cli, warn
from nanorlhf.data import batches
from nanorlhf.engine import Optimizer, claim, cosine_rate, leave, train, train_step
from nanorlhf.feedback import texts_of_unit
from nanorlhf.loading import load_model
from nanorlhf.machine import ranks
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.model import RewardModel, freeze_layers
from nanorlhf.report import keep_report, make_report, over_folds, print_folds
from nanorlhf.run import checkpoint
from nanorlhf.scoring import completion_scores
from nanorlhf.sources import feedback_of

KINDS = ("rankings", "comparisons", "ratings", "thumbs")


@dataclass
class Config(TrainConfig):
    """Stage 3: train a reward model on human feedback. Without --data: samples responses from
    the SFT model and has the embedded world's labelers judge them."""

    IDLE = "feedback prompts heldout_prompts: data"
    out_dir: str = arg("out/rm", "folder for this stage's checkpoints, metrics and report")
    init: str = arg("out/sft", "start: what train_sft.py starts from, or an earlier reward model")
    sft: str = arg("", "PPO starts from it: its answers are judged, set the unit; default: --init")
    from_scratch: bool = arg(False, "sizes and tokenizer of --init, but random weights")
    data: list[str] = arg([], "feedback of one kind: files, hf:owner/name; default: collected now")
    val_data: list[str] = arg([], "held-out feedback; default: a tenth of the prompts")
    val_examples: int = arg(2000, "held-out examples to evaluate on, at most")
    heldout_labelers: str = arg("heldout", "labelers NAME, NAME_... only evaluate; '': no one")
    feedback: str = arg("rankings", "what the world's labelers are asked for", choices=KINDS)
    prompts: int = arg(600, "prompts whose responses the world's labelers judge for training")
    heldout_prompts: int = arg(100, "prompts judged for evaluation only")
    max_new_tokens: int = arg(128, "length limit of the sampled responses")
    folds: int = arg(0, "first train so many models, to test each on prompts it lacks", high=100)
    freeze_layers: int = arg(0, "freeze embeddings and so many blocks; 0: nothing")
    epochs: int = arg(2, "passes over the data")
    max_steps: int = arg(0, "stop after this many optimizer steps; 0: --epochs decides")
    batch_size: int = arg(16, "prompts per optimizer step")
    learning_rate: float = arg(5e-4, "peak learning rate")
    eval_every: int = arg(38, "steps between evaluations on held-out data")
    save_every: int = arg(38, "steps between checkpoints")


def main(cfg, freeze=freeze_layers, on_row=None):
    device, dtype = claim(cfg)
    model, init = start(cfg)
    tokenizer = init.tokenizer
    freeze(model.gpt, cfg.freeze_layers)

    # unseen: held-out prompts too, but judged by labelers that are never trained on
    kind, files, train_set, val_set, unseen = feedback_of(cfg, init)
    unit_rows, unit = ranks.on_main(lambda: texts_of_unit(cfg, init, train_set))
    n = len(train_set.rows)
    print(
        f"[rm] {kind}: {n} to train on, {len(val_set.rows)} held out, "
        f"{len(unseen.rows)} by labelers never trained on"
    )

    pieces = 1 if cfg.shard else 4  # sharded ranks all do equally many forward passes
    loss_fn = partial(feedback_loss, kind, pieces)
    next_batch = partial(batch_of, cfg, tokenizer, train_set.rows)
    in_order = partial(batches_of, cfg, tokenizer)
    val_batches, max_steps = in_order(val_set.rows), steps_over(cfg, n)
    if cfg.folds and not cfg.resume:
        learn = partial(scores_of_fold, cfg, model, tokenizer, loss_fn)
        print_folds(kind, *over_folds(cfg.folds, train_set, val_set, learn))
    what = "rm", cfg, model, loss_fn, next_batch, val_batches, tokenizer, max_steps
    train(*what, files, on_row=on_row)

    # what the best checkpoint is worth, and the unit of its scores, which a finished run that is
    # resumed has measured before
    best, best_checkpoint = checkpoint.load_model(cfg.out_dir, "reward")
    best.set_unit(0.0, 1.0)
    cast(best, dtype, device).eval()
    val_scores = all_scores(best, val_batches, device)
    unseen_scores = all_scores(best, in_order(unseen.rows), device)
    unit_scores = all_scores(best, in_order(unit_rows), device)
    report = make_report(cfg, kind, val_set.examples, val_scores, unseen.examples, unseen_scores)
    report |= {"score_unit": unit} | scale_of(unit_scores)
    ranks.on_main(lambda: keep_report(cfg, best_checkpoint.path, report))
    leave()
    return report


def start(cfg):
    """(RewardModel, Checkpoint that it starts from): a language model gets a new head; an earlier
    reward model keeps its own, and loses its unit, which is measured anew."""
    model, init = load_model(cfg.init, cfg.template)
    torch.manual_seed(cfg.seed)
    if cfg.from_scratch:
        return RewardModel(init.model_config.build()), init
    if not isinstance(model, RewardModel):
        return RewardModel(model), init
    if not cfg.sft:
        die(f"--init {cfg.init} is a reward model: --sft names the model that PPO will start from")
    model.set_unit(0.0, 1.0)
    return model, init


def steps_over(cfg, n):
    return cfg.max_steps or cfg.epochs * math.ceil(n / cfg.batch_size)


def batch_of(cfg, tokenizer, rows, step):
    indices = batches.epoch_batch(len(rows), cfg.batch_size, cfg.seed, step)
    return batches.feedback_batch(rows, indices, tokenizer.pad_id)


def batches_of(cfg, tokenizer, rows):
    return batches.batches(rows, cfg.batch_size, batches.feedback_batch, tokenizer.pad_id)


def scores_of_fold(cfg, model, tokenizer, loss_fn, train_rows, rows):
    """Scores of some rows by a copy of the model that has learned from others."""
    device = pick_device(cfg)
    learner, max_steps = copy.deepcopy(model), steps_over(cfg, len(train_rows))
    optimizer = Optimizer(learner, cfg, pick_dtype(cfg, device), device)
    for step in range(max_steps):
        batch = batch_of(cfg, tokenizer, train_rows, step)
        rate = cosine_rate(step, cfg, max_steps)
        train_step(learner, loss_fn, batch, cfg, optimizer, rate, device)
    return all_scores(learner.eval(), batches_of(cfg, tokenizer, rows), device)


def feedback_loss(kind, pieces, model, rows):
    """(loss, metrics) for one kind of feedback. rows["target"] (B, K): ranks, 1 the best and 0 for
    an absent completion, where a comparison is a ranking of two; or with K = 1 a standardised
    rating, or 1 for like and 0 for dislike."""
    scores, target = completion_scores(model, rows, pieces), rows["target"]  # (B, K)
    if kind == "rankings":
        loss = f.ranking_loss(scores, target)
        accuracy, margin = f.ranking_accuracy(scores, target)
    elif kind == "ratings":  # their order is one among all prompts: report.json has it
        return f.rating_loss(scores[:, 0], target[:, 0]), {}
    else:
        score, label = scores[:, 0], target[:, 0]  # (B,)
        loss = f.thumbs_loss(score, label)
        accuracy = ((score > 0) == (label > 0.5)).float().mean()
        margin = (score * (2 * label - 1)).mean()
    return loss, {"accuracy": accuracy, "margin": margin}


@torch.no_grad()
def all_scores(model, feedback_batches, device):
    """Scores of all completions: one list of floats for each prompt."""
    all_rows = []
    for batch in feedback_batches:
        scores = completion_scores(model, batches.to_device(batch, device))  # (B, K)
        n_present = batch["present"].sum(1).tolist()
        all_rows += [row[:k] for row, k in zip(scores.tolist(), n_present)]
    return all_rows


def scale_of(scores):
    """Mean and standard deviation of raw scores, by which PPO's are standardised."""
    flat = torch.tensor([score for row in scores for score in row])
    mean, sd = flat.mean().item(), flat.std().item()
    if not sd > 0:
        warn(f"all scores of the {len(flat)} texts that set the unit are {mean:.3g}: it stays 1")
        sd = 1.0
    return {"score_mean": mean, "score_sd": sd}


if __name__ == "__main__":
    main(from_cli(Config))
