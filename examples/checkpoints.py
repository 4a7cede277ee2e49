"""Train, be killed, resume, compare the bits, and start another model from the checkpoint.

A child process trains a network on the handwritten digits and saves it every 100 steps. SIGKILL ends it in the middle.
The same call resumes the run, and its parameters and trace are those of a run that nothing has interrupted, to the bit.
Then the hidden layer starts a network for another task, which tells digits below 5 from the others. This prints::

    killed after its first checkpoint and before its last
    resumed: 2000 steps, bits equal to those of the whole run: True
    loaded (2): hidden/0/bias, hidden/0/kernel
    does not fit (2): output/bias: saved float32[10], wanted float32[2], output/kernel: saved float32[32, 10]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import nnlearn
from nnlearn.checkpoints import Checkpoints
from nnlearn.datasets import load
from nnlearn.losses import cross_entropy
from nnlearn.models import mlp

DIGITS = load("digits")
MODEL = mlp((64, 32, 10))
STEPS, EVERY = 2000, 100
PREFIX = "run/state/stored/"  # the parameters in the checkpoint of a run, see Checkpoints.load without like


def loss_fn(params, batch, key):
    """Mean cross-entropy of a batch."""
    return cross_entropy(MODEL.apply(params, batch.inputs, key), batch.targets)


RUN = nnlearn.make_train(
    loss_fn,
    nnlearn.adamw,
    nnlearn.shuffled(DIGITS.train, 64, remainder="drop"),
    MODEL.init(jax.random.key(0)),
    steps=STEPS,
    check_every=EVERY,
)


def train(folder):
    """Train, or resume what is in the folder."""
    with Checkpoints(folder, every_steps=EVERY) as checkpoints:
        return nnlearn.run(RUN, 1e-3, 0, checkpoints=checkpoints, progress=False)


def train_and_be_killed(folder):
    """Train in another process, and kill it once it has saved; returns the newest step that it leaves."""
    child = subprocess.Popen([sys.executable, __file__, str(folder)])
    saved = Checkpoints(folder, read_only=True)
    while not saved.steps() and child.poll() is None:
        time.sleep(0.01)
    child.kill()  # SIGKILL: it cannot be caught
    child.wait()
    return saved.latest()


def equal_bits(one, other):
    """Whether all leaves of two trees are equal to the bit."""
    content = [[jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return content[0] == content[1]


def saved_params(name):
    """The path of a saved leaf in the parameters; None for what is not a parameter."""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def warm_start(folder):
    """The parameters of a network with 2 outputs, whose hidden layer is the saved one."""
    params = mlp((64, 32, 2)).init(jax.random.key(1))
    return Checkpoints(folder, read_only=True).load(params, rename=saved_params, missing="keep", report=print)


def main():
    """Returns the step at which the run was killed, whether all bits are equal, and the parameters of the new model."""
    with tempfile.TemporaryDirectory() as scratch:
        killed_at = train_and_be_killed(Path(scratch) / "run")
        assert 0 < killed_at < STEPS
        print("killed after its first checkpoint and before its last")
        resumed, whole = train(Path(scratch) / "run"), train(Path(scratch) / "whole")
        same = equal_bits((resumed.state.params, resumed.trace), (whole.state.params, whole.trace))
        print(f"resumed: {resumed.state.step} steps, bits equal to those of the whole run: {same}")
        return killed_at, same, warm_start(Path(scratch) / "run")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1])
    else:
        main()
