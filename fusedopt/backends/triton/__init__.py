"""The triton backend: a Triton module per kernel."""
