"""The `dengine` command line."""
