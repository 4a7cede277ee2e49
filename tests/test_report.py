"""The report: what the page holds, from every kind of file, small and with all its spikes."""

import base64
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnlearn
from nnlearn import cli
from nnlearn.diagnose.report import Report, found
from nnlearn.figures.page import Page, RunRecord, Series, write_page
from nnlearn.figures.page.thin import grid_of, thin
from nnlearn.report import read_source, write_report
from nnlearn.sweeps import choice

PARAMS = {"w": jnp.ones(2), "b": jnp.zeros(())}


def loss_fn(params, batch, key):
    noise = jax.random.normal(key, ())
    return jnp.sum((params["w"] - 1.5) ** 2) + (params["b"] + 0.1 * noise) ** 2, {"sharpness": jnp.float32(2.0)}


@pytest.fixture(scope="module")
def results():
    train = nnlearn.make_train(
        loss_fn, lambda hparams: nnlearn.monitor_layers(nnlearn.sgd(hparams["rate"]), every=2),
        nnlearn.generated(lambda key, step: step), PARAMS, steps=40, check_every=10,
        evaluate=lambda params: {"size": jnp.sum(params["w"])},
    )  # fmt: skip
    space = {"rate": choice(0.05, 0.2, 1e30), "decay": 0.5}
    return nnlearn.sweep(train, space, seeds=2, metric="size", mode="max", full=True)


def numbers_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text()).group(1))


def decoded(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_page_of_a_sweep(results, tmp_path):
    page = results.report(tmp_path / "sweep.html")
    data = numbers_of(page)
    assert data["varied"] == ["rate"] and data["same"] == {"decay": 0.5}
    assert [len(group["runs"]) for group in data["groups"]] == [2, 2, 2]
    panels = {panel["name"]: panel for panel in data["panels"]}
    assert list(panels)[:3] == ["loss", "size", "train_loss"] and panels["learning_rate"]["kind"] == "schedule"
    for setting, seed in ((0, 0), (1, 1)):
        drawn = decoded(panels["loss"]["lines"][2 * setting + seed]["mean"])
        np.testing.assert_array_equal(drawn, results.run(setting, seed).loss)
    limit = decoded(panels["aux/sharpness"]["lines"][2]["limit"])
    np.testing.assert_allclose(limit, 2 / 0.2, rtol=1e-6)
    failed = data["runs"][4]
    assert failed["scores"]["size"] is None and panels["loss"]["lines"][4]["bad"] is not None
    best = data["layers"][0]
    assert best["leaves"] == ["b", "w"] and best["run"] in data["groups"][1]["runs"]
    heat = decoded(best["maps"]["grad_norm"]).reshape(2, -1)
    np.testing.assert_allclose(heat[1], results.run(1, best["run"] % 2).info.layers.grad_norm[:, 1], rtol=1e-6)


def test_nothing_is_fetched_and_nothing_of_a_run_becomes_markup(tmp_path):
    name = "<script>alert(1)</script>"
    run = RunRecord(name, {"loss": Series(np.arange(3), np.ones(3))}, config={name: name})
    finding = {"name": name, "severity": name, "seen": name, "meaning": name, "remedies": [name], "where": name}
    text = write_page(tmp_path / "a.html", [run], Page(name, [finding], {name: name}, {name: name})).read_text()
    assert "<script>alert" not in text and text.count("<script") == 2
    assert "default-src 'none'" in text
    assert re.findall(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(", text) == []


def test_long_curves_keep_every_spike_in_a_small_file(tmp_path):
    random, step = np.random.default_rng(0), np.arange(1, 10001)
    runs, spikes = [], []
    for seed in range(50):
        loss = random.uniform(1, 2, 10000)
        spikes.append(random.integers(10000, size=3))
        loss[spikes[-1]] = [100.0, 0.001, np.nan]
        series = {name: Series(step, loss) for name in ("loss", "grad_norm", "update_norm", "learning_rate", "aux/a")}
        runs.append(RunRecord("run", series, config={"seed": seed}, scores={"loss": float(loss[-1])}))
    page = write_page(tmp_path / "big.html", runs)
    assert page.stat().st_size < 5e6
    (loss, *_) = numbers_of(page)["panels"]
    for line, (high, low, bad) in zip(loss["lines"], spikes, strict=True):
        assert np.nanmax(decoded(line["high"])) == (100.0 if high not in (low, bad) else pytest.approx(2, abs=1e-2))
        if low != bad:
            assert np.nanmin(decoded(line["low"])) == np.float32(0.001)
        assert line["bad"] == step[bad]


@pytest.mark.parametrize("points", [7, 100, 1000])
def test_thinned_curves_against_loops(points):
    random = np.random.default_rng(points)
    step, value = np.sort(random.choice(5000, 600, replace=False)), random.normal(size=600)
    value[::50] = np.inf
    grid = grid_of([step], points)
    found = thin(Series(step, value), grid)
    ends = [*grid.step[1:], np.inf]
    for at, (first, end) in enumerate(zip(grid.step, ends, strict=True)):
        inside = value[(step >= first) & (step < end) & np.isfinite(value)]
        want = [inside.mean(), inside.min(), inside.max()] if len(inside) else [np.nan] * 3
        np.testing.assert_allclose([found.mean[at], found.low[at], found.high[at]], want, rtol=1e-9)


def test_every_kind_of_file_in_one_page(results, tmp_path, capsys):
    trace = results.run(0)
    trace.save(tmp_path / "trace.npz")
    results.save(tmp_path / "sweep")
    step = nnlearn.make_step(loss_fn, nnlearn.monitor_layers(nnlearn.sgd(0.1), every=2), record=("grad_norm",))
    state = nnlearn.init_state(PARAMS, nnlearn.monitor_layers(nnlearn.sgd(0.1), every=2))
    for suffix in ("csv", "jsonl"):
        nnlearn.fit(
            step, state, [np.zeros(1)] * 6, history=tmp_path / f"run.{suffix}", progress=False, check_every=3,
            evaluate=lambda params: {"size": jnp.sum(params["w"])},
        )  # fmt: skip
    table, lines = (read_source(tmp_path / f"run.{suffix}").runs[0] for suffix in ("csv", "jsonl"))
    assert table.scores.keys() == {"size"} and table.layers is not None and table.layers.leaves == ("b", "w")
    for name, series in table.series.items():
        np.testing.assert_array_equal(series.value, lines.series[name].value)
        np.testing.assert_array_equal(series.step, lines.series[name].step)
    Report((found("overfitting", "The gap is 0.5."),), ()).save(tmp_path / "diagnosis.json")
    (tmp_path / "learned").mkdir()
    learned = {
        "settings": {"task": "digits", "seed": 1}, "metrics": {"accuracy": 0.9}, "seconds": 1.0,
        "baselines": {"a": 0.1},
        "target": {"metric": "accuracy", "mode": "max", "value": 0.8, "reached": True}, "sample": "to be",
        "checks": [{"step": 5, "accuracy": 0.5}, {"step": 10, "accuracy": 0.9}],
    }  # fmt: skip
    (tmp_path / "learned" / "result.json").write_text(json.dumps(learned))
    names = ("trace.npz", "sweep", "run.csv", "run.jsonl", "diagnosis.json", "learned")
    out = tmp_path / "all.html"
    assert cli.main(["report", *(str(tmp_path / name) for name in names), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    text, data = out.read_text(), numbers_of(out)
    assert "The gap is 0.5." in text and "to be" in text
    assert len(data["runs"]) == 1 + 6 + 2 + 1
    names = {group["name"] for group in data["groups"]}
    assert names == {"trace", "sweep", "learned", str(tmp_path / "run.csv"), str(tmp_path / "run.jsonl")}


def test_the_metric_that_ranks_runs_is_that_of_a_sweep_or_follows_from_the_names(results, tmp_path):
    for name, end in (("bad", 0.5), ("good", 0.9)):
        (tmp_path / f"{name}.csv").write_text(f"step,loss,accuracy,val_loss\n1,1,{end},{1 - end}\n")
    results.save(tmp_path / "sweep")
    files = [tmp_path / name for name in ("bad.csv", "good.csv", "sweep")]

    def ranked_by(count, **choice):
        page = numbers_of(write_report(files[:count], tmp_path / "page.html", **choice))
        return page["metric"], page["mode"]

    assert ranked_by(2) == ("val_loss", "min")
    assert ranked_by(2, metric="accuracy") == ("accuracy", "max")
    assert ranked_by(2, metric="accuracy", mode="min") == ("accuracy", "min")
    assert ranked_by(3) == ("size", "max")


def test_results_traces_and_states_print_short(results):
    best, *others = str(results).splitlines()[2:]
    assert best.startswith("  3 +-") and best.endswith("rate: 0.2")
    assert others[-1].endswith("(2 of 2 failed)  rate: 1e+30")
    assert repr(results) == "Results(6 runs: 3 settings, 2 seeds, varied ('rate',))"
    assert repr(results.best()).startswith("Score(setting={rate: 0.2, decay: 0.5}, static={}, mean=3, standard_error=")
    trace, many = results.run(1), results.traces[0]
    assert re.fullmatch(r"Trace\(40 steps, loss \S+ -> \S+, size 3, train_loss \S+\)", repr(trace))
    assert repr(many) == "Trace(runs (3, 2), 40 steps, size, train_loss)"
    state = nnlearn.init_state(PARAMS, nnlearn.adam(0.1))
    words = "params: 2 arrays of 3 numbers, opt_state: 7 arrays of 9 numbers)"
    assert repr(state) == f"TrainState(step 0, {words}"
    seen = []
    jax.eval_shape(lambda *each: seen.extend(map(repr, each)), state, trace)
    seen += [repr(shapes) for shapes in jax.eval_shape(lambda *each: each, state, trace)]
    assert seen[0] == seen[2] == f"TrainState(step of shape (), {words}"
    assert seen[1] == seen[3] and re.fullmatch(r"Trace\(of \d+ arrays of [\d,]+ numbers\)", seen[1])
    assert repr(jax.tree.map(lambda leaf: "here", state)).startswith("TrainState(step='here', stored={'b': 'here'")
    assert "here" in repr(jax.tree.map(lambda leaf: "here", trace))


def test_files_that_are_no_run(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    (tmp_path / "c.npz").write_text("nothing")
    for name in ("a.json", "b.csv", "c.npz", "."):
        with pytest.raises(ValueError, match=r"cannot read|holds no run"):
            read_source(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*none'"):
        read_source(tmp_path / "none")
    (tmp_path / "b.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"ends with .html, .pdf"):
        write_report(tmp_path / "b.csv", tmp_path / "b.txt")


def test_figures_for_papers(results, tmp_path):
    pytest.importorskip("matplotlib")
    from nnlearn.figures.column import LINES, draw_column

    svg, pdf = (results.report(tmp_path / f"figure.{suffix}").read_bytes() for suffix in ("svg", "pdf"))
    assert b"<text" not in svg and b"font-family" not in svg  # glyphs are outlines
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    figure = draw_column(results.records(), metric="size", mode="max")
    assert figure.get_size_inches()[0] < 3.4
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["rate 0.2", "rate 0.05", "rate 1e+30"]  # the best first
    red, green, blue = (np.array([int(color[at : at + 2], 16) for color, _ in LINES]) for at in (1, 3, 5))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    for at, (_, dashes) in enumerate(LINES):  # two lines differ in dashes, or clearly in lightness
        assert all(dashes != LINES[other][1] or abs(grey[at] - grey[other]) > 100 for other in range(at))


def test_labels_of_a_trace(results, tmp_path):
    trace = results.traces[0]
    data = numbers_of(
        trace.report(tmp_path / "a.html", labels={"rate": np.array([[1.0], [2.0], [3.0]]), "seed": [4, 5]})
    )
    assert [group["config"]["rate"] for group in data["groups"]] == [1.0, 2.0, 3.0]
    assert [run["seed"] for run in data["runs"]][:2] == [4, 5]
    assert numbers_of(trace.report(tmp_path / "b.html"))["varied"] == ["run_0", "run_1"]
    with pytest.raises(ValueError, match="label 'rate' of shape .4,. does not fit runs .3, 2."):
        trace.report(tmp_path / "a.html", labels={"rate": np.ones(4)})
