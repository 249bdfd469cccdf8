"""From a source to rows: `discover` (files → pieces), `formats` (how they are opened), `readers`
(pieces → Arrow batches), `cells` (columns → ids, numbers, times), `log` (good rows and bad ones, as
a pipeline), `consumed` (files that were read before), `settings`. Imports `beam`, `contract`.
"""
