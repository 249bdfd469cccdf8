"""`twotower tune`: Optuna over short trainings.

`study.tune` runs trials of what `space` makes of the `settings` and the default `ranges`;
`report` writes trials.json and tune.html. Imports `training` and what lies below.
"""
