"""Draw ``results/step_time.png`` from ``results/step_time.json``: milliseconds per step, and the memory-bound minimum.

python benchmarks/figure.py
python benchmarks/figure.py --json results.json --png figure.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

RESULTS = Path(__file__).parent / "results"
# Rivals of one family share a hue, and each has its own marker, so that the figure is readable without colour.
LOOKS = {
    "optax": ("#d1495b", "o"),
    "optax.flatten": ("#d1495b", "s"),
    "optax, packed": ("#d1495b", "D"),
    "torch foreach": ("#8d7b68", "^"),
    "torch fused": ("#8d7b68", "v"),
    "nnlearn": ("#00798c", "o"),
    "nnlearn, packed": ("#00798c", "D"),
}
SPREAD = 0.76  # fraction of a regime's height for its rivals


def rows_of(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if "fault" not in row and all(row[key] == value for key, value in wanted.items())]


def marker_style(rival: str) -> dict:
    """The marker of a rival: filled if it is packed, otherwise hollow."""
    color, marker = LOOKS[rival]
    face = color if "packed" in rival else "white"
    return {"color": color, "marker": marker, "markerfacecolor": face, "markersize": 5}


def draw_panel(axes, rows: list[dict], regimes: list[str]) -> None:
    """Draw one recipe: a band for each regime, a dot with quartiles for each rival, and a line for the bandwidth."""
    for band, regime in enumerate(regimes):
        here = {row["rival"]: row for row in rows_of(rows, regime=regime)}
        if band % 2:
            axes.axhspan(band - 0.5, band + 0.5, color="#f4f4f4", zorder=0)
        for index, (rival, (color, _)) in enumerate(LOOKS.items()):
            if rival not in here:
                continue
            row, y = here[rival], band + SPREAD * (index / (len(LOOKS) - 1) - 0.5)
            axes.plot(row["quartiles_ms"], [y, y], color=color, linewidth=1, zorder=2)
            axes.plot(row["median_ms"], y, **marker_style(rival), zorder=3)
        if here:
            row = next(iter(here.values()))
            fastest = max(row["bandwidth_gbps"].values())
            axes.vlines(row["minimal_bytes"] / fastest / 1e6, band - 0.45, band + 0.45, color="black", linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_yticks(range(len(regimes)), regimes)
    axes.set_ylim(len(regimes) - 0.5, -0.5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(document: dict) -> Figure:
    """Draw all recipes side by side, with one legend and a description of the machine."""
    rows = document["rows"]
    recipes, regimes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("recipe", "regime"))
    across = min(2, len(recipes))
    down = -(-len(recipes) // across)
    height = down * (0.6 + 0.85 * len(regimes)) + 1.2
    figure, panels = plt.subplots(down, across, figsize=(5.4 * across, height), sharex=True, sharey=True, squeeze=False)
    for panel, recipe in zip(panels.flat, recipes, strict=False):
        draw_panel(panel, rows_of(rows, recipe=recipe), regimes)
        panel.set_title(recipe, loc="left", fontsize=10, fontweight="bold")
    for panel in panels.flat[len(recipes) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("milliseconds per step (median and quartiles; lower is better)")
    present = {row["rival"] for row in rows}
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", markerfacecolor=color if marker == "D" else "white")
        for rival, (color, marker) in LOOKS.items()
        if rival in present
    ]
    labels = [rival for rival in LOOKS if rival in present]
    handles.append(Line2D([], [], color="black", linestyle=":"))
    labels.append("minimal bytes at the measured bandwidth")
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=9)
    figure.text(0.01, 0.008, describe(document), fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.025, 1, 1 - 0.65 / height))
    return figure


def describe(document: dict) -> str:
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    device = machine["device"] if not machine["device"].startswith("cpu") else f"{machine['cores']} cores"
    dates = document["date"] if isinstance(document["date"], str) else document["date"][0]
    return f"{machine['cpu']}, {device}; {versions}; {dates[:10]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "step_time.json")
    parser.add_argument("--png", type=Path, default=None, help="path of the figure; by default next to the JSON file")
    options = parser.parse_args()
    path = options.png or options.json.with_suffix(".png")
    draw(json.loads(options.json.read_text())).savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
