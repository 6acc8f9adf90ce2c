"""The key-value state machine: pure and deterministic; it knows nothing of Raft or of disks."""
