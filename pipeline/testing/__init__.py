"""Small data, and stores, registries and trainers that stand in for the real ones: for tests, the project's and its users'."""
