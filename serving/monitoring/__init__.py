"""Metrics of the service, and its logs."""
