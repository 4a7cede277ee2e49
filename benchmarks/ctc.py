"""The CTC loss and its gradient with respect to the logits, compared with optax and PyTorch.

    python benchmarks/ctc.py                     # three shapes
    python benchmarks/ctc.py --quick             # the smallest, few rounds, writes nothing

Every rival receives the same float32 logits, labels and lengths. It returns the losses and, if its name says so, the
gradient of their sum. ``error`` is the largest difference from float64 relative to the largest value, of the gradient
or else of the losses. PyTorch runs its own loss, not cuDNN's, after ``log_softmax``, on a CPU with one thread per core,
and with logits in its native order (frames first). ``memory MB`` is the scratch memory of the compiled program, without
arguments and results. nnlearn's C kernel, where it is used, takes another 16 bytes for each frame and label of an
example in each thread, which is half a megabyte for the first shape.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Compiled, Report, argument_parser, race, ratios_to, show, summarize

from nnlearn.losses.ctc import ctc_loss

SHAPES = ((8, 512, 1024, 64), (16, 256, 32, 48), (32, 128, 512, 32))  # examples, frames, classes, labels
LOSS, GRADIENT = "nnlearn loss", "nnlearn loss + gradient"
OPTAX_LOSS, OPTAX_GRADIENT, TORCH = "optax loss", "optax loss + gradient", "torch loss + gradient"
DIFFERENT = 1e-2  # rounding errors are far smaller
HEADINGS = ("rival", "ms", "quartiles", f"/ {GRADIENT}", "error", "compile s", "memory MB")


class Problem(NamedTuple):
    logits: np.ndarray
    logit_paddings: np.ndarray
    labels: np.ndarray
    label_paddings: np.ndarray


def make_problem(shape: tuple[int, ...]) -> Problem:
    """Random sequences with three quarters to all of the frames, and of the labels."""
    batch, frames, classes, labels = shape
    rng = np.random.default_rng(0)
    frame_counts = rng.integers(frames * 3 // 4, frames + 1, (batch, 1))
    label_counts = rng.integers(labels * 3 // 4, labels + 1, (batch, 1))
    return Problem(
        rng.normal(size=(batch, frames, classes)).astype(np.float32),
        (np.arange(frames) >= frame_counts).astype(np.float32),
        rng.integers(1, classes, (batch, labels)).astype(np.int32),
        (np.arange(labels) >= label_counts).astype(np.float32),
    )


class Torch:
    """PyTorch's loss and gradient."""

    compile = None

    def __init__(self, problem: Problem):
        import torch
        from torch_rivals import DEVICE, wait

        self.torch, self.wait = torch, wait
        self.logits_tbk = torch.tensor(problem.logits.swapaxes(0, 1).copy(), device=DEVICE, requires_grad=True)
        self.labels = torch.tensor(problem.labels, dtype=torch.int64, device=DEVICE)
        self.frame_counts = torch.tensor((problem.logit_paddings == 0).sum(1), device=DEVICE)
        self.label_counts = torch.tensor((problem.label_paddings == 0).sum(1), device=DEVICE)
        self.losses: Any = None
        self.result: Any = None

    def run(self, calls: int) -> None:
        functional = self.torch.nn.functional
        for _ in range(calls):
            self.logits_tbk.grad = None
            self.losses = functional.ctc_loss(
                functional.log_softmax(self.logits_tbk, -1),
                self.labels,
                self.frame_counts,
                self.label_counts,
                reduction="none",
            )
            self.losses.sum().backward()
        self.wait()
        grad: Any = self.logits_tbk.grad
        self.result = self.losses.detach().cpu().numpy(), grad.cpu().numpy().swapaxes(0, 1)


def with_gradient(loss: Any) -> Any:
    def losses_and_gradient(logits, *others):
        losses, pull_back = jax.vjp(lambda x: loss(x, *others), logits)
        return losses, pull_back(jnp.ones_like(losses))[0]

    return losses_and_gradient


def make_rivals(problem: Problem) -> dict[str, Any]:
    arrays = tuple(map(jnp.asarray, problem))  # once, so that no call includes the transfer to the device
    return {
        LOSS: Compiled(lambda *inputs: (ctc_loss(*inputs), None), *arrays),
        GRADIENT: Compiled(with_gradient(ctc_loss), *arrays),
        OPTAX_LOSS: Compiled(lambda *inputs: (optax.ctc_loss(*inputs), None), *arrays),
        OPTAX_GRADIENT: Compiled(with_gradient(optax.ctc_loss), *arrays),
        TORCH: Torch(problem),
    }


def errors(rivals: dict[str, Any], problem: Problem) -> dict[str, float]:
    """The error of each rival's last result, relative to nnlearn's in float64."""
    with jax.enable_x64(True):
        inputs = problem._replace(logits=problem.logits.astype(np.float64))
        exact = [np.asarray(one) for one in jax.jit(with_gradient(ctc_loss))(*inputs)]
    found = {}
    for name, rival in rivals.items():
        index = 0 if rival.result[1] is None else 1
        result = np.asarray(rival.result[index], np.float64)
        found[name] = float(np.max(np.abs(result - exact[index])) / np.max(np.abs(exact[index])))
    return found


def measure(shape: tuple[int, ...], rounds: int) -> tuple[list[dict], list[dict]]:
    """For one shape, a row for each rival, and the ratio of its time to that of nnlearn's loss and gradient."""
    problem = make_problem(shape)
    rivals = make_rivals(problem)
    seconds, calls = race(rivals, rounds=rounds)
    wrong = errors(rivals, problem)
    if not max(wrong.values()) < DIFFERENT:
        print(f"  DIFFERENT LOSSES: {wrong}", flush=True)
    head = {"shape": list(shape), "calls": calls}
    rows = [
        head | {"rival": name, **summarize(seconds[name]), "error": wrong[name], "compile": rival.compile}
        for name, rival in rivals.items()
    ]
    ratios = ratios_to(seconds, GRADIENT, rivals) | ratios_to(seconds, LOSS, [GRADIENT, OPTAX_LOSS])
    return rows, [head | {"ratios": ratios}]


def print_rows(rows: list[dict], ratios: dict) -> None:
    def cells(row):
        to_ours, compiling = ratios.get(f"{row['rival']} / {GRADIENT}"), row["compile"]
        return (
            row["rival"],
            f"{row['median_ms']:.2f}",
            "{:.2f}-{:.2f}".format(*row["quartiles_ms"]),
            f"{to_ours['median']:.2f}" if to_ours else "",
            f"{row['error']:.0e}",
            f"{compiling['total_seconds']:.2f}" if compiling else "",
            f"{compiling['temp_bytes'] / 1e6:.2f}" if compiling else "",
        )

    show("{} examples, {} frames, {} classes, {} labels".format(*rows[0]["shape"]), HEADINGS, map(cells, rows))
    print(f"{GRADIENT} / {LOSS}: {ratios[f'{GRADIENT} / {LOSS}']['median']:.2f}", flush=True)


def main() -> None:
    options = argument_parser(__doc__, "ctc").parse_args()
    rounds = options.rounds or (5 if options.quick else 40)
    report = Report(options)
    for shape in SHAPES[-1:] if options.quick else SHAPES:
        rows, ratios = measure(shape, rounds)
        report.add(rows, ratios)
        print_rows(rows, ratios[0]["ratios"])
    report.close()


if __name__ == "__main__":
    main()
