"""Adapters: Spark, Delta tables, the MLflow registry, and the profile that configures them."""
