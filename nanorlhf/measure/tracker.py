"""Count the memory of tensors that have sizes but no contents.

On the device "meta" every operation of PyTorch computes shapes and nothing else, so a model of
any size runs in no memory; `Tracker` sees each operation's result and adds up the bytes.
"""

import weakref
from bisect import bisect_left, insort

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanorlhf.machine.process import KEPT_BELOW

aten, CPU, META = torch.ops.aten, torch.device("cpu"), torch.device("meta")

# Buffers as large as the first argument that a kernel takes and gives back: no mode sees them
SCRATCH = {aten.logsumexp.default}


SUMS, PUTS = {aten.add.Tensor}, {aten.index_put.default, aten._unsafe_index_put.default}
VIEWS = {aten._unsafe_view.default}  # that do not say so


class Sizes(tuple):
    """Shape, strides and dtype: all there is to a tensor without contents."""


def sizes_of(x):
    if isinstance(x, torch.Tensor):
        return Sizes((x.shape, x.stride(), x.dtype))
    return tuple(map(sizes_of, x)) if isinstance(x, (tuple, list)) else x


def without_contents(x):
    if isinstance(x, Sizes):
        return torch.empty_strided(x[0], x[1], dtype=x[2], device="meta")
    return tuple(map(without_contents, x)) if isinstance(x, tuple) else x


class Heap:
    """The smaller blocks of a process on a CPU (malloc hands the larger ones back, see
    `process.kept_below`): a block goes into the smallest hole that holds it, else on top, and
    nothing is handed back.

    Holes side by side do not become one. glibc would join them, were there not often something
    small between two tensors that outlives both. It is a model, and the rough part of a prediction.
    """

    LIBRARY = 24 * 2**20  # of PyTorch itself, read into memory by the first step (15 to 30 MB)

    def __init__(self):
        self.top, self.holes = self.LIBRARY, []  # holes: (size, start), by size

    def take(self, size):
        i = bisect_left(self.holes, (size,))
        if i == len(self.holes):
            self.top += size
            return self.top - size
        room, start = self.holes.pop(i)
        if room > size:
            insort(self.holes, (room - size, start + size))
        return start

    def give(self, start, size):
        if start + size == self.top:
            self.top = start
        else:
            insort(self.holes, (size, start))


class Tracker(TorchDispatchMode):
    """`live` bytes now; `fixed`, those between steps, is set by whoever runs under it; `peaks`:
    phase -> the most held in it. `heap`: with holes, as a CPU's process holds them; otherwise the
    tensors alone, as torch.cuda.max_memory_allocated counts.

    Contents are unknown: a mask is taken to be True in the share `chosen` of its positions, and
    whoever looks at a number (`float(x)`, `if x:`) is told whether that is less than all.
    """

    known = {}  # call -> sizes of its results

    def __init__(self, heap, kept=KEPT_BELOW):
        super().__init__()
        self.kept = kept  # blocks of so many bytes and more are handed back when they are freed
        self.heap, self.live, self.peaks, self.phase = heap and Heap(), 0, {}, "start"
        self.apart = 0  # bytes of blocks outside the heap: on a CPU the largest, on a GPU all
        self.chosen, self.blocks = 1.0, {}  # blocks: storage -> where it lies and its size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        where = (kwargs or {}).get("device", getattr(next(tensors, None), "device", META))
        if where == CPU and func is not aten._to_copy.default:
            return func(*args, **(kwargs or {}))  # lengths and weights have contents
        in_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
        if func is aten._local_scalar_dense.default:
            return self.chosen < 1
        if func is aten._to_copy.default and (kwargs or {}).get("device") == CPU:
            return torch.zeros_like(args[0], device=CPU)  # x.tolist()
        if func is aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            (mask,) = args[1]
            n = round(mask.numel() * self.chosen)
            out = args[0].new_empty((n, *args[0].shape[mask.dim() :]))
        elif in_backward and (func in PUTS or func in SUMS and args[0].shape == args[1].shape):
            out = args[0]  # autograd adds up gradients in place, but not where a mode watches
        else:
            out = self.run(func, args, kwargs or {})
        if func in SCRATCH:
            self.scratch(args[0].nbytes)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return out

    def run(self, func, args, kwargs):
        """What func returns. PyTorch computes a shape in a millisecond; blocks are alike, so each
        distinct call is made once, and what works in place has nothing to do."""
        if func.namespace != "aten" or torch.Tag.inplace_view in func.tags or func in VIEWS:
            return func(*args, **kwargs)
        if func._schema.name.endswith("_"):
            return args[0] if func._schema.returns else None
        if any(argument.alias_info for argument in func._schema.arguments):
            return func(*args, **kwargs)
        key = (func, sizes_of(args), sizes_of(tuple(kwargs.items())))
        if key not in self.known:
            out = func(*args, **kwargs)
            self.known[key] = sizes_of(out)
            return out
        return without_contents(self.known[key])

    def count(self, storage):
        key = storage._cdata
        if key not in self.blocks:
            self.blocks[key] = self.take(storage.nbytes())
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.give(*self.blocks.pop(key))

    def scratch(self, size):
        self.give(*self.take(size))

    def take(self, size):
        grain = 64 if self.heap else 512  # bytes that the allocator rounds up to
        size = -(-size // grain) * grain
        in_heap = self.heap and size < self.kept
        start = self.heap.take(size) if in_heap else 0
        self.live += size
        self.apart += 0 if in_heap else size
        held = self.apart + (self.heap.top if self.heap else 0)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), held)
        return start, size

    def give(self, start, size):
        self.live -= size
        if self.heap and size < self.kept:
            self.heap.give(start, size)
        else:
            self.apart -= size
