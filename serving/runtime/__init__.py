"""What both APIs call: `service`.

Versions come and go in `manager` (by `configuration`), and are served from `served_models`;
requests are joined in `batch_queue`. Imports `retrieval` and what lies below.
"""
