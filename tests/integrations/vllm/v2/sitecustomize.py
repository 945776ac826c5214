"""Has Triton find a driver on a CPU: vLLM's second model runner then runs in Triton's interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    class _Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class _Backend:
        driver = _Driver
        compiler = None

    backends.setdefault("cpu", _Backend)
