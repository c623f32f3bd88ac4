"""Stage 3: a reward model from human feedback.

    python train_rm.py                              # samples, asks the embedded world's labelers
    python train_rm.py --data feedback.jsonl        # comparisons, rankings, ratings or thumbs
    python train_rm.py --feedback ratings           # the world's labelers give 0-5 stars

Departures from InstructGPT (arXiv:2203.02155, section 3.5): the score is standardised over the
samples that it was trained on, so that kl_coef means standard deviations per nat (they shift the
mean only); every kind of feedback trains the same model, each with its own loss.
"""

from dataclasses import dataclass
from functools import partial

import torch

from nanorlhf import functional as f
from nanorlhf.config import TrainConfig, arg, die, from_cli
from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import load_feedback, split_held_out
from nanorlhf.engine import claim, train
from nanorlhf.feedback import feedback_file
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine import ranks
from nanorlhf.machine.device import cast
from nanorlhf.model import GPT, RewardModel
from nanorlhf.report import keep_report, make_report
from nanorlhf.run import checkpoint
from nanorlhf.scoring import completion_scores

SCALE_PROMPTS = 200  # mean and sd of the score are measured on the responses to so many


@dataclass
class Config(TrainConfig):
    """Stage 3: train a reward model on human feedback. Without --data: samples responses from
    the SFT model and has the embedded world's labelers judge them."""

    out_dir: str = arg("out/rm", "folder for this stage's checkpoints, metrics and report")
    init: str = arg("out/sft", "start: an SFT or base checkpoint, or GPT-2 (gpt2, a folder)")
    from_scratch: bool = arg(False, "sizes and tokenizer of --init, but random weights")
    sft: str = arg("out/sft", "checkpoint whose responses are judged where no --data is given")
    data: list[str] = arg(
        [], "feedback of one kind: files or hf:owner/name; default: collected now"
    )
    val_data: list[str] = arg([], "held-out feedback; default: a tenth of the prompts")
    val_examples: int = arg(2000, "held-out examples to evaluate on, at most")
    heldout_labelers: str = arg("heldout", "labelers named so are only used for evaluation")
    feedback: str = arg(
        "rankings",
        "what the world's labelers are asked for",
        choices=("rankings", "comparisons", "ratings", "thumbs"),
    )
    prompts: int = arg(600, "prompts whose responses the world's labelers judge for training")
    heldout_prompts: int = arg(100, "prompts judged for evaluation only")
    max_new_tokens: int = arg(128, "length limit of the sampled responses")
    epochs: int = arg(2, "passes over the data")
    max_steps: int = arg(0, "stop after this many optimizer steps; 0: --epochs decides")
    batch_size: int = arg(16, "prompts per optimizer step")
    learning_rate: float = arg(5e-4, "peak learning rate")
    eval_every: int = arg(38, "steps between evaluations on held-out data")
    save_every: int = arg(38, "steps between checkpoints")


def main(cfg):
    device, dtype = claim(cfg)
    gpt, start = load_gpt(cfg.init)
    tokenizer, model_config = start.tokenizer, start.model_config
    torch.manual_seed(cfg.seed)
    model = RewardModel(GPT(model_config) if cfg.from_scratch else gpt)
    files = cfg.data or [ranks.on_main(lambda: feedback_file(cfg, start))]
    kind, examples = load_feedback(files, cfg.columns)
    val_kind, given = load_feedback(cfg.val_data, cfg.columns) if cfg.val_data else (kind, [])
    if val_kind != kind:
        die(f"--val_data has {val_kind}, --data has {kind}")
    train_set, val_set = split_held_out(examples, given, cfg.val_examples)
    is_new = lambda e: e.labeler.startswith(cfg.heldout_labelers)
    heldout_set = [e for e in val_set if is_new(e)]
    train_set, val_set = [[e for e in s if not is_new(e)] for s in (train_set, val_set)]
    if kind == "ratings":
        standardise_ratings(train_set, [val_set, heldout_set])
    encode = lambda s: dialogue.encode_feedback(tokenizer, s, model_config.block_size) if s else []
    train_rows, val_rows, heldout_rows = map(encode, (train_set, val_set, heldout_set))
    judged = {source for *_, source in val_rows + heldout_rows}  # less those that are too long
    val_set, heldout_set = [[e for e in s if e.source in judged] for s in (val_set, heldout_set)]
    n, pad_id = len(train_rows), tokenizer.pad_id
    max_steps = cfg.max_steps or cfg.epochs * -(-n // cfg.batch_size)

    def next_batch(step):
        indices = batches.epoch_batch(n, cfg.batch_size, cfg.seed, step)
        return batches.feedback_batch(train_rows, indices, pad_id)

    parts = 1 if cfg.shard else 4  # sharded ranks all do equally many forward passes
    loss_fn = partial(feedback_loss, kind, parts)
    collate = lambda rows: batches.batches(rows, cfg.batch_size, batches.feedback_batch, pad_id)
    print(
        f"[rm] {kind}: {n} to train on, {len(val_rows)} held out, "
        f"{len(heldout_rows)} by labelers never trained on"
    )
    val_batches = collate(val_rows)
    train("rm", cfg, model, loss_fn, next_batch, val_batches, tokenizer, max_steps, files)
    best, found = checkpoint.load_reward_model(cfg.out_dir)
    best.score_mean.fill_(0)  # raw scores, also where a finished run was resumed
    best.score_sd.fill_(1)
    cast(best, dtype, device).eval()
    # a given file may be sorted by its labels; the world asks its prompts in random order
    any_of = batches.epoch_batch(n, SCALE_PROMPTS, cfg.seed, 0) if cfg.data else range(n)
    some = [train_rows[i] for i in any_of[:SCALE_PROMPTS]]
    val_scores, heldout_scores, train_scores = [
        all_scores(best, collate(rows), device) for rows in (val_rows, heldout_rows, some)
    ]
    report = make_report(cfg, kind, val_set, val_scores, heldout_set, heldout_scores)
    flat = torch.cat([torch.tensor(s) for s in train_scores])
    report |= {"score_mean": flat.mean().item(), "score_sd": max(flat.std().item(), 1e-6)}
    ranks.on_main(lambda: keep_report(cfg, found.path, report))
    ranks.leave()
    return report


def feedback_loss(kind, parts, model, rows):
    """(loss, metrics) of scores (B, K) for one kind of feedback; rows["target"] (B, K)."""
    scores, target = completion_scores(model, rows, parts), rows["target"]
    first, label = scores[:, 0], target[:, 0]
    if kind == "thumbs":
        loss, margin = f.thumbs_loss(first, label), (first * (2 * label - 1)).mean()
        accuracy = ((first > 0) == (label > 0.5)).float().mean()
    elif kind == "ratings":
        loss = f.rating_loss(first, label)
        accuracy, margin = f.ranking_accuracy(scores.T, f.rank_of(target.T))
    else:
        pairs = kind == "comparisons"
        loss = f.pairwise_loss(first, scores[:, 1]) if pairs else f.ranking_loss(scores, target)
        accuracy, margin = f.ranking_accuracy(scores, target)
    return loss, {"accuracy": accuracy, "margin": margin}


def standardise_ratings(train_set, others):
    """Ratings -> (rating - mean) / sd of the training set, in place."""
    ratings = torch.tensor([e.target[0] for e in train_set])
    mean, sd = ratings.mean().item(), max(ratings.std().item(), 1e-6)
    for example in [*train_set, *(e for s in others for e in s)]:
        example.target = [(example.target[0] - mean) / sd]


@torch.no_grad()
def all_scores(model, rows, device):
    """Scores of every row's completions: a list of lists."""
    found = []
    for batch in rows:
        scores = completion_scores(model, batches.to_device(batch, device)).tolist()
        found += [row[: sum(p)] for row, p in zip(scores, batch["present"].tolist())]
    return found


if __name__ == "__main__":
    main(from_cli(Config))
