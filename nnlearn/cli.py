"""The console command: ``nnlearn compare``, ``nnlearn learn``, ``nnlearn versions``, ``nnlearn --version``."""

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
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"nnlearn {version('nnlearn')}")
        return 0
    from json import dumps as to_json

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
    def versions_command(json: bool = False) -> None:
        """Print hardware and versions, for a report.

        Args:
          json: Print one JSON object.
        """
        machine = describe_machine()
        print(to_json(machine) if json else "\n".join(f"{name}: {value}" for name, value in machine.items()))

    try:
        app.cli(prog="nnlearn", args=words)
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
