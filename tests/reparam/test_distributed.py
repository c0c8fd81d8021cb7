"""Two processes train as one does on the same batches."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_training import small_vit, stripes

from reparam.convert import ReparamConfig, reparameterize_
from reparam.distributed import own_rows, place, row_weight, summed
from reparam.latency_curves import LayerCurves, ModelCurves
from reparam.losses import LatencyObjective
from reparam.moe import moe_layers
from reparam.recipe import Stage
from reparam.training import train

SETTINGS = Stage(epochs=2, batch_size=16, lr=3e-3, warmup_epochs=1, gradient_clip=1.0)


def objective(model) -> LatencyObjective:
    names = [fqn for fqn, _ in moe_layers(model)]
    tokens = torch.tensor([[0.0, 1, 5], [0.0, 1, 5]])
    latency_ms = torch.tensor([[0.0, 1, 4], [0.0, 1, 2]])
    return LatencyObjective(
        1.0, ModelCurves(dict.fromkeys(names, LayerCurves(tokens, latency_ms)), 0.0), budget_ms=2.2
    )


def train_moe(checkpoint) -> list[float]:
    """An MoE without what differs from row to row at random: noise and dropped paths."""
    model = small_vit()
    reparameterize_(model, ReparamConfig(mlp="moe"))
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = torch.nn.Identity()
    for _, layer in moe_layers(model):
        layer.router.draw_noise = torch.zeros_like
    history = train(
        model, stripes(), SETTINGS, stage="s", checkpoint=checkpoint, objective=objective(model)
    )
    return [figure for e in history for figure in (e.train_loss, e.latency_loss)]


def at_once(work: Callable[[int, int, Path], None], world: int, folder: Path) -> None:
    """``work(rank, world, folder)`` in as many processes, which must all end well.

    They fork one that has imported all and computed nothing: a fork of a process in which autograd
    has had threads cannot go backwards.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["reparam.stages"])
    torch.multiprocessing.start_processes(
        meet, (work, world, folder), nprocs=world, start_method="forkserver"
    )


def meet(rank, work, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    work(rank, world, folder)
    dist.destroy_process_group()


def in_process(rank, world, folder):
    x = torch.tensor([1.0 + rank], requires_grad=True)
    total = summed(x)
    total.backward()
    assert (total.item(), x.grad.item()) == (3.0, world)
    assert place().rank == rank
    losses = train_moe(folder / "two.safetensors" if rank == 0 else None)
    torch.save(torch.tensor(losses), folder / f"losses{rank}")


def test_two_processes_train_as_one(tmp_path):
    alone = torch.tensor(train_moe(tmp_path / "one.safetensors"))
    at_once(in_process, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"losses{rank}") for rank in (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(two[name], one[name], rtol=0.05, atol=5e-3, equal_nan=True)


def in_process_of_three(rank, world, folder):
    torch.save(torch.tensor(train_moe(None)), folder / f"losses{rank}")


def test_a_last_batch_of_fewer_rows_than_processes_is_left_out(tmp_path):
    """50 images in batches of 16: the third process would have none of the last two."""
    at_once(in_process_of_three, 3, tmp_path)
    losses = torch.stack([torch.load(tmp_path / f"losses{rank}") for rank in range(3)])
    assert losses.isfinite().all()
    assert (losses == losses[0]).all()


def test_alone_everything_is_itself():
    x = torch.arange(5.0)
    assert own_rows(x) is not None and torch.equal(own_rows(x), x)
    assert summed(x) is x
    assert row_weight(5) == 1
