"""What runs on Spark: the one subpackage that imports pyspark at module level."""
