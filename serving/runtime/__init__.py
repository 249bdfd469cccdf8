"""What both APIs call: `service`.

Versions come and go in `manager` (by `configuration`), and are served from `model_versions`;
requests are joined in `batch_queue`. Imports `retrieval` and what lies below.
"""
