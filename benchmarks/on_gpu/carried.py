"""A cache of what kernels compile to, made elsewhere and carried to the machine with a GPU.

Triton's cache holds whole paths, so it lies at one place on both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = Path(tempfile.gettempdir()) / "attnshape-on-gpu"
"""Where Triton's cache lies, the same on both machines."""
PACKED = ROOT / ".gpu-cache"
ARCHIVE, MANIFEST = "cache.zip", "manifest.json"
LEFT_OUT = (".llir", ".ttgir", ".ttir", ".source")
"""Stages that nobody reads again."""


@functools.cache
def source_digest() -> str:
    """Of the kernels and what launches them."""
    files = sorted((ROOT / "csrc_triton").rglob("*.py"))
    text = b"".join(path.relative_to(ROOT).as_posix().encode() + path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:16]


def compiler_digest() -> str:
    """Of Triton's own library, by its package: a build may differ from another of the same version."""
    library = [file for file in metadata.files("triton") or () if file.name == "libtriton.so"]
    return library[0].hash.value if library and library[0].hash else "not known"


def manifest() -> dict[str, str]:
    """What a cache is good for, and the kernels it was made of."""
    return {
        "triton": metadata.version("triton"),
        "build": compiler_digest(),
        "python": sysconfig.get_config_var("SOABI") or platform.python_version(),
        "machine": platform.machine(),
        "source": source_digest(),
        "folder": str(CACHE),
    }


def unpacked(packed: Path = PACKED) -> str:
    """Lays a carried cache where Triton will look; says what became of it."""
    if not (packed / MANIFEST).exists():
        return "no cache was carried: kernels are compiled here"
    carried, here = json.loads((packed / MANIFEST).read_text()), manifest()
    other = [
        f"{name} is {here[name]}, of the cache {carried.get(name)}"
        for name in here
        if name != "source" and carried.get(name) != here[name]
    ]
    if other:
        return f"the carried cache is not used: {'; '.join(other)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(packed / ARCHIVE) as archive:
        archive.extractall(CACHE)
    said = f"a cache of {len(list(CACHE.iterdir()))} entries was carried"
    if carried["source"] != here["source"]:
        # Triton finds an entry by all that it is made of, so what changed since is not found.
        said += ", of other kernels: what changed is compiled here"
    return said


def pack(packed: Path = PACKED) -> int:
    """Packs Triton's cache, without what nobody reads again; its bytes."""
    packed.mkdir(exist_ok=True)
    (packed / MANIFEST).write_text(json.dumps(manifest(), indent=1) + "\n")
    with zipfile.ZipFile(packed / ARCHIVE, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(CACHE.rglob("*")):
            if path.is_file() and path.suffix not in LEFT_OUT:
                archive.write(path, path.relative_to(CACHE))
    return (packed / ARCHIVE).stat().st_size
