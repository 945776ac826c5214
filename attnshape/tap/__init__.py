"""Queries and keys out of a running model."""

from attnshape.tap.tap import AttentionTap

__all__ = ["AttentionTap"]
