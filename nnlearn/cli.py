"""The console command: ``nnlearn compare``, ``diagnose``, ``launch``, ``learn``, ``versions``, and ``--version``."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the words after ``nnlearn``; None for those of the process.

    Returns:
      The exit status: 0 for success, 1 if a diagnosis found something, or a package is missing or cannot be fetched, 2
      for an invalid argument, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"nnlearn {version('nnlearn')}")
        return 0
    if words[:1] == ["launch"]:  # words after the script are the script's, whatever they look like
        from nnlearn.distributed.launch import command_line

        return command_line(words[1:])
    from json import dumps as to_json

    import tyro

    from nnlearn import compare
    from nnlearn.compare.summary import describe_machine
    from nnlearn.diagnose import command
    from nnlearn.distributed.launch import command_line
    from nnlearn.tasks import learn

    app = tyro.extras.SubcommandApp()

    @app.command(name="compare")
    def compare_command(comparison: tyro.conf.OmitArgPrefixes[compare.CompareOptions]) -> None:
        """Train a small network with several optimizers of nnlearn and optax, and compare them."""
        compare.compare(comparison)

    @app.command(name="diagnose")
    def diagnose_command(options: tyro.conf.OmitArgPrefixes[command.DiagnoseOptions]) -> int:
        """Find out why a run does not learn. The exit status is 1 if something was found."""
        return command.diagnose_run(options)

    @app.command(name="launch")
    def launch_command(words: tyro.conf.Positional[tuple[str, ...]]) -> int:
        """Run a script in several processes on this host: nnlearn launch --processes 4 script.py ..."""
        return command_line(words)

    @app.command(name="learn")
    def learn_command(training: tyro.conf.OmitArgPrefixes[learn.LearnOptions]) -> None:
        """Train on a task with real or synthetic data: images, text, speech, tables, graphs."""
        learn.learn(training)

    @app.command(name="versions")
    def versions_command(json: bool = False) -> None:
        """Print hardware and versions for a bug report.

        Args:
          json: Print one JSON object.
        """
        machine = describe_machine()
        print(to_json(machine) if json else "\n".join(f"{name}: {value}" for name, value in machine.items()))

    try:
        status = app.cli(prog="nnlearn", args=words)
    except KeyboardInterrupt:
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(f"nnlearn: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return status or 0


def run() -> None:
    """Run ``main`` and exit with its status."""
    status = main()
    if status == 130:  # XLA's threads may still run a program: finalising the interpreter meanwhile can crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
