"""The Beam jobs: raw interactions in, prepared data and frequencies out.

Top: `commands` and `job` (twotower prepare); `schema` is the public name of the contract. Then
`streaming`, `counts`, `features`, `quality`, `prepare`, `read`, `beam`, `contract`: each imports
those after it. Imports no other room.
"""
