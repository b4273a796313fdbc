"""Triton back-end: one file per kernel, imported only when it is chosen."""
