"""Adapters to the outside: Spark, Delta tables, the MLflow registry, and the profile that configures them."""
