"""`make test` knows no framework: an adapter's proof is collected where its framework is installed."""

from importlib.util import find_spec

FRAMEWORKS = ("openrlhf", "slime", "trl", "verl")
collect_ignore = [f"test_{name}_adapter.py" for name in FRAMEWORKS if find_spec(name) is None]
