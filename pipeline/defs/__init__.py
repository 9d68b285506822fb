"""The fleets: one folder each, with its defs.yaml and features.sql."""
