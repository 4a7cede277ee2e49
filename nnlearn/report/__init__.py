"""Pages and figures of one or many runs, read from the files that nnlearn writes."""

from nnlearn.report.sources import Source as Source
from nnlearn.report.sources import read_source as read_source
from nnlearn.report.write import write_report as write_report
