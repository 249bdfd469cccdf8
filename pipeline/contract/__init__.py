"""What all rooms agree on, and may import: `schema` (names, columns, manifest, feature files),
`hashing` (fingerprints, order of rows, split rule), `bundle` (what a trainer hands over), `files`
(whole or absent; locks), `settings`, `flags` (commands), `pages` (HTML, plots as SVG).

Imports nothing of ours, neither Beam nor TensorFlow; `pages` alone needs Jinja2.
"""
