"""Work for processes that a test starts, each way of starting them: a sum over rows on three threads."""

import torch

import attnshape

G = torch.Generator().manual_seed(0)
X = torch.rand(64, 8192, generator=G)
MASK = torch.ones_like(X)


def total(_: object = None) -> float:
    torch.set_num_threads(3)
    # numpy sums: PyTorch's own threads do not outlive a fork, and its sum would wait for them
    return float(attnshape.gae(X, X, MASK).advantages.numpy().sum())
