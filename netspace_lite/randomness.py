"""Random numbers that follow a seed and leave everyone else's alone."""

import random
from contextlib import ExitStack, contextmanager
from threading import RLock

import numpy as np
import torch

ALONE = RLock()


@contextmanager
def own_draws(seed: int | None = None, devices=()):
    """Within, PyTorch's random numbers follow ``seed``; afterwards they go on as if nothing was.

    Those of the CPU, and of GPUs in ``devices``. One thread at a time: generators, and what traces
    a module, are those of the whole process.
    """
    with ALONE, torch.random.fork_rng(devices):
        if seed is not None:  # not by torch.manual_seed, which queues a call for GPUs: slow
            torch.default_generator.manual_seed(seed % 2**63)
            if devices:
                torch.cuda.manual_seed(seed % 2**63)
        yield


@contextmanager
def own_randomness(seed: int | None = None, devices=()):
    """`own_draws` of NumPy and Python as well, which takes 0.2 ms."""
    with own_draws(seed, devices), ExitStack() as afterwards:
        afterwards.callback(random.setstate, random.getstate())
        afterwards.callback(np.random.set_state, np.random.get_state())
        if seed is not None:
            follow(seed)
        yield


def follow(seed: int) -> None:
    """Let the random numbers of PyTorch on the CPU, NumPy and Python start from ``seed``.

    Raises ValueError where PyTorch makes tensors elsewhere unless told: those draws would not.
    """
    if (there := torch.get_default_device()).type != "cpu":
        why = f"numbers are drawn on the CPU, and torch.set_default_device is {there}"
        raise ValueError(f"{why}: leave it at 'cpu', and move your data, as data.to('{there}')")
    torch.default_generator.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def drawn() -> tuple:
    """Where the random numbers of PyTorch on the CPU, NumPy and Python are."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
