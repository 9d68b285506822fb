"""Which rows belong to which group, split and Spark task."""
