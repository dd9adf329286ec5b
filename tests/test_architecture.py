"""The package is built in floors: imports go down only, five packages at run time, no effect on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    ["config"],
    ["distributed", "normconv"],
    [
        *("blocks", "cases", "checkpoint", "diffusion_kernel", "logger", "losses", "maps", "metrics"),
        *("phantoms", "volumes"),
    ],
    [
        *(
            "conditions",
            "discriminators",
            "morphology",
            "pages",
            "scan",
            "scores",
            "transforms",
            "unet",
            "vae",
        ),
        "vqvae",
    ],
    ["cdal", "conditioning", "data", "guidance", "registers", "training"],
    ["denoiser", "latents", "runs", "volume_sets"],
    ["latent_diffusion"],
    ["editing", "features", "memory", "segmentation"],
    ["comparison", "fidelity", "requests"],
    ["evaluation", "memorisation", "register_analysis", "report"],
    ["analysis"],
    ["__init__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
RUNTIME = {"torch", "numpy", "nibabel", "tifffile", "tqdm"}
MODULES = sorted((ROOT / "ldm3d").glob("*.py"))
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if p.name != "setup.py")


def top_level_imports(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_has_a_floor_and_imports_lower_floors_only(path):
    assert path.stem in FLOOR, f"give {path.stem} a floor"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert FLOOR[node.module] < FLOOR[path.stem], f"{path.stem} imports {node.module}"


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda p: p.name)
def test_nothing_but_the_five_packages_is_imported_at_the_top(path):
    for name in top_level_imports(path):
        first = name.split(".")[0]
        assert name.startswith(".") or first in RUNTIME | {"ldm3d"} | set(sys.stdlib_module_names), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_does_not_import_another_script(path):
    assert not {p.stem for p in SCRIPTS} & set(top_level_imports(path))


def test_importing_the_package_does_nothing_else_and_takes_under_two_seconds_beyond_torch():
    code = (
        "import random, time, torch, numpy as np\n"
        "import nibabel, tifffile, tqdm\n"
        "before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()\n"
        "start = time.perf_counter(); import ldm3d; seconds = time.perf_counter() - start\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert seconds < 2, seconds\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_the_top_level_holds_what_the_design_card_names():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    allowed = {"ldm3d", "tests", "train_vae.py", "train_ldm.py", "train_cdal.py", "sample.py", "setup.py"}
    allowed |= {"README.md", "LICENSE", "constraints.txt"}
    top = {name.split("/")[0] for name in listed}
    assert {name for name in top if not name.startswith(".")} <= allowed
