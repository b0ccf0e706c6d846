"""The promises of the project as a whole: what it imports, ships and refers to."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery import shipped

HEAVY = {
    "diffusers",
    "huggingface_hub",
    "pydantic",
    "rich",
    "ruamel",
    "timm",
    "transformers",
    "typer",
}
# In pieces, so that this file does not contain what it looks for.
NOT_OURS = re.compile(
    "|".join(
        [
            r"\.\./" + "shared",
            r"(?<![\w.])/(?:work|root|home|opt|Users)" + r"/\w",
            "pypi" + r"\.org",
            "files\\.python" + "hosted",
            "registry\\." + "npmjs",
            "index" + "-url",
            "find" + "-links",
        ]
    )
)
COSTS = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import surgery
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "added": sorted(set(sys.modules) - before)}))
"""


def test_import_costs_little_over_torch(root: Path):
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", COSTS], cwd=root, capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    added = {name.partition(".")[0] for run in runs for name in run["added"]}
    assert "surgery" in added
    assert not added & HEAVY
    # The quicker of two: the cost is the library's, a busy machine's pauses are not.
    assert min(run["seconds"] for run in runs) <= 0.3


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=root,
        capture_output=True,
        check=True,
    )
    (path,) = folder.glob("model_surgery-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_is_typed_and_licensed(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    assert {"surgery/py.typed", "architectures/py.typed"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_has_nothing_but_the_packages(wheel: zipfile.ZipFile):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"surgery", "architectures"}


def test_wheel_ships_the_rule_files_of_the_checkout(root: Path, wheel: zipfile.ZipFile):
    here = {path.name: path.read_bytes() for path in (root / "configs" / "rules").glob("*.yaml")}
    inside = {
        Path(name).name: wheel.read(name)
        for name in wheel.namelist()
        if name.startswith("surgery/configs/rules/")
    }
    assert here
    assert inside == here


def test_wheel_declares_the_command_and_the_version(wheel: zipfile.ZipFile):
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert "surgery = surgery.cli:main" in wheel.read(entry_points).decode()
    assert f"\nVersion: {surgery.__version__}\n" in wheel.read(metadata).decode()


def test_shipped_rule_files_load(root: Path):
    rules = shipped.rules()
    assert set(rules) == {path.stem for path in (root / "configs" / "rules").iterdir()}
    for path in rules.values():
        assert surgery.Recipe.load(path).rules


def test_licence_is_the_whole_apache_licence(root: Path):
    text = (root / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text


def test_no_file_names_a_machine_or_a_registry(root: Path):
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in project_files(root)
        for number, line in enumerate(readable(path).splitlines(), start=1)
        if NOT_OURS.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    "line", ["see .." + "/shared/design", "cd /" + "work/main", "--extra-index" + "-url x"]
)
def test_the_pattern_finds_what_it_is_for(line: str):
    assert NOT_OURS.search(line)


def test_architectures_import_torch_and_einops_only(root: Path):
    # triton comes with torch where there is a GPU to run its kernels, and is imported there alone.
    allowed = {"torch", "triton", "einops", "architectures", *sys.stdlib_module_names}
    found = {
        f"{path.relative_to(root)}: {name}"
        for path in (root / "architectures").rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] not in allowed
    }
    assert not found


def test_no_module_imports_through_the_facade(root: Path):
    """``from surgery import plan`` below the facade would make it import itself."""
    package = root / "surgery"
    submodules = {path.stem for path in package.iterdir()}
    public = set(surgery.__all__) - submodules
    found = {
        f"{path.relative_to(root)}: {name}"
        for path in package.rglob("*.py")
        if package / "cli" not in path.parents and path != package / "__init__.py"
        for name in (*imported(path), *facade_attributes(path))
        if name.startswith("surgery.") and name.removeprefix("surgery.") in public
    }
    assert not found


def test_make_lists_its_commands(root: Path):
    shown = subprocess.run(
        ["make"],  # noqa: S607 - the make on the path is the one that developers use
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ")}
    assert {"demo", "test", "lint", "types", "bench", "clean"} <= listed


def imported(path: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere, ``from a import b`` as ``a.b`` and as ``a``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def facade_attributes(path: Path) -> Iterator[str]:
    """``surgery.plan`` and the like, where a file has the facade itself at hand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def project_files(root: Path) -> list[Path]:
    """Every file under version control, and every new one that is not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [root / name for name in listed.split("\0") if name]
    assert len(paths) > 20
    return [path for path in paths if path.is_file()]


def readable(path: Path) -> str:
    """A file's text; nothing for an image or a tensor file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
