"""Tables of numbers and categories."""

import csv

import numpy as np

from nnlearn.data import Examples
from nnlearn.datasets.packages import unpack_python_package

# The values of each category, from the worst to the best.
CATEGORIES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": tuple("JIHGFED"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
DIAMONDS_PACKAGE = (
    "plotnine",
    "plotnine-0.15.9-py3-none-any.whl",
    "36f4526235b3ddd9ea379dd677093ea2ee1b58ab98adec1bde891930283448cd",
)
NUMBERS = ("carat", "depth", "table", "x", "y", "z")


def diamonds() -> Examples:
    """Sizes, qualities and prices of 53,940 diamonds, from the package plotnine.

    Returns:
      ``inputs``, float32 of shape (53940, 26): carat, depth, table and the three lengths, then cut, colour and clarity
      as indicators; ``targets``, float32 of shape (53940, 1): the price in US dollars.

    Raises:
      OSError: if the package cannot be fetched.

    >>> diamonds().inputs.shape  # doctest: +SKIP
    (53940, 26)
    """
    path = unpack_python_package(*DIAMONDS_PACKAGE) / "plotnine" / "data" / "diamonds.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [np.array([[float(row[name]) for name in NUMBERS] for row in rows], np.float32)]
    for name, values in CATEGORIES.items():
        columns.append(np.array([row[name] for row in rows])[:, None] == np.array(values)[None, :])
    prices = np.array([[float(row["price"])] for row in rows], np.float32)
    return Examples(np.concatenate(columns, axis=1, dtype=np.float32), prices)
