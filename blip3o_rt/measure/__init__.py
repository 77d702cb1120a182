"""What measures the runtime: benchmarks, validation, baselines, records and pages.

The runtime never imports it.
"""
