"""Hand-offs between programs of one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def arrive(p_counter):
    """Publishes what this program wrote; how many arrived before, whose writes are then visible."""
    tl.debug_barrier()
    before = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def publish(p_flag):
    """Publishes what this program wrote."""
    tl.debug_barrier()
    tl.atomic_xchg(p_flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(p_counters, wanted, count):
    """Until the ``wanted`` counters ([N]) add up to ``count``; what was written before is visible then."""
    seen = count * 0
    while seen < count:
        counted = tl.atomic_add(p_counters, 0, mask=wanted, sem="acquire", scope="gpu")
        seen = tl.sum(tl.where(wanted, counted, 0))
    tl.debug_barrier()


@triton.jit
def together():
    """Loads before it wait together, where what is made of them needs a load after it.

    Else ptxas may compute between them, in fewer registers, and each load waits for the one before.
    """
    tl.debug_barrier()
