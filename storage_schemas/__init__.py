"""The store: its format (FORMAT.md is the norm) and the code that writes and reads it."""
