"""The three values as tables and as plain dictionaries."""
