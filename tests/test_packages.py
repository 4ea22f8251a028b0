"""Which package may import which, what importing costs, and what the wheel carries."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("distill", "teachers", "students")
BUILT_FROM = ("pyproject.toml", "setup.py", "LICENSE")
MAY_IMPORT: dict[str, set[str]] = {"distill": set(), "teachers": {"distill"}, "students": {"distill"}}


def imported(source: str) -> Iterator[str]:
    """The top-level package of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def test_imports_are_found_wherever_they_stand():
    source = "import a.b as c\nfrom . import d\ndef f():\n    from e.f import g\n    import h, i.j"
    assert sorted(imported(source)) == ["a", "e", "h", "i"]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    forbidden = set(PACKAGES) - {package} - MAY_IMPORT[package]
    for file in files:
        wrong = forbidden & set(imported(file.read_text(encoding="utf-8")))
        assert not wrong, f"{file.relative_to(REPOSITORY)} imports {wrong}; {package} must not"


def test_import_distill_is_light():
    heavy = ["faiss", "transformers", "datasets", "evaluate"]
    code = f"import sys, distill; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_packages_and_the_recipes(tmp_path: Path):
    """A recipe or template left out is not missed in a checkout, only by those who install the wheel."""
    build, wheels = tmp_path / "build", tmp_path / "wheels"
    unwanted = shutil.ignore_patterns("__pycache__", ".*")
    for folder in (*PACKAGES, "recipes"):
        shutil.copytree(REPOSITORY / folder, build / folder, ignore=unwanted)
    for file in (*REPOSITORY.glob("*.md"), *(REPOSITORY / name for name in BUILT_FROM)):
        shutil.copy(file, build)
    expected = {
        f"distill/{path}" if path.startswith("recipes/") else path
        for path in (p.relative_to(build).as_posix() for p in build.glob("*/**/*") if p.is_file())
    }
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, build],
        check=True,
        capture_output=True,
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    assert any(path.startswith("distill/recipes/") for path in expected)
    assert expected <= carried
    assert {path.split("/")[0] for path in carried if ".dist-info" not in path} == set(PACKAGES)
