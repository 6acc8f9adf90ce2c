"""HTTP, one route table."""
