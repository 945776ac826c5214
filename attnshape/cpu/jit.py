"""How the loops are compiled, where the compiled code is kept, and which threads run them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import extending
from numba.core import caching, codegen, compiler, types
from numba.core.types.misc import unliteral
from numba.core.typing import templates

log = logging.getLogger("attnshape.cpu")
F = TypeVar("F", bound=Callable[..., Any])

# No fast-math flag and no contraction into fused multiply-adds: every operation is rounded as it is written,
# so the bits are those of any machine. Division by zero gives infinity, as in PyTorch.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False}


def operation(function: Any, result: types.Type, *of: types.Type) -> Callable[..., Any]:
    """Decorates ``build(builder, *values)``: what it builds is ``function`` of these, an operator too."""
    signature = templates.signature(result, *of)
    template = templates.make_concrete_template(f"{function} {of}", function, [signature])
    templates.builtin_registry.register_global(function, types.Function(template))

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        def lowered(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            found = build(builder, *values)
            return context.get_dummy_value() if result is types.void else found

        extending.lower_builtin(function, *of)(lowered)
        return build

    return decorate


def intrinsic(result: types.Type, *of: types.Type) -> Callable[..., Any]:
    """The same for a function that is not there yet: in compiled code the decorated one is, of ``values``."""
    return lambda build: operation(build, result, *of)(build)


class _Part(codegen.JITCodeLibrary):  # type: ignore[misc]
    """Code that becomes part of others and is never called by itself: optimised there, and there alone."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> _Part:
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Nothing in memory has such a name."""


class _Called(_Part):
    """The same, but what calls it jumps to it: machine code that is made once, not at every call."""

    def add_ir_module(self, module: Any) -> None:
        for function in module.functions:
            if not function.is_declaration:
                function.attributes.add("noinline")
        super().add_ir_module(module)


class _PartCompiler(compiler.Compiler):  # type: ignore[misc]
    kind = _Part

    def define_pipelines(self) -> Any:
        self.state.library = self.kind(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()


class _CalledCompiler(_PartCompiler):
    kind = _Called


def inner(function: F, made_by: type[_PartCompiler] = _PartCompiler) -> F:
    """Compiled as a part of what calls it: once, not once for every constant that it is given."""
    options = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = numba.njit(pipeline_class=made_by, **options)(function)
    template_of = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: template_of([unliteral(x) for x in args], kws)
    return compiled  # type: ignore[no-any-return]


def called(function: F) -> F:
    """``inner``, of code that is long beside a call of it."""
    return inner(function, _CalledCompiler)


def entry(function: F) -> F:
    """Called from Python: compiled at its first call ever, read from a folder afterwards."""
    compiled = numba.njit(no_cfunc_wrapper=True, **OPTIONS)(function)
    compiled._cache = _NoCache() if kept_in() is None else _Cache(function)
    return compiled  # type: ignore[no-any-return]


@functools.cache
def kept_in() -> Path | None:
    """Where compiled code of exactly these sources is kept; None where nothing can be written."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    try:
        kept = Path(chosen) if chosen else _user_caches() / "attnshape"
        folder = kept / f"cpu-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except (OSError, RuntimeError):  # the latter from a user without a home
        return None
    return folder


def _user_caches() -> Path:
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """One folder for all functions: its name stands for all sources, those of the callees too."""

    def __init__(self, line: int) -> None:
        self.line = line

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls(py_func.__code__.co_firstlineno)

    def get_cache_path(self) -> str:
        return str(kept_in())

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return str(self.line)


class _Implementation(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


@functools.cache
def _announce(kept: bool) -> None:
    """Once a process: the command line shows it."""
    if kept:
        log.info("compiling the loops for this CPU, once; later processes load them")
    else:
        log.info("compiling the loops: no folder can be written that would keep them; set NUMBA_CACHE_DIR")


class _NoCache(caching.NullCache):  # type: ignore[misc]
    def load_overload(self, sig: Any, target_context: Any) -> None:
        _announce(False)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    """numba's cache; a file that cannot be read or written costs a compilation and nothing else."""

    _impl_class = _Implementation

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = None
        with contextlib.suppress(Exception):  # whatever a truncated file makes of unpickling
            found = super().load_overload(sig, target_context)
        if found is None:
            _announce(True)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)
