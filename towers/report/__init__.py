"""The pages of runs: `run_page.write_report` and `compare_page.write_comparison`.

Their HTML is in `templates/`, in the frame of `pipeline.contract.pages`, their `plots` are inline
SVG. Imports `training` and what lies below.
"""
