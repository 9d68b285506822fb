"""Boosters, answer chains, the pack of one version, and the model that answers from it."""
