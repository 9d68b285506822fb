"""One training run, without Spark: what is asked for, planned, kept and recorded."""
