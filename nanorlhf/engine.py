"""What several stages share: the start, the optimizer step, the learning-rate schedules, and the
training loop of the three supervised stages.

Shapes: b rows of a micro-batch.
"""

import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch

from nanorlhf import functional
from nanorlhf.data.batches import grouped, micro_batches, to_device
from nanorlhf.machine import compiled, durable, process, ranks
from nanorlhf.machine.device import cast, pick_device, pick_dtype
from nanorlhf.model import GPT, Block, freeze_layers
from nanorlhf.run import session
from nanorlhf.run.log import Log
from nanorlhf.run.selfcheck import check, supervised


def claim(cfg):
    """The start of every stage: choose the device and the dtype, seed all generators, and lock
    --out_dir for this run. What cannot be had ends the run here, before any work. Returns
    (device, dtype)."""
    if cfg.mistake:
        from nanorlhf.course import mistakes  # here: a healthy run imports nothing of the course

        mistakes.make(cfg)
    device = pick_device(cfg)
    session.keep_apart(cfg)
    durable.lock(cfg.out_dir)
    session.seed_all(cfg.seed)
    choose_compiled(cfg)
    return device, pick_dtype(cfg, device)


def choose_compiled(cfg):
    """With --compile, compile blocks and `head_loss`, which ask `compiled`, and what else reads all
    logits (B, T, V): the maths itself need not know of it."""
    compiled.choose(cfg.compile)
    for name in ("logprobs_from_logits", "entropy_from_logits", "kl_exact") if cfg.compile else ():
        plain = inspect.unwrap(getattr(functional, name))  # an earlier run may have been here
        setattr(functional, name, compiled.compiled(plain))


def leave():
    """The end of every stage, of a run that went well."""
    ranks.leave()


def unsharded(gpt, cfg):
    """The model to sample from: gpt itself or, with --shard, a copy with all its weights."""
    if not cfg.shard:
        return gpt
    whole = ranks.unsharded(gpt, pick_dtype(cfg, pick_device(cfg)))
    freeze_layers(whole, gpt.n_frozen)
    return whole


def shard(model, dtype, device):
    """Split a model up over the ranks, block by block."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    ranks.shard(model, blocks, dtype, device)
    if isinstance(model, GPT):
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "hidden")  # what the losses call
    return model


class WeightedMean:
    """sum(weight * metric) / sum(weight), over micro-batches and ranks. A plain mean of the
    micro-batches' means would be another number, as they hold unequal numbers of loss tokens. Sums
    stay on the metrics' device, and only `result` waits for it."""

    def __init__(self):
        self.weight, self.sums = 0.0, {}  # {names of metrics: their sums, as one tensor}
        self.total = self.norm = 0.0  # the weight on all ranks, and what `result` was given

    def add(self, metrics, weight):
        self.weight += weight
        if metrics:
            x = torch.stack([torch.as_tensor(x).detach() for x in metrics.values()])
            exact = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
            names = tuple(metrics)
            self.sums[names] = self.sums.get(names, 0.0) + weight * exact

    def add_beside(self, metrics):
        """Add metrics that describe all that was added so far: they get its whole weight."""
        weight = self.weight
        self.add(metrics, weight)
        self.weight = weight

    def result(self, norm=0.0):
        """The means. `norm`, a scalar that all ranks have, becomes a number by the same wait."""
        if not self.sums:
            self.norm = float(norm)
            return {}
        sums = torch.cat(list(self.sums.values()))
        sums = ranks.summed(torch.cat([sums.new_tensor([self.weight]), sums]))
        norm = torch.as_tensor(norm).to(sums)[None]
        self.norm, self.total, *sums = torch.cat([norm, sums]).tolist()
        means = {}
        for name, x in zip(chain(*self.sums), sums):
            means[name] = means.get(name, 0.0) + x / max(self.total, 1e-8)
        return means


class Optimizer:
    """AdamW on float32 weights, the masters, while the model computes with a copy of them in its
    own dtype.

    In bfloat16 the copy is made once per step, the gradients of micro-batches add up in float32,
    and updates that are smaller than bfloat16 can express are not lost. In float32 no copy is
    needed: a parameter is its own master. With --shard FSDP2 makes the copies.
    """

    def __init__(self, model, cfg, dtype, device, eps=1e-8):
        ranks.start_equal(model)
        self.model = shard(model, dtype, device) if cfg.shard else model.to(device)
        self.device, self.dtype = device, dtype
        self.grad_clip, in_place = cfg.grad_clip, cfg.shard or dtype == torch.float32
        for gpt in (m for m in model.modules() if isinstance(m, GPT)):  # a critic's too
            gpt.grad_checkpointing = cfg.grad_checkpointing
        self.params = dict(model.named_parameters())
        process.keep_freed_memory(sum(p.numel() for p in self.params.values()))
        master_of = lambda p: p.detach().to(torch.float32, copy=True).requires_grad_()
        self.masters = {n: p if in_place else master_of(p) for n, p in self.params.items()}
        if not in_place:
            cast(model, dtype, device)
        self.trained = [name for name, p in self.params.items() if p.requires_grad]
        matrices = [self.masters[n] for n in self.trained if self.params[n].dim() > 1]
        vectors = [self.masters[n] for n in self.trained if self.params[n].dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), eps=eps, fused=True)
        pairs = [(self.masters[n], self.params[n]) for n in self.trained]
        self.copied = [] if in_place else pairs
        self.discard()

    def backward(self, loss, stats, weight):
        """Add a micro-batch. `loss` and `stats` are means over its rows, whose weights (b,) say
        how much each row counts. A step's loss, gradient and stats are sum(weight * x) /
        sum(weight) over the micro-batches of all ranks."""
        weight = float(weight.sum())
        self.mean.add(stats, weight)
        self._accumulate(loss * weight)

    def backward_beside(self, loss, stats):
        """Add a loss that belongs to the step as a whole, such as PPO-ptx's, after the step's
        micro-batches: the step minimises the sum of both."""
        self.mean.add_beside(stats)
        self._accumulate(loss * self.mean.weight)

    def _accumulate(self, loss):
        assert self.means is None, "a micro-batch comes after `stats` and before `step`"
        loss.backward()
        pairs = [(master, p) for master, p in self.copied if p.grad is not None]
        first = [(master, p) for master, p in pairs if master.grad is None]
        more = [(master, p) for master, p in pairs if master.grad is not None]
        for master, _ in first:
            master.grad = torch.empty_like(master)
        # of all parameters at once: one by one, a GPU is done before Python says what comes next
        for pairs, put in ((first, torch._foreach_copy_), (more, torch._foreach_add_)):
            if pairs:
                put([master.grad for master, _ in pairs], [p.grad for _, p in pairs])
        for _, p in self.copied:
            p.grad = None

    def stats(self):
        """The mean stats since the last step. Reading them waits for the device, which happens only
        here: the gradient's norm, which `step` needs, comes with them."""
        if self.means is None:
            masters = [self.masters[name] for name in self.trained]
            self.weight = max(ranks.add_gradients(masters, self.mean.weight), 1e-8)
            norm = torch.nn.utils.get_total_norm(self.gradients())
            self.means = self.mean.result(ranks.whole(norm))
        return self.means

    def gradients(self):
        grads = (self.masters[name].grad for name in self.trained)
        return [grad for grad in grads if grad is not None]

    def step(self, learning_rate):
        """Clip the gradient, update the masters and refresh the copies; returns the gradient's
        norm before clipping. If that is not finite, nothing is changed."""
        self.stats()
        norm = self.mean.norm / self.weight
        if math.isfinite(norm):  # divide by the weight and clip, in one pass
            scale = min(1.0, self.grad_clip / (norm + 1e-6)) / self.weight
            torch._foreach_mul_(self.gradients(), scale)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
            if self.copied:
                masters, params = zip(*self.copied)
                with torch.no_grad():
                    torch._foreach_copy_(params, masters)
        self.discard()
        return norm

    def discard(self):
        """Forget what was added since the last step."""
        self.adamw.zero_grad(set_to_none=True)
        self.mean, self.means = WeightedMean(), None  # of this step's micro-batches

    def weights(self):
        """The model's state_dict with the float32 masters in place of their copies."""
        masters = {name: w.detach() for name, w in self.masters.items()}
        return {n: ranks.to_save(w) for n, w in (self.model.state_dict() | masters).items()}

    def state(self):
        """AdamW's, the same whatever the number of ranks."""
        state = self.adamw.state_dict()
        whole = lambda slots: {name: ranks.to_save(x) for name, x in slots.items()}
        return state | {"state": {i: whole(slots) for i, slots in state["state"].items()}}

    def load(self, weights, state):
        with torch.no_grad():
            for name, master in self.masters.items():  # buffers stay as they are
                master.copy_(ranks.cut_like(weights[name], master))
            for name, p in self.params.items():
                p.copy_(self.masters[name])
        trained = [p for group in self.adamw.param_groups for p in group["params"]]
        for i, slots in state["state"].items():
            slots |= {k: ranks.cut_like(x, trained[i]) for k, x in slots.items() if x.dim()}
        self.adamw.load_state_dict(state)


def cosine_rate(step, cfg, max_steps):
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(max_steps - cfg.warmup_steps, 1)
    return cfg.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(progress, 1)))


def linear_rate(step, cfg):
    """Linear warm-up, then linearly to 0 over the iterations of PPO."""
    warm = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    return cfg.learning_rate * warm * (1 - step / cfg.max_steps)


def train(
    stage,
    cfg,
    model,
    loss_fn,
    next_batch,
    val_batches,
    tokenizer,
    n_steps,
    files=(),
    details=None,
    on_row=None,
):
    """The loop of stages 1 to 3. loss_fn(model, rows) -> (loss, metrics), both means over the
    rows' `weight`; next_batch(step) is pure; `files` are what the batches were made from; `details`
    as in `Run`; `on_row` as in `Log`. Returns the last metrics."""
    device = pick_device(cfg)
    dtype = pick_dtype(cfg, device)
    optimizer = Optimizer(model, cfg, dtype, device)
    run = session.Run(stage, cfg, optimizer, tokenizer, n_steps, files, details)
    start, _ = run.resume()
    if cfg.check and start == 0:
        check(stage, supervised(loss_fn, next_batch(0), optimizer, cfg, tokenizer, dtype))
    log = Log(cfg, start, n_steps, on_row)
    log_every = max(1, cfg.eval_every // 10)
    upcoming = prefetched(next_batch, start, n_steps)
    for step in range(start, n_steps + 1):
        row, last = {}, step == n_steps
        if step % cfg.eval_every == 0 or last:
            means = evaluate(model, loss_fn, val_batches, cfg, device)
            row = {"val_" + name: x for name, x in means.items()}
        if why := run.due(step):
            run.save(step, why, {}, row.get("val_loss", math.inf))
        if last:
            log.row(step, row)
            break
        learning_rate = cosine_rate(step, cfg, n_steps)
        # dropout's seed is a function of step and rank, so resuming needs no saved state
        torch.manual_seed(cfg.seed * 1_000_003 + step + (ranks.rank() << 40))
        batch = next(upcoming)
        metrics = train_step(model, loss_fn, batch, cfg, optimizer, learning_rate, device)
        both = metrics["grad_norm"] + metrics["loss"]  # not finite where one of them is not
        session.stop_if_not_finite(step, both, batch["source"])
        if step % log_every == 0 or row:
            log.row(step, metrics | row)
        log.bar.update()
    log.close()
    return row


def prefetched(next_batch, start, end):
    """Yields the batches of steps start..end-1, each of which is made in a thread while the device
    computes with the one before it."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(next_batch, start)
        for step in range(start + 1, end):
            batch, upcoming = upcoming.result(), pool.submit(next_batch, step)
            yield batch
        yield upcoming.result()


def train_step(model, loss_fn, batch, cfg, optimizer, learning_rate, device):
    """One optimizer step over the micro-batches of a batch; returns its mean metrics."""
    model.train()
    for rows in micro_batches(batch, cfg):
        loss, metrics = loss_fn(model, to_device(rows, device))
        optimizer.backward(loss, {"loss": loss.detach()} | metrics, rows["weight"])
    metrics = optimizer.stats()
    norm = optimizer.step(learning_rate)
    return metrics | {"learning_rate": learning_rate, "grad_norm": norm}


@torch.no_grad()
def evaluate(model, loss_fn, val_batches, cfg, device):
    """Mean metrics over validation batches, weighted as in training, and the weight that they are
    over; nothing where that is 0."""
    model.eval()
    mean = WeightedMean()
    for batch in ranks.mine(val_batches):
        for rows in grouped(batch, cfg):
            loss, metrics = loss_fn(model, to_device(rows, device))
            mean.add({"loss": loss} | metrics, float(rows["weight"].sum()))
    means = mean.result()
    return means | {"weight": mean.total} if mean.total else {}
