"""The towers: ids, attributes and histories → embeddings.

`make_towers` makes the `TowerPair` that a `tower_config` names; `tower` says what a tower is.
Imports `metrics`, `data`, and of `samplers` what a method sees of the towers.
"""
