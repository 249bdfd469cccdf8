"""From a source to rows: `discover` (files → pieces), `readers` (pieces → Arrow batches), `cells`
(columns → ids, numbers, times), `validate` (good rows and bad ones), `log` (all of it as a
pipeline), `consumed` (files that were read before), `settings`. Imports `beam`, `contract`.
"""
