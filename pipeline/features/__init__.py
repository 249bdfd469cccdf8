"""Attributes of users and items: `job`, `tables` (kinds of columns), `values`, `encoding` (codes
and numbers), `columns` (their files), `join` (by id). Imports `prepare` and what lies below.
"""
