"""Small data, and stand-ins for stores, registries and trainers, for the project's and users' tests."""
