"""Triton kernels and their launchers; arguments are checked by the caller."""

from csrc_triton.attention_row import attention_credit_raw, attention_row
from csrc_triton.launch import interpreted
from csrc_triton.sweep import StatusBits, sweep

__all__ = ["StatusBits", "attention_credit_raw", "attention_row", "interpreted", "sweep"]
