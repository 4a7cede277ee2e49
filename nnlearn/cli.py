"""The console command: ``nnlearn compare``, ``nnlearn learn`` and ``nnlearn versions``."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the words after ``nnlearn``; None for those of the process.

    Returns:
      The exit status: 0 when all went well, 1 where a package is missing or cannot be fetched, 2 for a wrong argument,
      130 if interrupted.
    """
    import tyro

    from nnlearn import compare
    from nnlearn.compare.summary import describe_machine
    from nnlearn.tasks import learn

    app = tyro.extras.SubcommandApp()

    @app.command(name="compare")
    def compare_command(settings: tyro.conf.OmitArgPrefixes[compare.Settings]) -> None:
        """Train a small network with several optimizers, nnlearn's and optax's, and compare them."""
        compare.compare(settings)

    @app.command(name="learn")
    def learn_command(settings: tyro.conf.OmitArgPrefixes[learn.Settings]) -> None:
        """Train on a task with real data or a stand-in: images, text, speech, tables, graphs."""
        learn.learn(settings)

    @app.command(name="versions")
    def versions_command() -> None:
        """Print hardware and versions, for a report."""
        for name, value in describe_machine().items():
            print(f"{name}: {value}")

    try:
        app.cli(prog="nnlearn", args=arguments)
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(f"nnlearn: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def run() -> None:
    """``main`` as a process of its own."""
    status = main()
    if status == 130:  # a program may still run on XLA's threads: tearing the interpreter down under it can crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
