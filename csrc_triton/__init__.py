"""Triton kernels and their launchers; arguments are checked by the caller."""

from csrc_triton.column import column_credit_raw, rollout_raw
from csrc_triton.fused import Attention, Swept, attention_row, sweep
from csrc_triton.launch import interpreted
from csrc_triton.whiten import whiten

__all__ = [
    "Attention",
    "Swept",
    "attention_row",
    "column_credit_raw",
    "interpreted",
    "rollout_raw",
    "sweep",
    "whiten",
]
