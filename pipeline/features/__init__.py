"""From raw tables to feature tables: the SQL's rules, features of the past, categories."""
