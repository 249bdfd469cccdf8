"""Attributes of users and items: `job`, `tables` (kinds of columns), `read`, `values`, `columns`,
`moments`, `join` (by id), `files`. Imports `prepare` and what lies below.
"""
