"""Stand-ins for what slime imports but does not call here: SGLang, and Megatron without its process groups.

Importing this module puts them in place, so it comes before slime.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from unittest.mock import MagicMock

import torch.distributed as dist

ABSENT = ("sglang", "sglang_router", "megatron", "torch_memory_saver", "mbridge")


class _Stub(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object = None, target: object = None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Mpu(spec.name) if spec.name == "megatron.core.mpu" else _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)


class _Mpu(_Stub):
    """``megatron.core.mpu`` where every rank of the default group is a rank of context parallelism."""

    def get_context_parallel_world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def get_context_parallel_rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def get_context_parallel_group(self) -> dist.ProcessGroup:
        return dist.group.WORLD

    def get_data_parallel_group(self, with_context_parallel: bool = False) -> dist.ProcessGroup:
        return dist.group.WORLD

    def get_data_parallel_world_size(self, with_context_parallel: bool = False) -> int:
        return 1

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def is_pipeline_last_stage(self) -> bool:
        return True


sys.meta_path.append(_Finder())
importlib.import_module("megatron.core.mpu")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # slime compiles its KL, which takes longer here than all the rest
