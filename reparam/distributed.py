"""Several processes training one model: each takes its rows of a batch, sums are over all.

Under ``torchrun`` there are as many processes as it was asked for; without it, one, and every
function here gives back what it is given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reparam.fake_quantise import straight_through


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        rank: From 0; the first writes the files.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


def place() -> Place:
    """Which process this is; one of one outside of a process group."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place()


@contextmanager
def process_group(device: torch.device) -> Iterator[Place]:
    """Joins the processes that ``torchrun`` started, for as long as it is open.

    Args:
        device: Where they train: ``nccl`` connects GPUs, ``gloo`` CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def replicated(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over all processes in each backward pass.

    Which experts get tokens differs from batch to batch and from process to process, hence the
    search for unused parameters.
    """
    if place().world == 1:
        return model
    return DistributedDataParallel(model, find_unused_parameters=True)


def own_rows(x: Tensor) -> Tensor:
    """This process's rows of a batch that all processes have drawn alike."""
    here = place()
    return x[here.rank :: here.world]


def row_weight(batch_size: int) -> float:
    """What a mean over one's own rows counts, so that averaged gradients are those of the batch.

    Args:
        batch_size: Rows of the whole batch.
    """
    here = place()
    return len(range(here.rank, batch_size, here.world)) * here.world / batch_size


def summed(x: Tensor) -> Tensor:
    """Sum over all processes, with a gradient that is right once averaged over them."""
    here = place()
    if here.world == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return straight_through(here.world * x, total)


def wait_for_all() -> None:
    """Returns once every process has come here."""
    if place().world > 1:
        dist.barrier()
