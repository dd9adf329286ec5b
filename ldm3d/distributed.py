"""One process or many: raw torch.distributed behind a few functions that also work with no process group at
all.

Under torchrun every rank runs the same script; without it all of this is a no-op. gloo on CPU, NCCL on GPU.
Randomness is keyed by the position of the sample in the run and not by the rank, so that a run does not
depend on how it is spread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import InputError

EXIT_USER, EXIT_OURS, EXIT_TERMINATED = 2, 1, 143


class Terminated(Exception):
    """SIGTERM arrived, all ranks agreed on it, and the state is saved. The script exits with code 143."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print0(*words: Any) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(*words, flush=True)


def setup(device: str = "auto") -> torch.device:
    """Join the process group if torchrun started us, and choose this rank's device ("auto": CUDA where there
    is one)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device!r} asked for, but torch sees no CUDA device")
    if chosen.type == "cuda":
        chosen = torch.device(
            "cuda", chosen.index if chosen.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        )
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return chosen


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor itself without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True on every rank if it is True on one: how ranks take decisions together."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item() > 0)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait, then they run it (downloads, caches, folders).

    If rank 0 fails, it raises and the others are ended by torchrun.
    """
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def share(value: Any) -> Any:
    """Rank 0's value (plain Python) on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values (plain Python) of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def wrap(net: nn.Module, device: torch.device) -> nn.Module:
    """DDP around `net` if there are several ranks, else `net` itself.

    Our networks have no buffers that training changes and no unused parameters, so DDP needs neither of its
    searches.
    """
    if world_size() == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Accumulation: gradients are reduced once, in the last micro-batch of a step."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def keyed_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of the sample at one position of the run: the same on every machine.

    `position` counts samples over the whole run (step * batch_size + place in the batch), so that noise, t,
    condition dropout and augmentation depend on neither ranks, micro-batches nor workers, and nothing random
    need be stored.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class SigtermFlag:
    """Remembers that SIGTERM arrived; the loop looks at it between steps, where everything can be saved."""

    def __init__(self) -> None:
        self.raised = False
        with contextlib.suppress(
            ValueError
        ):  # not in the main thread: somebody imports us; leave signals alone
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.raised = True


def run_script(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Run a script's main and turn how it ended into an exit code: 0 done, 2 the user's mistake, 1 ours, 143
    SIGTERM.

    An error on one rank ends the others as well: the process exits without waiting for them, and torchrun
    stops the rest.
    """
    try:
        main(argv)
        code = 0
    except Terminated as e:
        print0(e)
        code = EXIT_TERMINATED
    except InputError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        code = EXIT_USER
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        code = 130
    except Exception:
        where = f"rank {rank()}: " if world_size() > 1 else ""
        print(f"{where}{traceback.format_exc()}", file=sys.stderr, flush=True)
        code = EXIT_OURS
    if code in (0, EXIT_TERMINATED) and dist.is_initialized():
        dist.destroy_process_group()
    if code not in (0, EXIT_TERMINATED) and dist.is_initialized():
        os._exit(code)  # a rank that waits in a collective would never be reached by an orderly exit
    return code
