"""The pages: `run_page`, `compare_page`, their frame and plots. Imports `training`."""
