"""Several processes: their places, their shares of the data, the launcher, and a run with a checkpoint of two files."""

import io
import json
import sys
import textwrap

import jax
import numpy as np
import pytest

import nnlearn
from nnlearn import cli, distributed
from nnlearn.distributed import stop
from nnlearn.distributed.launch import launch
from nnlearn.distributed.place import find_place

SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456"}
OWN = {"NNLEARN_COORDINATOR": "a:1", "NNLEARN_PROCESSES": "4"}
PLACES = [
    ({}, {}, ("", 1, 0, "alone", None)),
    ({}, {"coordinator": "h:7", "processes": 2, "process": 1}, ("h:7", 2, 1, "arguments", None)),
    (SLURM, {"coordinator": "h:7", "processes": 2, "process": 1}, ("h:7", 2, 1, "arguments", None)),
    (OWN | {"NNLEARN_PROCESS": "3"} | SLURM, {}, ("a:1", 4, 3, "environment", None)),
    (OWN | {"JOB_COMPLETION_INDEX": "2"}, {}, ("a:1", 4, 2, "kubernetes", None)),
    (
        SLURM | {"SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
        {},
        ("gpu07:33056", 8, 5, "slurm", 1),
    ),
    (
        SLURM | {"SLURM_JOB_NODELIST": "one,two", "SLURM_TASKS_PER_NODE": "1(x8)"},
        {},
        ("one:33056", 8, 5, "slurm", None),
    ),
    (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, ("", 1, 0, "alone", None)),
]
WRONG = [
    ({}, {"processes": 2}, "no coordinator and no process"),
    ({"JOB_COMPLETION_INDEX": "0"}, {}, "kubernetes gave no coordinator and no processes"),
    (OWN, {}, "environment gave no process"),
    (OWN | {"NNLEARN_PROCESS": "4"}, {}, "process=4 of processes=4"),
    ({}, {"coordinator": "h", "processes": 2, "process": 0}, "must be 'host:port', got 'h'"),
    (OWN | {"NNLEARN_PROCESS": "x"}, {}, "not numbers"),
    (SLURM, {}, "slurm gave no coordinator"),
]


def test_the_place_of_a_process_comes_from_arguments_the_environment_slurm_or_kubernetes():
    for environment, arguments, expected in PLACES:
        assert find_place(environment, **arguments) == expected
    for environment, arguments, message in WRONG:
        with pytest.raises(ValueError, match=message):
            find_place(environment, **arguments)


@pytest.mark.parametrize("remainder", ["mask", "drop"])
def test_batches_do_not_depend_on_the_number_of_processes(remainder):
    def whole(processes):
        parts = [
            distributed.own_batches(np.arange(30), 8, seed=3, remainder=remainder, process=index, processes=processes)(
                2
            )
            for index in range(processes)
        ]
        rows = [[batch.examples[batch.where] for batch in step] for step in zip(*parts, strict=True)]
        return [np.concatenate(row).tolist() for row in rows]

    one = whole(1)
    assert one == whole(2) == whole(4)
    if remainder == "mask":
        assert sorted(sum(one, [])) == list(range(30)) and one[0] != list(range(8))
    with pytest.raises(ValueError, match="batch_size=8 cannot be shared by 3 processes"):
        distributed.own_rows(8, 0, 3)


def test_the_launcher_prefixes_lines_and_returns_the_first_failure(capsys):
    code = "import os, sys, time; i = os.environ['NNLEARN_PROCESS']; print('here', sys.argv[1:]); {}"
    output = io.StringIO()
    failing = code.format("i == '1' and sys.exit(7); time.sleep(60)")
    assert launch([sys.executable, "-c", failing, "--x"], 2, output=output) == 7
    assert sorted(output.getvalue().splitlines()) == [
        "[0] here ['--x']",
        "[1] here ['--x']",
        "nnlearn: process 1 of 2 ended with status 7; the others are ended",
    ]
    killed = code.format("i == '0' and os.kill(os.getpid(), 9); time.sleep(60)")
    assert launch([sys.executable, "-c", killed], 2, output=output) == 128 + 9
    assert "process 0 of 2 was killed by SIGKILL" in output.getvalue()
    with pytest.raises(ValueError, match="processes must be >= 1"):
        launch(["true"], 0)


def test_one_process_needs_no_other():
    assert distributed.exchange("value", {"a": 1}) == [{"a": 1}]
    distributed.check_equal("value", 3)
    assert distributed.is_first() and distributed.start().source == "alone"


class SharedStore:
    """The store of the coordinator: the first value of a key counts."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        if self.values.setdefault(key, value) is not value:
            raise RuntimeError("the key exists")

    def key_value_try_get(self, key):
        return self.values[key]


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_interrupted_processes_agree_on_one_step(monkeypatch, lag):
    """Process 0 is interrupted at step 5, and process 1, ``lag`` steps ahead, a step later."""
    store = SharedStore()
    monkeypatch.setattr(stop, "client", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stop, "_runs", 0)
    first = stop.StopTogether()
    monkeypatch.setattr(stop, "_runs", 0)
    second, ends = stop.StopTogether(), {}
    for step in range(12):
        for index, (one, own) in enumerate(((first, step), (second, step + lag))):
            interrupted = "terminated" if (index == 0 and own >= 5) or (index == 1 and own >= 6 + lag) else None
            if index not in ends and one.reason(interrupted, own, ahead=4) == "terminated":
                ends[index] = own
    assert ends == {0: 9, 1: 9}


SCRIPT = """
import json, sys
import jax
from nnlearn import distributed
place = distributed.start()
import jax.numpy as jnp
import numpy as np
import nnlearn
from nnlearn import sharding

def loss_fn(params, batch, key):
    return jnp.mean((batch.examples @ params["w"] + params["b"]) ** 2, where=batch.where[:, None])

mesh, tx = nnlearn.make_mesh("data"), nnlearn.adamw(0.1)
params = {"w": jnp.ones((3, 4)), "b": jnp.zeros(4)}
state = nnlearn.init_state(params, tx, mesh=mesh, rules=sharding.fsdp(), packed=True)
examples = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
result = nnlearn.fit(
    nnlearn.make_step(loss_fn, tx, axis_name="data", mesh=mesh), state, distributed.own_batches(examples, 4),
    steps=int(sys.argv[2]),
    sharding=jax.NamedSharding(mesh, jax.P("data")), checkpoints=sys.argv[1], progress=False, changed="accept",
    history=sys.argv[1] + ".csv",
)
if distributed.is_first():
    print(json.dumps({"loss": np.asarray(result.trace.loss).tolist(), "devices": jax.device_count()}))
distributed.barrier("before the comparison")
distributed.check_equal("the answer", place.process)
"""


@pytest.mark.slow
def test_a_run_of_two_processes_continues_with_one_and_a_difference_ends_both(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    records = []
    for processes, steps in ((2, 3), (1, 7)):
        status = cli.main(["launch", "--processes", str(processes), str(script), str(tmp_path / "run"), str(steps)])
        output = capsys.readouterr().out
        records.append(json.loads(next(line for line in output.splitlines() if line.startswith("[0] {"))[4:]))
        assert (status == 0) == (processes == 1)
        if processes == 2:
            assert "the processes differ in the answer: process 0 has 0, process 1 has 1" in output
            saved = nnlearn.checkpoints.Checkpoints(tmp_path / "run", read_only=True)
            assert len(list(saved.path(3).glob("arrays-*"))) == 2 and saved.verify() == {}
            moments = saved.load()["carry"][0]["opt_state"]
            assert {leaf.shape for leaf in jax.tree.leaves(moments) if np.ndim(leaf)} == {(3, 4), (4,)}
    assert records[0]["devices"] == 2 and records[1]["loss"][:3] == pytest.approx(records[0]["loss"])
    alone = cli.main(["launch", "--processes", "1", str(script), str(tmp_path / "alone"), "7"])
    output = capsys.readouterr().out
    expected = json.loads(next(line for line in output.splitlines() if line.startswith("[0] {"))[4:])
    assert alone == 0 and records[1]["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 8
