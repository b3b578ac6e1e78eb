"""A training step's loss and gradients as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedLoss:
    """`loss_of_batch` and its backward pass, recorded once and replayed.

    A model as small as this one waits for the launches of its kernels, not for its arithmetic; a graph is launched as
    a whole. Random numbers are drawn anew in each replay, from the generator's seed at that time.
    """

    def __init__(self, loss_of_batch: Callable[[Tensor], Tensor], indices: Tensor):
        """Record it for batches like `indices` (n,); adds something to the gradients, which have to be zeroed."""
        self._indices = indices.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled, tuned or allocated once must not be recorded
            for _ in range(3):
                loss_of_batch(self._indices).backward()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = loss_of_batch(self._indices)
            self._loss.backward()

    def __call__(self, indices: Tensor) -> Tensor:
        """The loss of the samples `indices` (n,), whose gradients are added to those of the parameters."""
        self._indices.copy_(indices)
        self._graph.replay()
        return self._loss.detach().clone()
