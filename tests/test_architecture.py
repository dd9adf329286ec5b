"""The package is built in floors: imports go down only, five packages at run time, no effect on import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # a folder has one floor: "data" stands for all of data/
    ["config"],
    ["normconv", "metrics", "diffusion_kernel", "lora"],
    ["blocks", "engine"],
    ["large"],
    ["vae", "discriminators", "unet", "losses", "conditions", "data"],
    ["vqvae", "guidance", "conditioner", "registers", "control", "cdal", "latents", "plan"],
    ["denoiser"],
    ["latent_diffusion"],
    ["pipeline"],
    ["evaluation", "interop"],
    ["inference"],
    ["reports"],
    ["__init__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
RUNTIME = {"torch", "numpy", "nibabel", "tifffile", "tqdm"}
MODULES = sorted((ROOT / "ldm3d").rglob("*.py"))
SCRIPTS = sorted(p for p in ROOT.glob("*.py") if p.name != "setup.py")


def top_level_imports(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def name_of(path: Path) -> str:
    """ldm3d/data/cases.py -> data.cases"""
    return ".".join(path.relative_to(ROOT / "ldm3d").with_suffix("").parts)


def relative_imports(path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere, as data.cases."""
    here, found = name_of(path).split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_a_floor_and_imports_lower_floors_only(path):
    own = name_of(path).split(".")[0]
    assert own in FLOOR, f"give {own} a floor"
    for name in relative_imports(path):
        target = name.split(".")[0]
        inside = target == own and "." in name
        assert inside or FLOOR[target] < FLOOR[own], f"{name_of(path)} imports {name}"


def test_modules_of_a_folder_do_not_import_each_other_in_a_circle():
    imports = {name_of(path): relative_imports(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " imports ".join([*trail, name])
        for other in sorted(imports.get(name, set()) - done):
            visit(other, (*trail, name))
        done.add(name)

    for name in imports:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
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
        "start = time.process_time(); import ldm3d; seconds = time.process_time() - start\n"
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
