"""What users see: names of columns and panels, ticks, colours, narrow tables, and types of functions."""

import collections.abc
import io
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn.data import MaskedBatch

PARAMS = {"layer": {"w": jnp.ones(())}, "b": jnp.ones(())}


def loss_fn(params, batch, key):
    return 2.5 + 0.05 * (params["b"] ** 2 + 4 * params["layer"]["w"] ** 2)


def test_norms_of_leaves_and_several_rates_have_columns(tmp_path):
    tx = nnlearn.partition({"w": nnlearn.sgd(0.1), "b": nnlearn.sgd(0.2)}, {"layer": {"w": "w"}, "b": "b"})
    record = ("leaf_grad_norms",)
    train = nnlearn.make_train(loss_fn, tx, nnlearn.generated(lambda k, s: s), PARAMS, steps=2, record=record)
    trace = jax.jit(train)({}, 0)[1]
    norms = {"leaf_grad_norms/b": 0.1, "leaf_grad_norms/layer/w": 0.4}
    rates = {"learning_rate/0", "learning_rate/1"}
    columns = trace.columns()
    assert norms.keys() | rates < columns.keys()
    for name, norm in norms.items():
        np.testing.assert_allclose(columns[name][0], norm, rtol=1e-6)
    trace.save(tmp_path / "trace.npz")
    assert nnlearn.Trace.load(tmp_path / "trace.npz").leaves == ("b", "layer/w")
    step = nnlearn.make_step(loss_fn, tx, record=record)
    state = nnlearn.init_state(PARAMS, tx)
    result = nnlearn.fit(step, state, [np.zeros(1)] * 2, history=tmp_path / "run.jsonl", progress=False)
    assert result.trace.columns().keys() == columns.keys()
    assert norms.keys() | rates < set((tmp_path / "run.jsonl").read_text().replace('"', " ").split())


def test_panels_of_a_trace_have_distinct_names_and_plain_ticks():
    pytest.importorskip("matplotlib")
    train = nnlearn.make_train(
        loss_fn, nnlearn.sgd(0.5), nnlearn.generated(lambda k, s: s), PARAMS, steps=6, check_every=2,
        evaluate=lambda params: {"loss": params["b"]}, stop=nnlearn.reached("loss", 0.91),
    )  # fmt: skip
    trace = jax.jit(train)({}, 0)[1]
    assert 0 < trace.stop_step < 6
    figure = trace.plot()
    figure.canvas.draw()
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss of each batch", "loss"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
    assert any(labels) and all(float(label) > 0 for label in labels if label)
    line = figure.axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(np.isnan(line), ~np.asarray(trace.made))  # steps that were not made are not plotted


def test_the_comparison_table_fits_60_columns():
    from rich.console import Console

    from nnlearn.compare.options import CompareOptions
    from nnlearn.compare.summary import Row, make_table

    rows = [Row("adabelief", name, 0.0316228, 0.98123, 0.00123, 123.45, 12345.0, 12.2, 1e-5) for name in ("a", "optax")]
    for width in (60, 100):
        shown = io.StringIO()
        Console(file=shown, width=width).print(make_table(rows, "accuracy", 0.1, CompareOptions(), width))
        text = shown.getvalue()
        assert "…" not in text and max(map(len, text.splitlines())) <= width
        for cell in ("adabelief", "98.12 +- 0.12", "123.45 s", "12,345", "12.2 s", "1.0e-05"):
            assert text.count(cell) >= 2


def test_types_accept_what_users_annotate():
    for function, name in ((nnlearn.make_train, "evaluate"), (nnlearn.fit, "evaluate"),
                           (nnlearn.evaluation, "metrics_fn")):  # fmt: skip
        hint = typing.get_type_hints(function)[name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint]
        returned = [typing.get_args(part)[1] for part in parts if typing.get_args(part)]
        assert typing.get_origin(returned[0]) is collections.abc.Mapping  # covariant, where dict is not
    assert np.ndarray in typing.get_args(typing.get_type_hints(MaskedBatch)["where"])
    metrics = types.MappingProxyType({"error": jnp.float32(2.0)})
    evaluate = nnlearn.evaluation(lambda params, batch: metrics, np.zeros(3))
    assert evaluate(0.0) == {"error": 2.0}
    assert nnlearn.train.verdict.measure(lambda params: metrics, nnlearn.init_state(PARAMS, nnlearn.sgd(0.1)))
