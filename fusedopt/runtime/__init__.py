"""Turns parameter groups into launches of compiled kernels, step after step."""
