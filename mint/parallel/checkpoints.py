"""torch.distributed.checkpoint: tensors of which each rank holds all or a part, to and from a folder that all ranks see.

On the disk there is no pickle: each rank has one safetensors file in the layout of torch's `HuggingFaceStorageReader`,
which reads them, and what torch calls metadata stands in their headers. When they save, torch's ranks tell each other
in pickles who writes what; nothing of that comes from a file.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .parts import OFFSETS, SHARDING
from .ranks import size, together

Write = Callable[[dict[str, Tensor], dict[str, str]], None]
"""Writes a file of these tensors with this metadata."""


def save_parts(tensors: Mapping[str, Tensor], write: Write) -> None:
    """Have each rank write what it alone holds, or is to write of what several hold; every rank must ask. Ends on all
    ranks when all have written, or with the error of one."""
    with _quietly(), together():
        save(dict(tensors), storage_writer=_Writer(write), no_dist=size() == 1)


def load_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, or this rank's parts of them, with what lies in a folder, however many ranks wrote it."""
    with _quietly():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """No two lines of a log for each tensor, no warning that one process is alone; an error comes out as it was raised, on
    this rank or on another."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    finally:
        logging.disable(level)


class _Writer(StorageWriter):
    """One file a rank. torch's own writer builds a file in memory, and no two of its files are the same bytes."""

    def __init__(self, write: Write) -> None:
        self.write = write

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, begins = {}, {}
        for item in plan.items:
            tensor: Any = planner.resolve_data(item)
            if tensor.numel() and item.tensor_data is not None:  # of few rows some ranks have none
                tensors[item.index.fqn] = tensor.detach()
                begins[item.index.fqn] = {OFFSETS: list(item.tensor_data.chunk.offsets)}
        self.write(tensors, {SHARDING: json.dumps(begins, separators=(",", ":")), "DCP_VERSION": "1.0"})
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, None) for item in plan.items])
        return done

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, _: Any) -> bool:
        return False
