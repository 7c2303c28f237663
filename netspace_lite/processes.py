"""Several processes that train one zoo or fit one space, as ``torchrun`` starts them.

Blocks of a zoo are independent, so each process trains some, and the zoo is the same bit for bit.
A fit draws every batch alike in all processes; each computes a share of its nets, and gradients are
averaged. In a single process nothing here does anything.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

WAIT = timedelta(days=30)  # for the slowest; a process that dies is noticed by torchrun


@contextmanager
def together():
    """Within, the processes that torchrun started work together: gloo on CPUs, nccl on GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # or a restart reads addresses of the dead
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    given = {"store": store, "rank": number, "world_size": size, "timeout": WAIT}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **given)
    yield
    dist.destroy_process_group()


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 saves and draws the progress bar."""
    return dist.get_rank() if world() > 1 else 0


def wait() -> None:
    """Go on once all processes are here."""
    if world() > 1:
        dist.barrier()


def portion(costs: Iterable[float]) -> list[int]:
    """The numbers of this process's jobs: each goes to whoever has least to do so far."""
    loads, mine = [0.0] * world(), []
    for number, cost in enumerate(costs):
        least = loads.index(min(loads))
        loads[least] += cost
        mine += [number] if least == rank() else []
    return mine


def share(n: Tensor) -> Tensor:
    """This process's part of nets n [N] that all processes drew alike, [N / world].

    All of n where N is no multiple of the world: the mean over processes of the mean loss of each
    is the mean over n either way.
    """
    return n[rank() :: world()] if len(n) % world() == 0 else n


@torch.no_grad()
def average(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The mean loss of all processes; gradients become their means. One message for all.

    A parameter without a gradient in any process keeps none, so that the optimiser leaves it alone;
    without one in some it counts as zero there.
    """
    if world() == 1:
        return loss
    loss, has = loss.reshape(()), loss.new_tensor([p.grad is not None for p in parameters])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss[None], has, *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    sizes = [1, len(has), *(p.numel() for p in parameters)]
    loss, has, *grads = (flat / world()).split(sizes)
    for p, some, grad in zip(parameters, has.tolist(), grads, strict=True):
        p.grad = grad.view_as(p).type_as(p) if some else None
    return loss[0]


def agreed(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers that process 0 found, in all of them."""
    if world() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.double)
    dist.broadcast(values, 0)
    return dict(zip(numbers, values.tolist(), strict=True))
