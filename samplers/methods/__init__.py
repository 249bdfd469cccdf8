"""The methods: `by_name` (METHODS, build), `method` (their base), and a module a family.

Imports `proposals`, `selection`, `losses`.
"""
