"""`twotower tune`: Optuna over short trainings. Imports `training` and what lies below."""
