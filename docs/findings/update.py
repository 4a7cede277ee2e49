"""Run the pages of findings, and write what they print and draw into them.

python docs/findings/update.py                          # all pages
python docs/findings/update.py dead_units overfitting
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np

FOLDER = Path(__file__).resolve().parent
STYLE = {"svg.hashsalt": "nnlearn", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "figure.constrained_layout.use": True}
COLORS = {"broken": "#d55e00", "repaired": "#0072b2"}  # distinct for colour-blind readers, and in grey


def run_page(page: Path) -> dict:
    """The names that the code of a page defines, and under ``printed`` what it prints."""
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
    names, printed = {"__name__": "page"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), names)
    return names | {"printed": printed.getvalue()}


def write_output(page: Path, printed: str) -> None:
    text = re.sub(
        r"^```text\n.*?^```", lambda _: f"```text\n{printed}```", page.read_text(), count=1, flags=re.S | re.M
    )
    page.write_text(text)


def draw(page: Path, names: dict) -> str:
    """Draw the loss and the metric of the broken and the repaired run; return the last metrics."""
    from matplotlib import pyplot

    metric, last = names["parts"]["metric"], []
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(6.4, 2.3))
        for title, train, line in (("broken", names["train"], "--"), ("repaired", names["repaired"], "-")):
            _, trace = jax.jit(train)({}, 0)
            loss = np.asarray(trace.loss, np.float64)
            width = max(len(loss) // 40, 1)
            smooth = np.convolve(loss, np.ones(width) / width, "valid")
            left.plot(np.arange(len(smooth)) + width, smooth, line, color=COLORS[title], label=title)
            values = np.asarray(trace.metrics[metric])
            right.plot(20 * np.arange(1, len(values) + 1), values, line, color=COLORS[title], label=title)
            last.append(f"{values[-1]:.3g}")
        left.set(xlabel="step", ylabel="training loss")
        if np.all(smooth > 0):
            left.set_yscale("log")
        right.set(xlabel="step", ylabel=metric.replace("_", " "))
        right.legend(frameon=False)
        figure.savefig(page.with_suffix(".svg"), metadata={"Date": None})
        pyplot.close(figure)
    return " -> ".join(last)


def main() -> None:
    matplotlib.use("Agg")
    sys.path.insert(0, str(FOLDER))
    pages = [FOLDER / f"{name}.md" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.md"))
    pages = [page for page in pages if page.stem != "index"]
    for page in pages:
        names = run_page(page)
        write_output(page, names["printed"])
        found = [finding.name for finding in names["report"].findings]
        verdict = "first" if found[:1] == [page.stem] else "listed" if page.stem in found[:3] else "MISSING"
        print(f"{page.stem}: {verdict} {found[:3]}; metric {draw(page, names)}", flush=True)


if __name__ == "__main__":
    main()
