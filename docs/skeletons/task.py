"""Skeleton of a new task: copy it to a file in ``nnlearn/tasks/`` and rename it. It runs without changes."""

import functools

import numpy as np

from nnlearn.data import Examples, split, standardize
from nnlearn.models import mlp
from nnlearn.tasks.objectives import regression
from nnlearn.tasks.task import Task, warmed_adamw


def skeleton(*, seed: int = 0, examples: int = 400, hidden: int = 16, epochs: int = 20) -> Task:
    """<One line: what is predicted from what>. Baseline: the mean.

    Args:
      seed: seed of the data and of the split.
      examples: number of examples, split 70 / 15 / 15.
      hidden: width of the hidden layer.
      epochs: passes over the training part.

    Returns:
      A ``Task``.

    >>> import jax
    >>> task = skeleton()
    >>> state, trace = jax.jit(task.make_train())(task.hparams, 0)
    >>> task.solved(task.evaluate(state.params))
    True
    """
    # 1. The data, in NumPy: split first, then compute means, scales and vocabularies from the training part alone.
    random = np.random.default_rng(seed)
    inputs = random.uniform(-1, 1, (examples, 2)).astype(np.float32)
    parts = split(Examples(inputs, np.sin(3 * inputs[:, :1]) * inputs[:, 1:]), seed=seed)
    inputs, _ = standardize(*(part.inputs for part in parts))
    train, validation, test = (Examples(x, part.targets) for x, part in zip(inputs, parts, strict=True))
    # 2. The model, its loss and its metrics, which are means over the valid examples of a ``MaskedBatch``.
    model = mlp((2, hidden, 1), activation="gelu")
    loss_fn, metrics_fn = regression(model)
    # 3. A target for the metric, the metrics of simple baselines, and settings that reach the target.
    batch_size = 20
    return Task(
        name="skeleton",
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=loss_fn,
        metrics_fn=metrics_fn,
        metric="absolute_error",
        mode="min",
        target=0.2,
        baselines={"mean": float(np.mean(np.abs(test.targets - np.mean(train.targets))))},
        make_tx=functools.partial(warmed_adamw, size=len(train.inputs), batch_size=batch_size, epochs=epochs),
        hparams={"learning_rate": 0.03, "weight_decay": 0.0},
        batch_size=batch_size,
        epochs=epochs,
        source="drawn at random",
        licence="none needed",
    )


# Register the name in ``TASKS`` of ``nnlearn/tasks/__init__.py``, for ``load_task`` and ``nnlearn learn``. Tests: a
# small version in ``SMALL`` of ``tests/test_tasks.py``. Save the output of ``nnlearn learn <name>`` in
# ``benchmarks/results/learn/``.
