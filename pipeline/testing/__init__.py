"""Small data and stand-ins for stores, registries and trainers, for our tests and users'."""
