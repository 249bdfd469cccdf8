"""Attributes of users and items: `job`, `tables` (kinds of columns), `values`, `columns` (and
their files), `join` (read, then joined by id). Imports `prepare` and what lies below.
"""
