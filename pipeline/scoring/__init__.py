"""What a model demands of the rows it answers, and where they come from."""
