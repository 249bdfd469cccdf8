"""The REST API: routes, pages and the application are in `api`, what stands around them in `guard`.

`codec` reads and writes bodies of `:predict`, `messages` those of `:retrieve`, `tensors` their
values. Imports `rpc.codec`, `runtime` and what lies below.
"""
