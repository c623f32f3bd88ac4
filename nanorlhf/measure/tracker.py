"""Count the memory of tensors that have sizes but no contents.

On the device "meta" an operation of PyTorch computes the shape of its result and nothing else, so
a model of any size runs in no memory. `Tracker` sees each result and adds up the bytes that it
would take.
"""

import weakref
from bisect import bisect_left, insort

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, CPU, META = torch.ops.aten, torch.device("cpu"), torch.device("meta")

# these kernels allocate a buffer as large as their first argument and free it before they return;
# the tracker would not see it
SCRATCH = {aten.logsumexp.default}

SUMS = {aten.add.Tensor}
PUTS = {aten.index_put.default, aten._unsafe_index_put.default}
VIEWS = {aten._unsafe_view.default}  # returns a view, although its schema does not say so


class Sizes(tuple):
    """(shape, strides, dtype): all that there is to a tensor without contents."""


def sizes_of(x):
    """x, in which every tensor is replaced by its Sizes and every list by a tuple."""
    if isinstance(x, torch.Tensor):
        return Sizes((x.shape, x.stride(), x.dtype))
    return tuple(map(sizes_of, x)) if isinstance(x, (tuple, list)) else x


def without_contents(x):
    """The inverse of `sizes_of`, lists apart."""
    if isinstance(x, Sizes):
        return torch.empty_strided(x[0], x[1], dtype=x[2], device="meta")
    return tuple(map(without_contents, x)) if isinstance(x, tuple) else x


class Heap:
    """A CPU process's blocks below `process.kept_below` bytes. malloc keeps these when they are
    freed, and hands larger ones back to the system.

    A block goes into the smallest hole that holds it, or on top if none does. A freed block leaves
    a hole, and two holes side by side stay two. glibc would join them, but often something small
    lies between two tensors and outlives both. This is a model of malloc, and the roughest part of
    a prediction.
    """

    LIBRARY = 24 * 2**20  # bytes of PyTorch's own code that the first step loads (15 to 30 MB)

    def __init__(self):
        self.top = self.LIBRARY
        self.holes = []  # (size, start), the smallest first

    def take(self, size):
        """The address of a new block."""
        i = bisect_left(self.holes, (size,))
        if i == len(self.holes):
            self.top += size
            return self.top - size
        room, start = self.holes.pop(i)
        if room > size:
            insort(self.holes, (room - size, start + size))
        return start

    def give(self, start, size):
        """Free a block."""
        if start + size == self.top:
            self.top = start
        else:
            insort(self.holes, (size, start))


class Tracker(TorchDispatchMode):
    """Under this mode `live` is the number of bytes that tensors take now, and `peaks` has the most
    that was held in each `phase`. Whoever runs under it sets `phase`, and also `fixed`: the bytes
    that stay between steps.

    With `heap` the blocks lie in a Heap, whose holes count, as in a process on a CPU. Without it
    only tensors count, as in torch.cuda.max_memory_allocated.

    Contents are unknown. So a mask is taken to be True in the share `chosen` of its positions, and
    reading a number (`float(x)`, `if x:`) gives True if that is less than all, else False.
    """

    known = {}  # call -> Sizes of its results

    def __init__(self, heap, kept=2**25):
        super().__init__()
        self.heap = Heap() if heap else None
        self.kept = kept  # bytes: a block of this size or more does not go into the heap
        self.live, self.peaks, self.phase = 0, {}, "start"
        self.apart = 0  # bytes of blocks outside the heap: on a CPU the largest, on a GPU all
        self.chosen = 1.0
        self.blocks = {}  # storage -> (start, size)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = (x for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        device = kwargs.get("device", getattr(next(tensors, None), "device", META))
        if device == CPU and func is not aten._to_copy.default:
            return func(*args, **kwargs)  # lengths and weights have contents
        if func is aten._local_scalar_dense.default:
            return self.chosen < 1
        if func is aten._to_copy.default and kwargs.get("device") == CPU:
            return torch.zeros_like(args[0], device=CPU)  # x.tolist()
        in_backward = torch._C._current_graph_task_id() >= 0 and not torch.is_grad_enabled()
        if func is aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            (mask,) = args[1]
            n_true = round(mask.numel() * self.chosen)
            out = args[0].new_empty((n_true, *args[0].shape[mask.dim() :]))
        elif in_backward and (func in PUTS or func in SUMS and args[0].shape == args[1].shape):
            out = args[0]  # autograd adds gradients up in place, except under a mode such as this
        else:
            out = self.result(func, args, kwargs)
        if func in SCRATCH:
            self.give(*self.take(args[0].nbytes))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return out

    def result(self, func, args, kwargs):
        """What func returns. PyTorch needs a millisecond to compute a shape, and the blocks of a
        model make the same calls, so the Sizes of each call's results are remembered. Views are
        always made, as they share their argument's storage. An operation that works in place has
        no contents to change: it returns its first argument."""
        if func.namespace != "aten" or torch.Tag.inplace_view in func.tags or func in VIEWS:
            return func(*args, **kwargs)
        if func._schema.name.endswith("_"):
            return args[0] if func._schema.returns else None
        if any(argument.alias_info for argument in func._schema.arguments):
            return func(*args, **kwargs)
        call = (func, sizes_of(args), sizes_of(tuple(kwargs.items())))
        if call not in self.known:
            out = func(*args, **kwargs)
            self.known[call] = sizes_of(out)
            return out
        return without_contents(self.known[call])

    def count(self, storage):
        """Count a storage, once and until it is freed; several tensors may share it."""
        key = storage._cdata
        if key not in self.blocks:
            self.blocks[key] = self.take(storage.nbytes())
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.give(*self.blocks.pop(key))

    def take(self, size):
        """(start, size) of a new block, its size rounded up as the allocator does."""
        grain = 64 if self.heap else 512
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
