"""The CTC loss and its gradient with respect to the logits, against optax's and PyTorch's own.

    python benchmarks/ctc.py                     # three shapes
    python benchmarks/ctc.py --quick             # the smallest, few rounds, writes nothing

Every rival gets the same float32 logits, labels and lengths, and returns the losses and, where its name says so, the
gradient of their sum. ``error`` is the largest difference from float64, over the largest number: of the gradient, or of
the losses where there is none. PyTorch's is its own loss, not cuDNN's, after ``log_softmax``, on a CPU with as many
threads as there are cores, and with logits that lie in the order that it wants (frames first). ``memory MB`` is what
the compiled program asks for beside its arguments and results. nnlearn's kernel in C, where it runs, takes 16 bytes
more for each frame and label of an example in each thread: of the first shape half a megabyte.
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
DIFFERENT = 1e-2  # no error of rounding is as large
HEADINGS = ("rival", "ms", "quartiles", f"/ {GRADIENT}", "error", "compile s", "memory MB")


class Problem(NamedTuple):
    logits: np.ndarray
    logit_paddings: np.ndarray
    labels: np.ndarray
    label_paddings: np.ndarray


def make_problem(shape: tuple[int, ...]) -> Problem:
    """Sequences of three quarters of the frames, and of the labels, upwards."""
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
        self.result = None

    def run(self, calls: int) -> None:
        functional = self.torch.nn.functional
        for _ in range(calls):
            self.logits_tbk.grad = None
            losses = functional.ctc_loss(
                functional.log_softmax(self.logits_tbk, -1),
                self.labels,
                self.frame_counts,
                self.label_counts,
                reduction="none",
            )
            losses.sum().backward()
        self.wait()
        self.result = losses.detach().cpu().numpy(), self.logits_tbk.grad.cpu().numpy().swapaxes(0, 1)


def with_gradient(loss: Any) -> Any:
    def losses_and_gradient(logits, *others):
        losses, pull_back = jax.vjp(lambda x: loss(x, *others), logits)
        return losses, pull_back(jnp.ones_like(losses))[0]

    return losses_and_gradient


def make_rivals(problem: Problem) -> dict[str, Any]:
    arrays = tuple(map(jnp.asarray, problem))  # once: no call may pay for bringing them to the device
    return {
        LOSS: Compiled(lambda *inputs: (ctc_loss(*inputs), None), *arrays),
        GRADIENT: Compiled(with_gradient(ctc_loss), *arrays),
        OPTAX_LOSS: Compiled(lambda *inputs: (optax.ctc_loss(*inputs), None), *arrays),
        OPTAX_GRADIENT: Compiled(with_gradient(optax.ctc_loss), *arrays),
        TORCH: Torch(problem),
    }


def errors(rivals: dict[str, Any], problem: Problem) -> dict[str, float]:
    """Of each rival's last result, against ours in float64."""
    with jax.enable_x64(True):
        inputs = problem._replace(logits=problem.logits.astype(np.float64))
        exact = [np.asarray(one) for one in jax.jit(with_gradient(ctc_loss))(*inputs)]
    found = {}
    for name, rival in rivals.items():
        place = 0 if rival.result[1] is None else 1
        result = np.asarray(rival.result[place], np.float64)
        found[name] = float(np.max(np.abs(result - exact[place])) / np.max(np.abs(exact[place])))
    return found


def measure(shape: tuple[int, ...], rounds: int) -> tuple[list[dict], list[dict]]:
    """One shape: a row for each rival, and everyone's time over that of our loss and gradient."""
    problem = make_problem(shape)
    rivals = make_rivals(problem)
    seconds, calls = race(rivals, rounds=rounds)
    wrong = errors(rivals, problem)
    if not max(wrong.values()) < DIFFERENT:
        print(f"  NOT THE SAME LOSSES: {wrong}", flush=True)
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
