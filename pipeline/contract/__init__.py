"""What all rooms agree on, and may import: `schema` (names, columns, manifest), `feature_spec`,
`hashing` (fingerprints, order of rows, split rule), `bundle` (what a trainer hands over), `files`
(whole or absent), `locks`, `settings`, `pages` (frame of HTML pages, plots as SVG).

Imports nothing of ours, neither Beam nor TensorFlow; `pages` alone needs Jinja2.
"""
