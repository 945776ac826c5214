"""Triton kernels and what launches them; arguments are checked by the caller."""

from csrc_triton.host.attention import attention_row
from csrc_triton.host.columns import column_credit_raw
from csrc_triton.host.rewards import Shaped, sweep
from csrc_triton.host.rollout import rollout_raw
from csrc_triton.host.whiten import whiten
from csrc_triton.launch import interpreted

__all__ = ["Shaped", "attention_row", "column_credit_raw", "interpreted", "rollout_raw", "sweep", "whiten"]
