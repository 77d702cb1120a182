"""Self-contained HTML pages of bench and validate records: tables, plots and images in one file."""

from blip3o_rt.measure.reports.bench import bench_html
from blip3o_rt.measure.reports.validate import validate_html

__all__ = ["bench_html", "validate_html"]
