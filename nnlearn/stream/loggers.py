"""Callbacks that send the records of a run to logging tools, which are imported on use."""

from pathlib import Path
from typing import Any

from nnlearn.extras import import_extra
from nnlearn.stream.callbacks import Callback, Event


def tensorboard(folder: str | Path) -> Callback:
    """A callback for ``fit`` that writes every row for TensorBoard.

    Args:
      folder: where to write; use one folder per run.

    Raises:
      ImportError: if tensorboardX is not installed.

    >>> fit(step, state, batches, callbacks=tensorboard("runs/first"))  # doctest: +SKIP
    """
    tensorboard_x = import_extra("tensorboardX", "tensorboard", "tensorboard")
    writer = None

    def callback(event: Event) -> None:
        nonlocal writer
        if writer is None:
            writer = tensorboard_x.SummaryWriter(str(folder))
        for row in event.rows:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])
        writer.flush()
        if event.final:
            writer.close()
            writer = None  # another run with this callback begins a new file in the folder

    return callback


def wandb_offline(project: str, folder: str | Path | None = None, **settings: Any) -> Callback:
    """A callback for ``fit`` that logs every row to local files of Weights & Biases, to be synchronised later.

    Args:
      project: name of the project.
      folder: where to write; None for the working folder.
      **settings: arguments of ``wandb.init``, such as ``name`` and ``config``.

    Returns:
      A callback for ``fit``.

    Raises:
      ImportError: if wandb is not installed.

    >>> fit(step, state, batches, callbacks=wandb_offline(project="digits"))  # doctest: +SKIP
    """
    wandb = import_extra("wandb", "wandb_offline", "wandb")
    run = None

    def callback(event: Event) -> None:
        nonlocal run
        if run is None:
            folder_name = None if folder is None else str(folder)
            run = wandb.init(project=project, dir=folder_name, mode="offline", **settings)
        for row in event.rows:
            run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        if event.final:
            run.finish()
            run = None

    return callback


__all__ = ["tensorboard", "wandb_offline"]
