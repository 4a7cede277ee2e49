"""The console command: ``nnlearn compare``, ``learn``, ``sweep``, ``report`` and others, and ``nnlearn --version``."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command of the console.

    Attributes:
      module: where it is.
      function, options: its function, and the dataclass of its options.
      summary: what it does, one line.
      examples: commands that work.
    """

    module: str
    function: str
    options: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "compare": Command(
        "compare", "compare", "CompareOptions", "compare optimizers with optax's",
        ("compare", "compare --optimizers adamw muon", "compare my_module:train --learning-rates 0.01 0.1"),
    ),
    "learn": Command(
        "tasks.learn", "learn", "LearnOptions", "train on a task with real or synthetic data",
        ("learn mnist", "learn shakespeare --out run", "learn shakespeare --out run --resume"),
    ),
    "sweep": Command(
        "commands.sweep", "run_sweep", "SweepOptions", "train many settings and seeds as one program",
        ("sweep digits --space learning_rate=log:1e-4:1e-1 --seeds 3 --out sweep",
         "sweep train.py:train --space rate=0.01,0.1 decay=0,0.1"),
    ),
    "diagnose": Command(
        "commands.diagnose", "diagnose_run", "DiagnoseOptions", "find out why a run does not learn",
        ("diagnose digits", "diagnose train.py:train --out diagnosis.json"),
    ),
    "find-lr": Command(
        "commands.find_rate", "find_rate", "FindRateOptions", "find a learning rate from short runs",
        ("find-lr digits", "find-lr train.py:train --low 1e-4 --high 1"),
    ),
    "launch": Command(
        "commands.launch", "launch_script", "LaunchOptions", "run a script in several processes on this host",
        ("launch --processes 4 train.py",),
    ),
    "report": Command(
        "commands.report", "make_report", "ReportOptions", "one page, or a figure, of one or several runs",
        ("report run.npz diagnosis.json", "report sweep --out sweep.html", "report a.csv b.csv --out figure.pdf"),
    ),
    "checkpoints": Command(
        "commands.checkpoints", "list_checkpoints", "CheckpointsOptions", "list checkpoints and check their bytes",
        ("checkpoints run", "checkpoints run --json"),
    ),
    "tasks": Command("commands.facts", "list_tasks", "TasksOptions", "list the tasks", ("tasks",)),
    "versions": Command(
        "commands.facts", "print_versions", "VersionsOptions", "hardware and versions for a bug report", ("versions",)
    ),
}  # fmt: skip
STATUS = "Exit status: 0 success, 1 something found or missing, 2 invalid argument, 130 interrupted."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      arguments: the words after ``nnlearn``; None for those of the process.

    Returns:
      The exit status: 0 for success, 1 if a diagnosis found something, a checkpoint is damaged, or a file or package
      is missing, 2 for an invalid argument, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"nnlearn {version('nnlearn')}")
        return 0
    if any(word.startswith("--tyro-") for word in words):
        return _complete(words)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        from nnlearn.checks import near

        print(f"nnlearn: there is no command {words[0]!r}{near(words[0], COMMANDS)}", file=sys.stderr)
        print(f"commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    import tyro

    command = COMMANDS[words[0]]
    module = importlib.import_module(f"nnlearn.{command.module}")
    if hasattr(module, "before_script"):
        words = [words[0], *module.before_script(words[1:])]
    options_class = getattr(module, command.options)
    paragraphs = (_wrapped(options_class.__doc__), [_examples(command)], _wrapped(STATUS))
    description = "\n\n".join("\n".join(lines) for lines in paragraphs)
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        prog = f"nnlearn {words[0]}"
        options = tyro.cli(options_class, prog=prog, description=description, args=words[1:], config=config)
        status = getattr(module, command.function)(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ImportError, OSError, ValueError) as error:
        print(f"nnlearn: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return status if isinstance(status, int) else 0


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: nnlearn COMMAND ...", ""]
    lines += [f"  {name.ljust(width)}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "nnlearn COMMAND --help   options and examples", "nnlearn --version", "", *_wrapped(STATUS)]
    return "\n".join(lines)


def _wrapped(text: str | None) -> list[str]:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.wrap(" ".join((text or "").split()), width, initial_indent="  ", subsequent_indent="  ")


def _examples(command: Command) -> str:
    return "Examples:\n" + "\n".join(f"  nnlearn {example}" for example in command.examples)


def _complete(words: list[str]) -> int:
    """Print or write the completion of a shell, of all commands: ``--tyro-print-completion bash``."""
    import tyro

    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"nnlearn.{command.module}")

        def function(options):
            del options

        function.__annotations__["options"] = tyro.conf.OmitArgPrefixes[getattr(module, command.options)]
        app.command(function, name=name)
    app.cli(prog="nnlearn", args=words)
    return 0


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
