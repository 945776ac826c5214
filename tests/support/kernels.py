"""Names of the kernels in the sources."""

import re
from pathlib import Path

import csrc_triton


def kernels() -> set[str]:
    """Of all that a launch may start; other functions of Triton's are called by them."""
    written: set[str] = set()
    for path in Path(csrc_triton.__file__).parent.rglob("*.py"):
        written |= set(re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return written
