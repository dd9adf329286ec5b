"""The page of `python -m ldm3d.engine` tells what the machine has, and what follows for a run."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm3d.engine import machine
from ldm3d.engine.__main__ import main
from ldm3d.engine.distributed import run_script
from ldm3d.engine.training import amp_dtype

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def page(capsys):
    """page(): title -> words of every line that the program prints."""

    def lines() -> dict[str, str]:
        main([])
        out = capsys.readouterr().out
        return {line[2:14].strip(): line[15:] for line in out.splitlines() if line.startswith("  ")}

    return lines


def test_the_program_prints_the_page_and_takes_no_words():
    done = subprocess.run(
        [sys.executable, "-m", "ldm3d.engine"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert all(f"{title}\n  " in done.stdout for title in ("This machine", "What follows", "Packages"))
    assert f"torch        {torch.__version__}\n" in done.stdout
    assert run_script(main, ["brats"]) == 2


def test_cores_memory_precision_and_versions_are_those_of_this_machine(page, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)  # no limits
    found = page()
    assert found["cores"].startswith(f"{len(os.sched_getaffinity(0))} for this process")
    free, total = map(float, re.match(r"([\d.]+) of ([\d.]+) GiB free", found["memory"]).groups())
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert total == pytest.approx(pages / 2**30, rel=0.05, abs=0.1)
    assert 0 < free <= total
    if not torch.cuda.is_available():
        assert amp_dtype("auto", CPU) is None
        assert found["precision"] == "--run.amp auto means fp32"
        assert found["device"] == "--run.device auto means cpu"
    assert found["python"] == platform.python_version()
    assert "gloo" in found["ranks"]
    assert found["workers"].startswith("started by fork")


def test_the_limits_of_a_container_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text(f"{64 * 2**20}\n")
    (tmp_path / "memory.current").write_text(f"{48 * 2**20}\n")
    assert machine.usable_cores() == 0.5
    assert machine.cores_of_rank() == 1
    assert machine.memory() == (16 * 2**20, 64 * 2**20)
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {8 * 2**20}\nactive_file 3\n")
    assert machine.memory() == (24 * 2**20, 64 * 2**20)
    assert machine.free_bytes(CPU) == 24 * 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.free_bytes(CPU) == 6 * 2**20
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    assert machine.memory()[1] > 64 * 2**20
    (tmp_path / "cpu.max").write_text("1600000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert machine.cores_of_rank() == 16
    monkeypatch.setattr(machine, "ranks_here", lambda: 4)
    assert machine.cores_of_rank() == 4


def test_the_extras_are_those_of_setup_and_a_missing_package_names_the_line_that_installs_it(
    page, monkeypatch
):
    setup = (ROOT / "setup.py").read_text()
    for name, (_, packages) in machine.EXTRAS.items():
        listed = re.search(rf"^{name.upper()} = \[(.*)\]$", setup, re.MULTILINE)[1]
        assert tuple(re.findall(r'"(.+?)"', listed)) == packages
    assert set(re.findall(r'^        "(\w+)": [A-Z]', setup, re.MULTILINE)) == machine.EXTRAS.keys()
    real = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda name: None if name == "plotly" else real(name))
    assert page()["[analysis]"].endswith('; missing plotly: pip install "ldm3d[analysis]"')
    assert machine.version_of("numpy") == __import__("numpy").__version__
    assert real("no-such-package") is None


def test_without_a_compiler_compiling_is_said_to_be_impossible(page, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert page()["compile"] == "not possible: --run.compile needs a compiler, such as gcc and g++"
    (tmp_path / "my-c++").write_text("")
    (tmp_path / "my-c++").chmod(0o700)
    monkeypatch.setenv("CXX", "my-c++")
    assert page()["compile"] == "possible (my-c++)"
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "the package triton" in machine.compile_line(cuda=True)


def test_gpus_have_a_line_each_and_one_that_torch_cannot_use_is_said_with_the_reason(page, monkeypatch):
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": lambda i: f"NVIDIA X{i}",
        "mem_get_info": lambda i: (3 * 2**30, 4 * 2**30),
        "is_bf16_supported": lambda including_emulation: False,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = page()
    assert found["cuda:1"] == "NVIDIA X1, 3.0 of 4.0 GiB free"
    assert found["device"] == "--run.device auto means cuda"
    assert found["precision"] == "--run.amp auto means fp16"
    assert found["ranks"].endswith("torchrun --nproc_per_node 2 uses all GPUs")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=4 * 2**30)
    )
    words = machine.describe_device(torch.device("cuda", 1), "auto")
    assert words.startswith("cuda:1, NVIDIA X")
    assert words.endswith(", 4 GiB, fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "why_no_cuda", lambda: "the driver is too old")
    assert page()["GPU"] == "there is one, but torch cannot use it: the driver is too old"


FAULTS = """
import resource, torch
from ldm3d.engine.machine import free_bytes, keep_freed_memory

def asked_for():
    tensors = [torch.ones(5_000_000) for _ in range(5)]  # 20 MB each
    del tensors
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        tensors = [torch.ones(5_000_000) for _ in range(5)]
        del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()

def held():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024

print(asked_for(), keep_freed_memory(), asked_for(), held(), free_bytes(torch.device("cpu")) and held())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="this machine has another allocator than glibc's"
)
def test_freed_memory_is_used_again_until_somebody_asks_what_is_free():
    env = {k: v for k, v in os.environ.items() if k not in machine.MALLOC_SETTINGS}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True)
    before, kept, after, held, left = done.stdout.split()
    everything = 4 * 5 * 20_000_000
    assert int(before) > 0.25 * everything
    assert kept == "True"
    assert int(after) < 0.15 * everything
    assert int(held) - int(left) > 0.9 * 5 * 20_000_000


def test_settings_of_the_user_and_another_allocator_stay_as_they_are(monkeypatch):
    def load(name):
        raise AssertionError("changed")

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    assert machine.keep_freed_memory() is False
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace())  # no mallopt
    assert machine.keep_freed_memory() is False
