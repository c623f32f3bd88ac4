"""Compare models on prompts that none has seen: reward, an independent judge, KL, and the text.

    python examples/compare.py --data held_out.jsonl --models out/sft out/ppo out/ppo_kl0 \\
        --reward out/rm --judge out/judge --temperature 0.7

Every model answers every prompt once. KL is to the first model, and LM loss is what --lm, by
default the first model, thinks of the replies: a policy that has left the language reads worse.
--best_of adds a row that trains nothing, the best of N replies of the first model under --reward.
--constant adds another, the one reply that --reward likes best whatever is asked: a policy that
scores no more has learned a phrase. --people adds those that were judged.
"""

import csv
from dataclasses import dataclass

import torch

from nanorlhf.config import arg, die, from_cli, reason, template_flag, warn
from nanorlhf.data import batches, dialogue
from nanorlhf.data.examples import load_feedback, load_prompts
from nanorlhf.data.split import split_held_out
from nanorlhf.fused import head_loss
from nanorlhf.hf.load import load_gpt
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.run import checkpoint
from nanorlhf.sampling import sample_responses
from nanorlhf.scoring import make_scorer
from nanorlhf.tools.evaluate import interval, mean_kl


@dataclass
class Config:
    """Compare models on held-out prompts: reward, judges, KL, LM loss, variety, length."""

    data: list[str] = arg([], "prompts, as train_ppo.py takes them: a tenth is held out")
    val_data: list[str] = arg([], "held-out prompts; default: that tenth of --data")
    models: list[str] = arg(["out/sft", "out/ppo"], "language models; the first is KL's reference")
    template: str = template_flag()
    reward: str = arg("out/rm", "what they were trained on: a folder, or path.py:function")
    judge: list[str] = arg([], "what no stage has learned from: folders, or path.py:function")
    lm: str = arg("", "language model for the column LM loss; default: the first of --models")
    prompts: int = arg(256, "how many of the prompts, at most", low=2)
    max_new_tokens: int = arg(128, "length limit of a reply")
    temperature: float = arg(1.0, "of sampling and of the KL", low=0.01)
    best_of: int = arg(0, "a row for the best of so many replies of the first model; 0: none")
    constant: int = arg(0, "a row for the best constant reply of so many candidates; 0: none")
    people: bool = arg(False, "rows for the replies that people judged, if --data holds feedback")
    show: int = arg(3, "prompts whose replies are printed", low=0)
    to: str = arg("", "append the rows to this .csv file")
    seed: int = arg(1, "of sampling", low=0)
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = arg("auto", "compute precision", choices=("auto", "float32", "bfloat16"))


def main(cfg):
    if cfg.to:
        check_csv(cfg)
    device = pick_device(cfg)
    dtype = pick_dtype(cfg, device)
    lm = cfg.lm or cfg.models[0]
    loaded = {
        name: load_gpt(name, template=cfg.template) for name in dict.fromkeys([*cfg.models, lm])
    }
    for gpt, _ in loaded.values():
        cast(gpt, dtype, device).eval().requires_grad_(False)
    reference, init = loaded[cfg.models[0]]
    for _, other in loaded.values():
        checkpoint.same_vocabulary(init, other)
    tokenizer = init.tokenizer
    room = dialogue.room_for_prompts(cfg.max_new_tokens, reference.config.block_size)
    drawn = lambda items: batches.drawn(items, cfg.prompts, cfg.seed)
    encode = lambda examples: dialogue.encode_prompts(tokenizer, examples, room)
    prompts = encode(drawn(held_out(cfg, load_prompts)))
    judged = {}  # name -> (prompts, ids of people's replies)
    for name, asked, completions in people(cfg) if cfg.people else ():
        asked = drawn(asked)
        judged[name] = (
            encode(asked),
            [reply_ids(tokenizer, e.messages, c) for e, c in zip(asked, drawn(completions))],
        )

    def answers(name, asked, step=0):
        ids, about = [p.ids for p in asked], {"temperature": cfg.temperature, "progress": name}
        gpt = loaded[name][0]
        return sample_responses(gpt, tokenizer, ids, cfg.max_new_tokens, cfg.seed, step, **about)

    def scorer(spec):
        score = make_scorer(spec, init, device, dtype, prompts)
        return lambda asked, ids: score(asked, ids, [tokenizer.decode(row) for row in ids])

    reward, judges = scorer(cfg.reward), {spec: scorer(spec) for spec in cfg.judge}
    rows = {name: (prompts, answers(name, prompts)) for name in cfg.models}
    rewards = {name: reward(*row) for name, row in rows.items()}  # each (prompts,)
    if cfg.constant:
        scored = [pair for name in rows for pair in zip(rows[name][1], rewards[name].tolist())]
        best = best_constant(reward, prompts, scored, tokenizer.eos_id, cfg.constant)
        if best:
            rows["constant reply"] = prompts, [best] * len(prompts)
        else:
            warn("no reply ends by itself, so there is no row for a constant one")
    if cfg.best_of:
        asked = [p for p in prompts for _ in range(cfg.best_of)]
        ids = answers(cfg.models[0], asked, step=1)
        rows[f"best of {cfg.best_of}"] = prompts, best_of(reward, asked, ids, cfg.best_of)
    rows |= judged
    rewards |= {name: reward(*row) for name, row in rows.items() if name not in rewards}

    table = []
    for name, (asked, ids) in rows.items():
        row, pairs = {"model": name, "n": len(ids)}, ([p.ids for p in asked], ids)
        scores = {"reward": rewards[name]} | {spec: j(asked, ids) for spec, j in judges.items()}
        for column, score in scores.items():
            mean, (low, high) = interval(score.tolist())
            row |= {column: mean, f"{column} low": low, f"{column} high": high}
        row["KL"] = ""
        if name in cfg.models:
            gpt = loaded[name][0]
            row["KL"] = mean_kl(gpt, reference, tokenizer, *pairs, 16, cfg.temperature)
        row["LM loss"] = loss(loaded[lm][0], tokenizer, *pairs)
        row |= variety([tokenizer.decode(r) for r in ids])
        row["ends"] = sum(tokenizer.eos_id in r for r in ids) / len(ids)
        row["length"] = sum(map(len, ids)) / len(ids)
        table.append({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()})
    print_table(table)
    for i in range(min(cfg.show, len(prompts))):
        print(f"\n{prompts[i].text}")
        for name, (asked, ids) in rows.items():
            if asked is prompts:
                more = "" if tokenizer.eos_id in ids[i] else " ..."
                print(f"  {name}: {tokenizer.decode(ids[i])}{more}")
    if cfg.to:
        with open(cfg.to, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(cfg), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(table)
    return table


def columns(cfg):
    scores = [f"{name}{end}" for name in ("reward", *cfg.judge) for end in ("", " low", " high")]
    return ["model", "n", *scores, *"KL,LM loss,bigrams,distinct,starts,ends,length".split(",")]


def check_csv(cfg):
    """Exits 2 where the rows could not be appended to --to: before anything is sampled."""
    try:
        with open(cfg.to, "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), columns(cfg))
    except (OSError, ValueError, csv.Error) as error:
        die(f"--to {cfg.to}: {reason(error)}")
    if header != columns(cfg):
        die(f"--to {cfg.to}: its first line names other columns than {', '.join(columns(cfg))}")


def held_out(cfg, load):
    return split_held_out(load(cfg.data), load(cfg.val_data))[1]


def people(cfg):
    """Yields (name, examples, completions): what people preferred, and the others."""
    examples = held_out(cfg, lambda paths: load_feedback(paths)[1] if paths else [])
    for name, is_asked in (("preferred", True), ("not preferred", False)):
        chosen = [
            (e, c)
            for e in examples
            for c, t in zip(e.completions, e.target)
            if (t == 1) == is_asked
        ]
        if chosen:
            yield name, *zip(*chosen)


def reply_ids(tokenizer, messages, completion):
    """Ids of a completion, which may go on over several turns, up to its last eos."""
    ids = dialogue.encode_pair(tokenizer, messages, completion)
    return ids[len(dialogue.encode_prompt(tokenizer, messages)) :]


def best_of(reward, asked, ids, n):
    """Of every n replies in a row, which answer the same prompt, the one with the best score."""
    best = reward(asked, ids).view(-1, n).argmax(1).tolist()  # (prompts,)
    return [ids[i * n + k] for i, k in enumerate(best)]


def best_constant(reward, prompts, scored, eos_id, n_candidates):
    """The reply with the best mean score over all prompts, of those that end by themselves and
    score best where they were given: `scored` holds (ids, score). A quarter of the candidates goes
    on to four times as many prompts. None where no reply ends."""
    score_of = {tuple(ids): score for ids, score in scored if eos_id in ids}
    candidates = sorted(score_of, key=score_of.get)[-n_candidates:]
    n = 1
    while n < len(prompts) and candidates:
        n = min(4 * n, len(prompts))
        flat = [list(c) for c in candidates for _ in range(n)]
        means = reward(prompts[:n] * len(candidates), flat).view(-1, n).mean(1)  # (candidates,)
        best = means.argsort(descending=True)[: max(len(candidates) // 4, 1)]
        candidates = [candidates[i] for i in best]
    return list(candidates[0]) if candidates else None


@torch.no_grad()
def loss(gpt, tokenizer, prompts, responses):
    """Nats per token of the responses, their ends included, under a language model."""
    rows = [(p + r, [False] * len(p) + [True] * len(r), "") for p, r in zip(prompts, responses)]
    total = 0.0
    for batch in batches.batches(rows, 32, batches.dialogue_batch, tokenizer.pad_id):
        tokens, mask = batch["tokens"].to(gpt.device), batch["mask"][:, 1:].to(gpt.device)
        mean = head_loss(gpt.hidden(tokens[:, :-1]), gpt.head_weight, tokens[:, 1:], mask)
        total += mean.item() * int(mask.sum())
    return total / sum(map(len, responses))


def variety(texts):
    """How much is said only once: bigrams within a text (mean over the texts of two words or more),
    whole texts, and their first four words."""
    words = [text.split() for text in texts]
    bigrams = [list(zip(w, w[1:])) for w in words if len(w) > 1]
    share = lambda items: len(set(items)) / len(items)
    return {
        "bigrams": sum(map(share, bigrams)) / max(len(bigrams), 1),
        "distinct": share(texts),
        "starts": share([tuple(w[:4]) for w in words]),
    }


def print_table(table):
    names = [key for key in table[0] if not key.endswith((" low", " high"))]
    cells = [names]
    for row in table:
        shown = {key: f"{x:.3f}" if isinstance(x, float) else str(x) for key, x in row.items()}
        for key in names:
            if f"{key} low" in row:
                shown[key] += f" [{shown[key + ' low']}, {shown[key + ' high']}]"
        cells.append([shown[key] for key in names])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


if __name__ == "__main__":
    main(from_cli(Config))
