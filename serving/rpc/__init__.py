"""The gRPC API: services and the server are in `api`, what stands in front of them in `guard`.

`codec` reads and writes tensors and answers; health is in `guard`. Imports `runtime` and what
lies below.
"""
