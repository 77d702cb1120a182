"""What measures the runtime: benchmarks, validation, baselines, records and pages.

The runtime never imports it.
"""

RANDOM_MODELS = ("published", "tiny")  # the geometries whose weights are random, as --model names them
EMBEDDED_MODEL = "shapes"
