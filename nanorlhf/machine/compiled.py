"""--compile: the functions that most of a step is spent in, by torch.compile.

Not whole losses are compiled, but what they are made of: a block of the model, and what reads all
logits. All layers of all models share a block's code, so a run compiles a few functions and not
thirty layers, and with --shard a block's weights are gathered around it. docs/machines.md weighs
this.
"""

import shutil
from functools import cache, wraps

import torch

from nanorlhf.config import note

backend = ""  # torch.compile's; "": functions run as they are


def choose(is_on):
    """Compile `compiled` functions from now on, or do not. inductor writes kernels, for which it
    needs a C++ compiler. aot_eager goes the same way, but with PyTorch's own: no faster."""
    global backend
    backend = ""
    if is_on:
        from torch._dynamo import config  # here: it takes a second
        from torch._inductor.config import cpp
        from torch.fx.experimental import _config as shapes

        # what falls back to eager silently would cost all that --compile is for
        config.fail_on_recompile_limit_hit, config.recompile_limit = True, 32
        shapes.use_duck_shape = False  # two sizes that happen to be equal need not be so next time
        backend = "inductor" if shutil.which(cpp.cxx[1]) else "aot_eager"
        note(f"--compile: by {backend}; the first steps take longer")


def compiled(function):
    """A decorator: the function, which --compile compiles on its first call. Its sizes may change
    from call to call, but for those of weights: it is compiled for all lengths at once."""

    @wraps(function)
    def call(*args, **kwargs):
        return (by(backend, function) if backend else function)(*args, **kwargs)

    return call


@cache
def by(backend, function):
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
