"""What a GPU is asked in the minutes that it is there: ``make gpu``, ``make gpu-more``, ``make gpu-cache``.

Parts follow each other, the most valuable first (`benchmarks.on_gpu.parts`). Each is a process of its own,
watched by one that imports neither torch nor Triton (`runner`): it says what it is about to do, kernel by
kernel, and is ended when it says nothing for too long. What it finds is a line of JSON, written at once.
After a hang, a death or a wrong number the part goes on without the kernels that are to blame. `summary`
makes tables of the lines.
"""
