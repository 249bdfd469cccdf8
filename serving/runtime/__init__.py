"""What both APIs call: `service`.

Versions come and go in `manager`, requests are joined in `batching`. Imports `retrieval` and what
lies below.
"""
