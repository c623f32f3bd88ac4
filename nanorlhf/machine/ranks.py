"""Several processes that train one model: `torchrun --nproc_per_node=N train_sft.py ...`.

Shapes: B rows of a global batch, b of a rank's share, T positions.

Every rank builds the same global batch and takes its share of it; gradients, metrics and rollouts
are put together again, so that nothing but the rounding depends on N. Rank 0 alone prints and
writes. Without torchrun there is one rank, and nothing here does anything.

Gradients: DistributedDataParallel averages those of one backward pass, in the model's own dtype.
That is another number where ranks hold unequal numbers of loss tokens, and less exact in bfloat16.
So the same all-reduce runs once per step instead, on the float32 sums of weight * gradient.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanorlhf.config import die, rank, world_size


def join(device):
    """Meet the other processes; returns this one's own device. Only rank 0 goes on printing."""
    if world_size() > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        # a rank that dies is noticed by torchrun; one that tokenizes a corpus may take its time
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """The end of a run that went well. After a failure there is no goodbye: it would wait for the
    others, which wait for this one."""
    if world_size() > 1:
        dist.destroy_process_group()


def on_main(function):
    """What function() returns on rank 0, where alone it runs; the others wait for it."""
    found = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def on_any(flag):
    """Whether the flag is set on any rank; all must ask."""
    if world_size() == 1:
        return flag
    found = torch.tensor(int(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def mine(parts):
    """This rank's share of a list of (micro-)batches, equally many on every rank: sharded models
    need that. Where there are too few, one row that weighs nothing stands in."""
    parts = list(parts)
    missing = range(-len(parts) % world_size())
    parts += [{k: v[:1] for k, v in parts[0].items()} | {"weight": torch.zeros(1)} for _ in missing]
    return parts[rank() :: world_size()]


def rows(n):
    """This rank's rows of n, equally many on every rank: the last one again where they run out."""
    size = -(-n // world_size())
    return [min(i, n - 1) for i in range(rank() * size, (rank() + 1) * size)]


def gather(x, n):
    """All n rows of a tensor of which this rank holds those of `rows(n)`."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)[:n]


def pad_alike(x, value):
    """(b, T) on every rank -> (b, the largest T)."""
    if world_size() == 1:
        return x
    T = torch.tensor(x.shape[1])
    dist.all_reduce(T, dist.ReduceOp.MAX)
    return F.pad(x, (0, int(T) - x.shape[1]), value=value)


def add_gradients(parameters, weight):
    """Sum gradients over ranks, in place, and what they weigh; returns what to divide them by."""
    if world_size() == 1:
        return weight
    averaged = is_sharded(parameters[0])  # by FSDP2, in backward
    total = torch.tensor(weight, dtype=torch.float64)
    grads = [] if averaged else [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(x, async_op=True) for x in (total, *grads)]:
        work.wait()
    return float(total) / (world_size() if averaged else 1)


def start_equal(model):
    """Rank 0's parameters for everyone, whatever the initial weights were drawn from."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def shard(model, units, dtype, device):
    """FSDP2: each rank holds 1/N of every parameter, of its gradient and of AdamW's moments, in
    float32. The weights of a unit (a submodule) are gathered, in `dtype`, while it computes."""
    if world_size() == 1:
        die("--shard splits a model over processes: start it with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.float()
    # of results that are views, as values are: nothing here changes them in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    for part in (*units, model):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    return model


def unsharded(model, dtype):
    """A whole copy of a sharded model that is made of its `config`, as GPT is."""
    from torch.distributed.fsdp import FSDPModule

    plain = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        copy = plain(model.config)
    weights = {name: w.to(dtype).full_tensor() for name, w in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def is_sharded(x):
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # a second of every start, were it at the top

    return isinstance(x, DTensor)


def whole(x):
    return x.full_tensor() if is_sharded(x) else x


def to_save(x):
    """A tensor as it is, or the whole of a sharded one in rank 0's memory."""
    found = whole(x)
    return x if found is x else found.cpu() if rank() == 0 else None


def cut_like(x, p):
    """The part of a whole tensor that belongs to this rank, if p is sharded."""
    if is_sharded(p):
        from torch.distributed.tensor import distribute_tensor

        x = distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    return x


class WeightedMean:
    """sum(weight * metric) / sum(weight), over micro-batches and ranks: with ragged masks a mean
    of means is another number. Sums stay on their device; `result` waits for it, once."""

    def __init__(self):
        self.weight, self.sums = 0.0, {}

    def add(self, metrics, weight):
        self.weight += weight
        for name, x in metrics.items():
            x = torch.as_tensor(x).detach()
            exact = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
            self.sums[name] = self.sums.get(name, 0.0) + weight * exact

    def add_beside(self, metrics):
        """Metrics of all that was added so far."""
        weight, self.weight = self.weight, 0.0
        self.add(metrics, weight)

    def result(self):
        if not self.sums:
            return {}
        sums = torch.stack(list(self.sums.values()))
        sums = torch.cat([sums.new_tensor([self.weight]), sums])
        if world_size() > 1:
            dist.all_reduce(sums)
        weight, *sums = sums.tolist()
        return {name: x / max(weight, 1e-8) for name, x in zip(self.sums, sums)}
