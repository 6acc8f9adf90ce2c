"""The pure protocol core. `raft.py` holds every transition; the rest are leaves."""
