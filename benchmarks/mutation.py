"""Mutation score of the tests: small faults are inserted into the package, and the tests must detect each of them.

    python benchmarks/mutation.py --count 120
    python benchmarks/mutation.py --only nnlearn/train --count 30 --whole --resume

A mutant is the package with one edit: a flipped comparison, a changed sign, a dropped check or a swapped branch. It is
tested in a copy of the repository, by the doctests of its module and the related test files, until the first failure.
Mutants are chosen by a hash of the edit, not by line numbers, so changes elsewhere in a file do not affect the choice.
Docstrings, messages, annotations and decorators are never edited.

Each result is immediately appended to a JSON-lines file. ``--resume`` skips the mutants in that file, and
``--again survived`` repeats those that survived. EQUIVALENT lists the mutants that no test can detect, with the reason.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}  # before JAX is imported

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import functools
import hashlib
import importlib
import json
import multiprocessing
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
HEAVY = ("torch", "flax.linen", "flax.nnx", "equinox", "optax", "scipy.stats", "sklearn.datasets", "matplotlib.pyplot")
HEAVY += ("hypothesis", "pandas", "_pytest.doctest", "rich.table", "tyro")
ROOMS = ("transforms", "losses", "train", "sweeps", "packing", "gradients", "stream")
NAMES = {
    "min": "max",
    "minimum": "maximum",
    "amin": "amax",
    "argmin": "argmax",
    "any": "all",
    "logical_and": "logical_or",
}
NAMES |= {"floor": "ceil", "zeros": "ones", "zeros_like": "ones_like"}
NAMES |= {value: key for key, value in NAMES.items()}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}

# Related test files that do not import the module or its public names.
ALSO = {
    "nnlearn/transforms": ["test_contract.py", "test_transforms.py", "test_skipped_steps.py", "test_edges.py"],
    "nnlearn/losses": ["test_losses.py", "test_losses_edges.py", "test_losses_properties.py"],
    "nnlearn/train": [
        "test_run.py",
        "test_step.py",
        "test_step_options.py",
        "test_run_guarantees.py",
        "test_silence.py",
    ],
    "nnlearn/sweeps": ["test_sweep.py"],
    "nnlearn/packing": ["test_packing.py", "test_packed_training.py", "test_packing_proof.py"],
    "nnlearn/stream": ["test_fit.py", "test_fit_host.py", "test_own_steps.py", "test_durable.py"],
}
# Test files that run examples or whole tasks, or start many processes; they run last.
LONG = {"test_learning.py", "test_examples.py", "test_examples_learning.py", "test_killed_writers.py", "test_speech.py"}
LONG |= {
    "test_tasks.py",
    "test_text_task.py",
    "test_compare.py",
    "test_readme.py",
    "test_native.py",
    "test_identity.py",
}
NEVER = {"test_examples_learning.py", "test_learning.py"}  # take minutes, and check only that results are good

CONDITIONAL = {"check", "and or", "comparison", "not"}
OF_ERRORS = ("fault", "refuse", "wrong", "error", "raise", "named", "bad_", "invalid", "message")

EQUIVALENT: dict[str, str] = {
    "6206fe495924": "an early copy to the host changes when the numbers move there, and nothing else",
    "3c1df5ab00b8": "a list in place of a tuple: the names are only iterated over",
    "b4be25c4ef06": "the default of a kernel's argument that the transformation always gives",
    "bda5e76bf88e": "an infinite upper bound is the default",
    "26863b577e8e": "any Python integer stands for no factor",
    "b70372db3016": "an array without elements",
    "62c66dcaa1c1": "XLA on a CPU accumulates these products in float32 in any case",
    "20d4cb93ec0d": "stands in for a norm that was not recorded, and is only tested for being finite",
    "8798e64c74ab": "a tolerance against rounding, far below the numbers that it is added to",
    "1ab1eec86299": "all devices of an array have one platform",
    "55548b2ca8ba": "both are recorded, or neither is",
    "08f2621810e8": "what fills the rows after the last step, which are cut off",
}


class Mutant(NamedTuple):
    """One edit: ``source[start:stop]`` of the file becomes ``new``."""

    key: str  # stable: a hash of the file, the function, the kind, and the text before and after
    path: str
    function: str
    kind: str
    line: int
    start: int
    stop: int
    old: str
    new: str


def _name_of(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _with(node: ast.AST, **changes: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def edits_of(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    """The kinds of edits of one node, with their replacements."""
    match node:
        case ast.Compare(ops=[operator, *_]) if type(operator) in COMPARISONS:
            yield "comparison", _with(node, ops=[COMPARISONS[type(operator)](), *node.ops[1:]])
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield "arithmetic", _with(node, op=OPERATORS[type(operator)]())
        case ast.AugAssign(op=operator) if type(operator) in OPERATORS:
            yield "arithmetic", _with(node, op=OPERATORS[type(operator)]())
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield "arithmetic", operand
        case ast.BoolOp():
            yield "and or", _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "not", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(2 * value if value else 1.0)
        case ast.IfExp():
            yield "branches", _with(node, body=node.orelse, orelse=node.body)
        case ast.If(body=[*_, ast.Raise()], orelse=[]):
            yield "check", "pass"
        case ast.If() if not isinstance(node.test, ast.UnaryOp):
            yield "not", "condition"
        case ast.Expr(value=ast.Call() as call) if (
            _name_of(call).lstrip("_").startswith(("check", "refuse", "require"))
        ):
            yield "check", "pass"
        case ast.Return(value=ast.Call(args=[first, *_])) if not isinstance(first, ast.Starred):
            yield "return", _with(node, value=first)
        case ast.Call():
            name = _name_of(node)
            if name in NAMES:
                attribute = isinstance(node.func, ast.Attribute)
                other = _with(node.func, attr=NAMES[name]) if attribute else ast.Name(NAMES[name], ast.Load())
                yield "extremum", _with(node, func=other)
            if name in {"where", "cond"} and len(node.args) >= 3:
                first, second, third, *rest = node.args
                yield "branches", _with(node, args=[first, third, second, *rest])
            for index, keyword in enumerate(node.keywords):
                if keyword.arg is not None:
                    yield "keyword", _with(node, keywords=node.keywords[:index] + node.keywords[index + 1 :])


def _visited(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The nodes that may be edited, with the names of their functions or classes."""
    yield function, node
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "type_params", "bases"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            inert = ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert | ast.Pass
            if not isinstance(child, ast.AST) or isinstance(child, inert):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            inside = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{child.name}".lstrip(".")
            yield from _visited(child, inside)


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of one file."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found, seen = [], collections.Counter()
    for function, node in _visited(ast.parse(source)):
        for kind, other in edits_of(node):
            place = node
            if other == "condition":  # the body does not change
                place, other = node.test, ast.UnaryOp(ast.Not(), node.test)
            start = lines[place.lineno - 1] + place.col_offset
            stop = lines[place.end_lineno - 1] + place.end_col_offset
            old = source.encode()[start:stop].decode()
            new = other if isinstance(other, str) else ast.unparse(ast.fix_missing_locations(other))
            if isinstance(place, ast.expr):
                new = f"({new})"
            text = "\0".join([path, function, kind, " ".join(old.split()), new])
            seen[text] += 1
            key = hashlib.sha256(f"{text}\0{seen[text]}".encode()).hexdigest()[:12]
            found.append(Mutant(key, path, function, kind, place.lineno, start, stop, old, new))
    return found


def all_mutants(root: Path, only: str = "nnlearn") -> list[Mutant]:
    files = [path for room in ROOMS for path in sorted((root / "nnlearn" / room).glob("*.py"))]
    files = [path for path in files if path.name != "__init__.py"]
    paths = [path.relative_to(root).as_posix() for path in files]
    return [mutant for path in paths if path.startswith(only) for mutant in mutants_of(path, (root / path).read_text())]


def chosen(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Choose ``count`` mutants, spread over files and kinds, in the order of a hash."""

    def order(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed}{mutant.key}".encode()).hexdigest()

    left, picked = sorted(mutants, key=order), []
    files, kinds, functions = collections.Counter(), collections.Counter(), collections.Counter()
    while left and len(picked) < count:
        best = min(left, key=lambda mutant: (files[mutant.path], kinds[mutant.kind], functions[mutant[1:3]]))
        left.remove(best)
        picked.append(best)
        files[best.path] += 1
        kinds[best.kind] += 1
        functions[best[1:3]] += 1
    return picked


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w+", text))


class Selection:
    """The test files for a mutant, the most closely related first."""

    def __init__(self, root: Path):
        self.tests = {path.name: path.read_text() for path in sorted((root / "tests").glob("*.py"))}
        self.words = {name: _words(text) for name, text in self.tests.items()}
        helpers = [name for name in self.tests if not name.startswith("test_")]
        for name, words in self.words.items():  # includes the words of imported helpers
            for helper in helpers:
                if name.startswith("test_") and Path(helper).stem in words:
                    words |= self.words[helper]
        self.modules = {path: path.read_text() for path in sorted((root / "nnlearn").rglob("*.py"))}
        self.root = root

    def names_in(self, path: str) -> set[str]:
        """The public functions and classes that a file defines."""
        body = ast.parse(self.modules[self.root / path]).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        return {name for name in defined if not name.startswith("_") and len(name) > 3}

    def importers(self, path: str) -> list[str]:
        module = path.removesuffix(".py").replace("/", ".")
        pattern = re.compile(rf"(from|import) {re.escape(module)}\b")
        found = [other for other, text in self.modules.items() if pattern.search(text)]
        return [other.relative_to(self.root).as_posix() for other in found if other.name != "__init__.py"]

    def near(self, mutant: Mutant) -> set[str]:
        """Words that identify the tests of a mutant: the names of its function and file."""
        words = {mutant.function.split(".")[0], Path(mutant.path).stem}
        words |= {word for name in words for word in (name.strip("_"), name.strip("_").removeprefix("scale_by_"))}
        return {word.removesuffix("_kernel") for word in words if len(word) > 2}

    def files_for(self, mutant: Mutant, most: int) -> list[str]:
        """The module itself for its doctests, then at most ``most`` test files.

        A word that a mutant and a test file share is weighted by its rarity among the files.
        """
        names, near = self.names_in(mutant.path), self.near(mutant)
        importers = self.importers(mutant.path)
        around = set().union(*map(self.names_in, importers), set())
        stems = {Path(other).stem for other in (mutant.path, *importers)} | {Path(mutant.path).parent.name}

        def weight(words: set[str]) -> float:
            return sum(1 / sum(word in other for other in self.words.values()) for word in words)

        scores = {}
        for name, words in self.words.items():
            if name.startswith("test_") and name not in NEVER:
                score = 3 * weight(near & words) + weight(names & words) + 0.3 * weight(around & words)
                room = next((files for start, files in ALSO.items() if mutant.path.startswith(start)), [])
                score += 5 * any(name == f"test_{stem}.py" for stem in stems)
                scores[name] = score + 0.3 * (name in room)
        nearest = sorted(filter(scores.get, scores), key=scores.__getitem__, reverse=True)[:most]
        return [mutant.path, *(f"tests/{name}" for name in sorted(nearest, key=LONG.__contains__))]


class Order:
    """A plugin of pytest that records the first failure, and sorts the tests so that it comes early.

    Tests of errors, which compile nothing, come first if the mutant changes a condition. Tests whose names have one of
    the words follow, and slow tests come last.
    """

    def __init__(self, words: Collection[str], folder: Path, conditional: bool):
        self.words, self.folder, self.conditional = words, folder, conditional

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import nnlearn

        assert Path(nnlearn.__file__).is_relative_to(self.folder), nnlearn.__file__

        def order(item: Any) -> tuple[bool, bool, bool]:
            name, near = item.nodeid.lower(), any(word in item.nodeid.lower() for word in self.words)
            error = self.conditional and any(word in name for word in OF_ERRORS)
            return item.get_closest_marker("slow") is not None, not error, not near

        items.sort(key=order)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            (self.folder / "first_failure").write_text(report.nodeid)


selection_of = functools.cache(Selection)


def make_copy(folder: Path) -> Path:
    """The tracked files of the repository as they are now."""
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(
    folder: Path, arguments: list[str], limit: float, words: Collection[str] = (), conditional: bool = False
) -> tuple[int | None, str, float]:
    """The exit status of pytest (None after ``limit`` seconds of processor time), its last lines, and its seconds.

    The tests run in a fork of this process, which has imported everything except nnlearn.
    """
    (folder / "first_failure").unlink(missing_ok=True)
    began, status = time.perf_counter(), None
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        _run_here(folder, arguments, words, conditional)
    while time.perf_counter() < began + 10 * limit:  # it may also wait forever
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            status = None if status in (-signal.SIGXCPU, -signal.SIGKILL) else status
            break
        time.sleep(0.1)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    tail = (folder / "output").read_text(errors="replace").strip().splitlines()[-3:]
    return status, "\n".join(tail), time.perf_counter() - began


def _run_here(folder: Path, arguments: list[str], words: Collection[str], conditional: bool) -> None:
    """Run pytest in this process, with ``nnlearn`` from ``folder``, and exit."""
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(entry for entry in sys.path if entry and Path(entry) not in {ROOT, BENCHMARKS})]
        jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))  # shared by mutants
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
        options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header", "-r", "fE", "--tb=line"]
        status = int(pytest.main([*options, "--timeout=300", *arguments], plugins=[Order(words, folder, conditional)]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def run_apart(mutant: Mutant, folder: Path, options: argparse.Namespace) -> dict:
    """``run_mutant`` in this process's own copy of the repository."""
    own = folder / f"copy{os.getpid()}"
    return run_mutant(mutant, own if own.exists() else make_copy(own), selection_of(ROOT), options)


def run_mutant(mutant: Mutant, folder: Path, selection: Selection, options: argparse.Namespace) -> dict:
    path = folder / mutant.path
    source = path.read_bytes()
    edited = source[: mutant.start] + mutant.new.encode() + source[mutant.stop :]
    compile(edited, str(path), "exec")
    files = [mutant.path, *options.tests] if options.tests else selection.files_for(mutant, options.files)
    arguments = [*files, *(["--whole"] if options.whole else [])]
    while True:
        ignored = [f"--deselect={test}" for test in _failing]
        try:
            _write(path, edited)
            status, tail, seconds = run_tests(
                folder, arguments + ignored, options.limit, selection.near(mutant), mutant.kind in CONDITIONAL
            )
        finally:
            _write(path, source)
        failure = folder / "first_failure"
        killer = failure.read_text() if failure.exists() else None
        if status == 0 or killer is None or _passes(killer, folder, options.limit):
            break
        _failing.append(killer)
    outcome = {None: "timed out", 0: "survived", 1: "killed", 2: "killed"}.get(status, f"pytest ended with {status}")
    facts = mutant._asdict() | {"outcome": outcome, "seconds": round(seconds, 1), "killer": killer, "end": tail}
    facts["tests"] = files
    return facts | {"commit": options.commit, "load": os.getloadavg()[0]}


_failing: list[str] = []  # tests that also fail without a mutant


@functools.cache
def _passes(test: str, folder: Path, limit: float) -> bool:
    """Whether a test passes on the unchanged package."""
    return run_tests(folder, [test], limit)[0] == 0


def _write(path: Path, content: bytes) -> None:
    """Write a module and delete its bytecode, which Python validates only by size and modification time."""
    path.write_bytes(content)
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        cached.unlink()


def read_results(path: Path) -> dict[str, dict]:
    """The last result of each mutant."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def report(results: list[dict], options: argparse.Namespace) -> None:
    from harness import show
    from machine import machine_facts

    outcomes = ["killed", "survived", "timed out"]
    for entry in results:
        if entry["key"] in EQUIVALENT and entry["outcome"] != "killed":
            entry["outcome"], entry["reason"] = "equivalent", EQUIVALENT[entry["key"]]

    def row(title: str, entries: list[dict]) -> list[str]:
        counts = collections.Counter(entry["outcome"] for entry in entries)
        asked = len(entries) - counts["equivalent"]
        share = f"{100 * counts['killed'] / asked:.0f} %" if asked else "-"
        return [title, str(len(entries)), *(str(counts[name]) for name in [*outcomes, "equivalent"]), share]

    def by(field: str, length: int = 3) -> list[list[str]]:
        groups = collections.defaultdict(list)
        for entry in results:
            groups["/".join(entry[field].split("/")[: length - 1])].append(entry)
        return [row(name, entries) for name, entries in sorted(groups.items())]

    head = ["", "mutants", *outcomes, "equivalent", "killed"]
    show("Mutants by room and by kind", head, [*by("path"), *by("kind"), row("all", results)])
    for entry in results:
        if entry["outcome"] not in {"killed", "equivalent"}:
            place = f"{entry['path']}:{entry['line']} {entry['function']}"
            print(
                f"{entry['outcome']}: {entry['key']} {place} [{entry['kind']}]\n  - {entry['old']}\n  + {entry['new']}"
            )
    document = {
        "command": " ".join(["python", "benchmarks/mutation.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_facts() | {"jax": jax.__version__},
        "counts": collections.Counter(entry["outcome"] for entry in results),
        "mutants": [{name: value for name, value in entry.items() if name != "tests"} for entry in results],
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {options.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120, help="mutants")
    parser.add_argument("--only", default="nnlearn", help="a folder or file: nnlearn/train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of processor time a mutant")
    parser.add_argument("--files", type=int, default=8, help="test files a mutant, the nearest ones")
    parser.add_argument("--tests", nargs="*", help="test files, in place of the nearest ones: tests/test_guards.py")
    parser.add_argument("--whole", action="store_true", help="with the slow tests and all cases of the large tables")
    parser.add_argument("--resume", action="store_true", help="skip the mutants that the JSON-lines file has")
    parser.add_argument("--again", action="append", default=[], help="with --resume: run these outcomes again")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests, and run nothing")
    parser.add_argument("--folder", type=Path, help="where the copies and compiled programs go, to keep the programs")
    parser.add_argument("--lines", type=Path, default=RESULTS / "mutation.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "mutation.json")
    options = parser.parse_args()
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    options.commit = git.stdout.strip() or None

    selection = selection_of(ROOT)
    every = all_mutants(ROOT, options.only)
    picked = chosen(every, options.count, options.seed)
    print(f"{len(picked)} of {len(every)} mutants")
    if options.list:
        for mutant in picked:
            print(f"{mutant.key} {mutant.path}:{mutant.line} {mutant.function} [{mutant.kind}]")
            print(f"  - {mutant.old}\n  + {mutant.new}\n  {' '.join(selection.files_for(mutant, options.files))}")
        return
    done = read_results(options.lines) if options.resume else {}
    if not options.resume:
        options.lines.unlink(missing_ok=True)
    todo = [mutant for mutant in picked if mutant.key not in done or done[mutant.key]["outcome"] in options.again]
    for heavy in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(heavy)
    if options.folder:
        for old in options.folder.glob("copy*"):
            shutil.rmtree(old)  # it may have the mutant of an interrupted run
    context = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        folder = (options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for entry in pool.map(functools.partial(run_apart, folder=folder, options=options), todo):
                with options.lines.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                place = f"{entry['path']}:{entry['line']} [{entry['kind']}]"
                print(f"{entry['outcome']} {entry['seconds']:.0f} s {place}", flush=True)
    done = read_results(options.lines)
    report([done[mutant.key] for mutant in picked if mutant.key in done], options)


if __name__ == "__main__":
    main()
