"""The recipes in torch, in the style of torch's documentation, with ``foreach=True`` and with ``fused=True``.

They run on the same device as jax, the CPU's cores or the GPU.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import cores, on_cpu
from recipes import DECAY, RATE, WARMUP

torch.set_num_threads(cores())
DEVICE = "cpu" if on_cpu() else "cuda"


def runs_here() -> bool:
    return DEVICE == "cpu" or torch.cuda.is_available()


def wait() -> None:
    """Wait for the GPU, if there is one: torch returns before its operations have finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class TorchRival:
    """A torch optimizer with given gradients; the clipped recipe clips and advances a schedule at every step.

    Clipping changes the gradients in place, so every rival has its own copy.
    """

    def __init__(self, make: Callable[..., Any], clipped: bool, params: dict, grads: dict, **how: bool):
        self.params = [torch.from_numpy(np.array(leaf)).to(DEVICE) for leaf in params.values()]
        for param, grad in zip(self.params, grads.values(), strict=True):
            param.grad = torch.from_numpy(np.array(grad)).to(DEVICE)
        self.optimizer, self.clipped, self.compile = make(self.params, lr=RATE, **how), clipped, None
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _relative_rate) if clipped else None

    def run(self, calls: int) -> None:
        for _ in range(calls):
            if self.clipped:
                torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
            self.optimizer.step()
            if self.schedule:
                self.schedule.step()
        wait()


def _relative_rate(step: int) -> float:
    if step < WARMUP:
        return step / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / (DECAY - WARMUP))))


def _sgd(params: list, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, **how)


def _adamw(params: list, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, weight_decay=1e-4, **how)


MAKERS = {"sgd-momentum": (_sgd, False), "adamw": (_adamw, False), "clip+adamw+schedule": (_adamw, True)}


def torch_rivals(recipe: str, params: dict, grads: dict) -> dict[str, Callable[[], TorchRival]]:
    """The two torch rivals of a recipe; none for Lion, which torch lacks."""
    if recipe not in MAKERS:
        return {}
    make, clipped = MAKERS[recipe]
    return {
        "torch foreach": lambda: TorchRival(make, clipped, params, grads, foreach=True),
        "torch fused": lambda: TorchRival(make, clipped, params, grads, fused=True),
    }
