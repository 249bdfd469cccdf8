"""What an operator sees: `metrics`, for Prometheus, and `logs`, as JSON lines.

`metrics` has our names and, as a view of them, those of TensorFlow Serving. Imports `version`.
"""
