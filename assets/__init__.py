"""Dagster: the fleet component, one module per link of the asset chain, and their checks."""
