"""Attributes of users and items: `job`, `tables` (kinds of columns), `values`, `encoding` (codes
and numbers), `join` (by id, and their files). Imports `prepare` and what lies below.
"""
