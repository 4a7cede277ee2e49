"""One HTML page of runs: curves, heat maps of layers, sweeps and tables, from plain arrays, without network.

The script of the page draws on canvases and is a part of this package: plotly's alone has 4.8 MB, which is the size
that a whole page of 50 runs may have.
"""

from nnlearn.figures.page.build import page_data as page_data
from nnlearn.figures.page.record import Layers as Layers
from nnlearn.figures.page.record import RunRecord as RunRecord
from nnlearn.figures.page.record import Series as Series
from nnlearn.figures.page.write import Page as Page
from nnlearn.figures.page.write import write_page as write_page
