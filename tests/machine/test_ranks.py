"""What is counted over micro-batches and ranks. (tests/test_parallel.py starts several ranks.)"""

import torch

from nanorlhf.machine.ranks import WeightedMean


def test_metrics_of_micro_batches_are_weighted():
    mean = WeightedMean()
    mean.add({"loss": 1.0}, 3)
    mean.add({"loss": torch.tensor(5.0)}, 1)
    assert mean.result() == {"loss": 2.0}
    assert WeightedMean().result() == {}
