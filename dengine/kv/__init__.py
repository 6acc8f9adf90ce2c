"""Pure and deterministic: commands and the state machine that applies them."""
