"""One process or many: torch.distributed behind a few functions that also work without a process group.

Under torchrun or srun every process ("rank") runs the same script on its part of each batch: gloo on CPU,
NCCL on GPU. Without these there is one rank, and every function here does what one rank needs: nothing.

Ranks must take the same decisions, or they would wait for each other for ever: `any_rank` and `broadcast`.
Randomness is keyed by the position of a sample in the run (`keyed_generator`), never by the rank.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import InputError

EXIT_USER, EXIT_OURS, EXIT_TERMINATED = 2, 1, 143
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class Terminated(Exception):
    """SIGTERM or Ctrl-C arrived on some rank, and all ranks have saved. The exit code is 143."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_here() -> int:
    """Ranks on this machine, which share its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print0(*words: Any) -> None:
    """Print on rank 0 only."""
    if is_main():
        print(*words, flush=True)


def setup(device: str = "auto") -> torch.device:
    """Join the process group if torchrun or srun started us, and choose this rank's device ("auto": CUDA
    where there is one)."""
    if not launched():
        for name, value in ranks_of_srun(os.environ).items():
            os.environ.setdefault(name, value)
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launched() and not dist.is_initialized():
        # gloo beside NCCL: decisions and counts are CPU tensors, which need no synchronisation with the GPU.
        # The long timeout is for the first reading of the data by rank 0, while the other ranks wait.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return chosen


def ranks_of_srun(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from the variables of a plain ``srun``; {} for any other process.

    Only a step that srun has started has SLURM_STEP_NUM_TASKS. The shell of sbatch or salloc has SLURM_NTASKS
    and SLURM_PROCID 0 as well: a process that is started there without srun is alone, and must not wait for
    others. Example: task 5 of 8, on the second of the nodes gpu[03-04], of job 812, step 0, is rank 5 of 8,
    local rank 1, and meets the others at gpu03, port 10000 + (31 * 812 + 0) % 20000 = 15172.
    """
    num = int(env.get("SLURM_STEP_NUM_TASKS") or 1)
    if num == 1 and int(env.get("SLURM_NTASKS") or 1) > 1 and "RANK" not in env:
        print(
            f"note: the job has {env['SLURM_NTASKS']} tasks, but this process was not started by srun: "
            "it runs alone (srun python ... makes one run of all tasks)",
            flush=True,
        )
    if num == 1 or "RANK" in env:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    alone = env.get("SLURM_STEP_NUM_NODES") == "1"
    number = 31 * int(env.get("SLURM_JOB_ID", 0)) + int(env.get("SLURM_STEP_ID", 0))
    bound = torch.cuda.device_count() == 1  # --gpus-per-task: every task sees its own GPU as number 0
    per_node = re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # "4(x2),3"
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(num),
        "LOCAL_RANK": "0" if bound else env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(max(map(int, per_node), default=1)),  # shares of a node's memory
        "MASTER_ADDR": "127.0.0.1" if alone else first_host(nodes),
        "MASTER_PORT": str(10000 + number % 20000),
    }


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "gpu[03-06,9],cpu1" -> "gpu03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def launched() -> bool:
    """Was this process started as one rank, by torchrun or the like? (srun: once `setup` was called.)"""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def refuse_ranks(what: str) -> None:
    """InputError if torchrun or srun started several processes: `what` would do all of its work in each."""
    num = int((os.environ | ranks_of_srun(os.environ)).get("WORLD_SIZE", 1))
    if num > 1:
        raise InputError(f"{what}: works in one process, and {num} were started (torchrun or srun)")


NVIDIA = ("/dev/nvidiactl", "/proc/driver/nvidia/version")  # there where a driver is loaded


def why_no_cuda() -> str | None:
    """Why torch cannot use the NVIDIA device or driver of this machine; None if it can, or there is none.

    Without these words a broken driver, or a torch for CPUs, would only be noticed by its slowness.
    """
    if torch.cuda.is_available() or not (any(map(os.path.exists, NVIDIA)) or shutil.which("nvidia-smi")):
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every device"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return " ".join(str(e).split()) or type(e).__name__
    return "it finds no device"


def choose_device(device: str) -> torch.device:
    """The device that `device` names, under torchrun the rank's own GPU; InputError if there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected auto, cpu or cuda, got {device!r}")
    if chosen.type == "cpu":
        return chosen
    if not torch.cuda.is_available():
        reason = f": {why}" if (why := why_no_cuda()) else ""
        raise InputError(f"device: {device!r} asked for, but torch sees no CUDA device{reason}")
    local = int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0
    if chosen.index is not None and local:
        raise InputError(f"device: {device!r} is one device, but every rank needs its own; say cuda")
    chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
    if chosen.index >= torch.cuda.device_count():
        raise InputError(
            f"device: {chosen} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor itself without a process group. CPU and GPU tensors both work."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one: how ranks take decisions together."""
    return bool(all_reduce_sum(torch.tensor(float(flag))).item() > 0)


def barrier() -> None:
    """Wait for all ranks."""
    all_reduce_sum(torch.zeros(()))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block while the others wait; then the others run it. For downloads, caches, folders.

    If rank 0 fails, its error ends the run, and torchrun ends the other ranks.
    """
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def broadcast(value: Any) -> Any:
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


def wrap(net: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """What a training loop calls in place of `net`: DDP around it if there is a process group, else `net`
    itself; `compiled` compiles the network in place first.

    Our networks have no buffers that training changes and no unused parameters, so DDP need not look for
    them. Gradients live in DDP's buckets, so there is one copy of them.
    """
    if compiled:
        net.compile()
    if not dist.is_initialized():
        return net
    ids = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # since torch 2.13
    quiet = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return ddp(net, device_ids=ids, gradient_as_bucket_view=True, **quiet)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Where gradients accumulate over micro-batches, DDP reduces them once, in the last one."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def keyed_generator(seed: int, position: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "t", ...) and one sample, the same on every machine.

    `position` counts the samples of the whole run: step * batch_size + index in the global batch. So a
    sample's noise, time, dropped conditions and augmentation do not depend on ranks, micro-batches or
    workers, and no random state is stored. Example: with batch size 8 the third sample of step 5 has position
    42 on one rank and on four.
    """
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class SigtermFlag:
    """Remembers that SIGTERM or Ctrl-C arrived. The loop looks between steps, where everything can be saved.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self) -> None:
        self.raised, self.before = False, {}
        with contextlib.suppress(ValueError):  # not in the main thread: somebody imports us
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Give the signals back the effect that they had before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.raised = True
        if signum == signal.SIGINT:
            signal.signal(signum, self.before[signum])


def run_script(
    main: Callable[[list[str] | None], None], argv: list[str] | None = None, resumes: bool = False
) -> int:
    """Run a script's main and return its exit code: 0 done, 2 the user's mistake, 1 ours, 143 SIGTERM.
    resumes: the script has checkpoints, from which the same command goes on.

    An error on one rank ends the others as well: this process exits without waiting for them, they lose the
    connection, and torchrun stops the rest.
    """
    try:
        main(argv)
        code = 0
    except Terminated as e:
        print0(e)
        code = EXIT_TERMINATED
        with contextlib.suppress(Exception):
            barrier()  # torchrun ends all ranks as soon as one has ended: rank 0 must have said why
    except KeyboardInterrupt:
        more = "; the same command goes on from the last checkpoint, if there is one"
        print0("interrupted" + more * resumes)
        code = 130
    except Exception as e:
        who = f"rank {rank()}: " if world_size() > 1 else ""
        try:
            message, code = explain(e)
        except RuntimeError as late:  # the signal of a dead worker process may come only now, as an exception
            message, code = explain(late)
        print(f"{who}{message}", file=sys.stderr, flush=True)
        tell_torchrun(e, f"{who}{message}")
    if dist.is_initialized():
        # No orderly exit: after an error it would wait for other ranks, which wait for this one; after
        # success, threads of gloo that still run may abort a process whose work is done
        if code == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def tell_torchrun(e: Exception, message: str) -> None:
    """torchrun ends a failed job with some forty lines of its own. Their last ones show what the rank that
    failed first has written to the file of this name: our message, so that it comes first and last.

    A rank that only lost its connection to the one that failed writes nothing, and comes before it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or lost_connection(e):
        return
    # torchrun blames the rank of the earliest whole second: a rank that is lost in the same one comes after
    extra = {"py_callstack": message, "timestamp": str(int(time.time()) - 1)}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def lost_connection(e: Exception) -> bool:
    """Does the exception say that another rank is gone?"""
    return isinstance(e, dist.DistError) or "gloo/transport" in (str(e).splitlines() or [""])[0]


def out_of_memory(e: Exception) -> str | None:
    """What was full, in words, if the exception says that memory ran out, on a GPU or not; else None."""
    reason = " ".join((str(e).splitlines() or [""])[0].split())
    if isinstance(e, torch.OutOfMemoryError):
        return f"the GPU's memory is full ({reason})"
    if isinstance(e, MemoryError):  # of numpy too
        return f"the memory is full ({reason})" if reason else "the memory is full"
    if isinstance(e, RuntimeError) and "DefaultCPUAllocator" in reason:
        return f"the memory is full ({reason.partition('DefaultCPUAllocator: ')[2]})"
    return None


def explain(e: Exception) -> tuple[str, int]:
    """What to print for an exception: (one line where the user can act, else the traceback; exit code)."""
    first = (str(e).splitlines() or [""])[0]
    if isinstance(e, InputError):
        return f"error: {e}", EXIT_USER
    if what := out_of_memory(e):
        return (
            f"error: {what}; try a lower micro_batch_size, a smaller data.patch (data.size where whole cases "
            "are read), or checkpointing of the network; --plan prints beforehand what fits"
        ), EXIT_USER
    if isinstance(e, OSError) and e.errno in NO_ROOM:
        return f"error: {e.filename or 'a file could not be written'}: {e.strerror}", EXIT_USER
    if isinstance(e, RuntimeError) and "DataLoader worker" in first:  # raised wherever the main process is
        return (
            f"error: run.workers: a data-loading process died ({first.strip()}); often memory, or shared "
            "memory, ran out: the same command with fewer --run.workers goes on from the last checkpoint"
        ), EXIT_USER
    if lost_connection(e):
        return f"stopped, because the connection to another rank was lost ({first})", EXIT_OURS
    return traceback.format_exc(), EXIT_OURS
