"""Measuring: the one clock, the cases and the check that ``attnshape bench`` and ``benchmarks/`` share."""
