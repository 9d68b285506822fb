"""Files from outside: their formats, where sources are, and the logs of Delta tables."""
