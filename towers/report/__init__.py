"""The pages of runs: `pages.write_report` and `pages.comparison_page`.

Their HTML is in `templates/`, in the frame of `pipeline.contract.pages`, their `plots` are inline
SVG. Imports `training` and what lies below.
"""
