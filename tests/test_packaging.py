"""The package as others see it: links, packages, a built wheel, a light import, and the direction of imports."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest

import wsi_engine

ROOT = Path(__file__).resolve().parents[1]


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Full names of every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_links_resolve() -> None:
    for name in ("kernels", "models", "cli"):
        link = ROOT / "wsi_engine" / name
        assert os.readlink(link) == f"../{name}"
        assert link.resolve() == ROOT / name


PARTS = (
    "readers", "encoders", "formats", "metrics", "cohorts", "training", "evaluation", "classification", "nuclei",
    "integrity", "studies", "cluster",
)  # fmt: skip
"""Packages of the flow."""

FOLDERS = ("", *PARTS, "kernels", "models", "models/heads")
"""Folders of modules inside the package, but for the command line."""


def test_the_list_of_packages_is_complete() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    top = ROOT / "wsi_engine"
    folders = [path.parent for depth in ("", "*/", "*/*/") for path in top.glob(f"{depth}__init__.py")]
    there = {".".join(("wsi_engine", *folder.relative_to(top).parts)) for folder in folders}
    assert set(config["packages"]) == there
    assert config["package-dir"] == {f"wsi_engine.{name}": name for name in ("kernels", "models", "cli")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what git would archive, so that nothing of this checkout helps."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        path, copy = ROOT / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.symlink_to(os.readlink(path))
        elif path.exists():
            copy.write_bytes(path.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_a_built_wheel_holds_every_module_and_imports(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    for folder in (*FOLDERS, "cli"):
        for path in modules(ROOT / "wsi_engine" / folder):
            assert str(Path("wsi_engine", folder, path.name)) in names
    assert {
        "wsi_engine/py.typed",
        *(f"wsi_engine/nuclei/weights/student.{end}" for end in ("safetensors", "md")),
    } <= names
    assert not any(name.startswith(("kernels/", "models/", "cli/")) for name in names)
    code = "import wsi_engine, wsi_engine.kernels, wsi_engine.models, wsi_engine.cli; print(wsi_engine.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(str(tmp_path))


def test_the_import_is_light() -> None:
    code = (
        "import sys, wsi_engine\n"
        "heavy = ('torch', 'timm', 'numba', 'zarr', 'scipy', 'numpy', 'PIL', 'tifffile')\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_listing_encoders_and_opening_slides_load_no_torch() -> None:
    code = (
        "import sys, numpy as np, wsi_engine as we\n"
        "we.list_encoders(); we.open_slide(np.zeros((9, 9, 3), np.uint8), mpp=1).close()\n"
        "print(sorted({'torch', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_is_there() -> None:
    assert len(set(wsi_engine.__all__)) == len(wsi_engine.__all__)
    for name in wsi_engine.__all__:
        assert getattr(wsi_engine, name) is not None
    for name in wsi_engine.kernels.__all__:
        assert callable(getattr(wsi_engine.kernels, name))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = wsi_engine.nothing


def test_exported_names_are_documented() -> None:
    for name in set(wsi_engine.__all__) - {"__version__"}:
        assert getattr(wsi_engine, name).__doc__, name


FLOW = (
    "version", "errors", "places", "extents", "arrays", "checks", "metrics", "clock", "bottleneck", "cgroup",
    "workers", "memory", "readers", "fingerprint", "sampling", "slide", "tissue", "grid", "feed", "stream",
    "spreadsheet", "inputs", "encoders", "shards", "slide_record", "store", "writer", "holder", "leaserecord",
    "lease", "failures", "cluster", "jobs", "encoding", "remote", "distribution", "extraction", "bench", "picture",
    "runs", "bags", "cohorts", "predictions", "training", "classification", "evaluation", "nuclei", "formats",
    "integrity", "studies",
)  # fmt: skip
"""Modules in the order of the flow: each imports only what stands before it."""

SIDE = ("tilecodec", "pyramid", "tiffwriter", "synthetic")
"""Slides with known truth are written beside the flow; nothing in the flow needs them."""


def test_modules_import_only_what_lies_upstream() -> None:
    for position, name in enumerate(FLOW):
        path = ROOT / "wsi_engine" / name
        files = modules(path) if path.is_dir() else [path.with_suffix(".py")]
        allowed = {*FLOW[: position + 1], "kernels", "models"}
        for file in files:
            for imported in imports_of(file):
                parts = imported.split(".")
                if parts[0] == "wsi_engine" and len(parts) > 1:
                    assert parts[1] in allowed, f"{file.name} imports {imported}"


def test_every_module_has_its_place() -> None:
    there = {path.stem for path in modules(ROOT / "wsi_engine")} - {"__init__"}
    there |= set(PARTS)
    assert {name for name in there if not name.startswith("synthetic")} <= {*FLOW, *SIDE}
    assert set(FLOW) <= there


def test_kernels_and_models_never_meet() -> None:
    allowed = {
        "kernels": {"numpy", "numba", "wsi_engine.kernels"},
        "models": {"numpy", "torch", "timm", "safetensors", "wsi_engine.models"},
    }
    standard = sys.stdlib_module_names
    for name, packages in allowed.items():
        for file in modules(ROOT / name):
            for imported in imports_of(file):
                if imported.split(".")[0] not in standard:
                    assert any((imported + ".").startswith(one + ".") for one in packages), f"{file} imports {imported}"


def test_the_engine_does_not_know_its_command_line() -> None:
    for folder in FOLDERS:
        for file in modules(ROOT / "wsi_engine" / folder):
            assert not any(one.startswith("wsi_engine.cli") for one in imports_of(file)), file


@pytest.mark.parametrize("package", ["wsi_engine", "wsi_engine.kernels", "wsi_engine.metrics", "wsi_engine.models"])
def test_no_module_hides_a_name(package: str) -> None:
    """Importing a module makes it an attribute of its package, in place of a function of the same name."""
    loaded = importlib.import_module(package)
    modules_there = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")}
    for name in set(getattr(loaded, "__all__", [])) & modules_there:
        assert isinstance(getattr(loaded, name), types.ModuleType), name
        assert getattr(loaded, "_HOMES", {}).get(name) is None, name
