"""What every job needs of Beam: `options`, `accounting` (nothing is lost between steps), `staging`
(the directory that becomes the output), `blocks` (the element that travels). Imports `contract`.
"""
