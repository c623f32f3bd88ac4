"""Several processes that train one model: `torchrun --nproc_per_node=N train_sft.py ...`.

Shapes: B rows of a global batch, b of a rank's share, T positions.

Every process, called a rank, builds the same global batch and takes its share of it. Gradients,
metrics and rollouts are put together again, so nothing but rounding depends on N. Rank 0 alone
prints and writes. Without torchrun there is one rank, and these functions leave all as it is.

DistributedDataParallel would average the gradients of each backward pass in the model's own dtype.
Where ranks hold unequal numbers of loss tokens, that is not the gradient of the mean loss; and in
bfloat16 it is less exact. So `add_gradients` runs one all-reduce per step instead, on the float32
sums of weight * gradient.
"""

import os
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanorlhf.config import die
from nanorlhf.machine.process import rank, world_size


def join(device):
    """Wait for the other processes; returns this one's own device. Then rank 0 alone prints."""
    if world_size() > 1 and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        # a long timeout: rank 0 may tokenize a corpus meanwhile, and torchrun notices a dead rank
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """End a run that went well. After a failure nobody calls this: it would wait for the other
    ranks, which wait for this one."""
    if world_size() > 1:
        dist.barrier()  # nobody closes connections that another rank still uses
        dist.destroy_process_group()
        # a thread of gloo that still wants Python's lock when the interpreter ends would abort the
        # process (seen rarely, on a busy machine); let it finish
        time.sleep(0.2)


def of_all(x):
    """[x of rank 0, x of rank 1, ...], of any small thing. Every rank must call this."""
    result = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(result, x)
    return result


def on_main(function):
    """Call function() on rank 0 alone. Every rank waits for it and gets what it returns."""
    return of_all(function() if rank() == 0 else None)[0]


def mine(batches):
    """This rank's share of some (micro-)batches, equally many on every rank, as sharded models need
    it. Where they run out, a batch of one row of weight 0 takes the place of one."""
    batches = list(batches)
    for _ in range(-len(batches) % world_size()):
        one_row = {name: x[:1] for name, x in batches[0].items()}
        batches.append(one_row | {"weight": torch.zeros(1)})
    return batches[rank() :: world_size()]


def rows(n):
    """Indices of this rank's share of n rows, equally many on every rank: where they run out, the
    last row comes again."""
    size = -(-n // world_size())
    return [min(i, n - 1) for i in range(rank() * size, (rank() + 1) * size)]


def gather(x, n):
    """All n rows of a tensor, of which each rank holds its own `rows(n)`: (b, ...) -> (n, ...)."""
    if world_size() == 1:
        return x
    shares = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(shares, x.contiguous())
    return torch.cat(shares)[:n]


def pad_alike(x, value):
    """Pad x (b, T) on the right with `value`, up to the largest T of any rank."""
    return F.pad(x, (0, max(of_all(x.shape[1])) - x.shape[1]), value=value)


def summed(x):
    """A tensor's sum over all ranks, in its place. Every rank must call this."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def add_gradients(parameters, weight):
    """Sum gradients over ranks, in place; returns what to divide them by. `weight` is the sum of
    the weights that this rank's gradients were multiplied by."""
    if world_size() == 1:
        return weight
    averaged = is_sharded(parameters[0])  # FSDP2 has done so in the backward pass
    total = torch.tensor(weight, dtype=torch.float64)
    grads = [] if averaged else [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(x, async_op=True) for x in (total, *grads)]:
        work.wait()
    return float(total) / (world_size() if averaged else 1)


def start_equal(model):
    """Give every rank the parameters of rank 0."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


def shard(model, units, dtype, device):
    """Shard a model with FSDP2: each of N ranks holds 1/N of every parameter, of its gradient and
    of AdamW's moments, in float32. `units` are submodules: the weights of one are gathered, in
    `dtype`, for as long as it computes."""
    if world_size() == 1:
        die("--shard splits a model over processes: start it with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model.float()
    # it warns of outputs that are views, as values are; only changing one in place would do harm
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    for module in (*units, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)
    return model


def unsharded(model, dtype):
    """A whole copy of a sharded model, in `dtype` and eval mode. The model's class must be one that
    is made from its `config` alone, as GPT is."""
    from torch.distributed.fsdp import FSDPModule

    # fully_shard made the model's class a subclass of its own class and FSDPModule
    own_class = next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):  # without weights, which come next
        copy = own_class(model.config)
    weights = {name: w.to(dtype).full_tensor() for name, w in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def is_sharded(x):
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # here, as this import takes a second

    return isinstance(x, DTensor)


def whole(x):
    return x.full_tensor() if is_sharded(x) else x


def to_save(x):
    """A tensor as it is. Of a sharded one rank 0 gets the whole, on the CPU, and the others None;
    every rank must call this."""
    if not is_sharded(x):
        return x
    x = whole(x)
    return x.cpu() if rank() == 0 else None


def cut_like(x, p):
    """The part of a whole tensor x that this rank holds, where p is sharded; else x."""
    if is_sharded(p):
        from torch.distributed.tensor import distribute_tensor

        x = distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    return x
