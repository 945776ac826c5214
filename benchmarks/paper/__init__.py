"""The paper's experiments at a size that runs on a CPU: ``python -m benchmarks.paper``; see README.md."""
