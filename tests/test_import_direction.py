"""Who may import whom: train.py, scripts, launcher -> lightning_modules, datamodules, callbacks -> longtake."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIDDLE = {"lightning_modules", "datamodules", "callbacks"}
MAY_IMPORT = {
    "longtake": {"longtake"},
    **{name: {name, "longtake"} for name in sorted(MIDDLE)},
    "launcher": {"launcher", "longtake", *MIDDLE},
    "scripts": {"scripts", "launcher", "longtake", *MIDDLE},
    "benchmarks": {"benchmarks", "launcher", "longtake", *MIDDLE},
    "train.py": {"launcher", "longtake", *MIDDLE},
    "predict.py": {"launcher", "longtake", *MIDDLE},
}
OURS = {*MAY_IMPORT, "tests", "train", "predict"} - {"train.py", "predict.py"}
FRAMEWORKS = {"lightning", "pytorch_lightning", "lightning_fabric", "hydra", "omegaconf"}

# inside longtake: objectives -> rollout -> networks -> geometry, types
ORDER = {"types": 0, "geometry": 0, "errors": 0, "keyed": 0, "networks": 1, "rollout": 2, "objectives": 3}
UNKNOWN_TO_NETWORKS = {"encoders", "pretrained", "metrics", "media"}


def sources(top: str) -> list[Path]:
    path = ROOT / top
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yields the dotted name of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("top", MAY_IMPORT)
def test_imports_point_downwards(top: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(top)
        for name in imported(path)
        if (head := name.partition(".")[0]) in OURS and head not in MAY_IMPORT[top]
    ]
    assert wrong == []


def test_longtake_knows_no_framework() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("longtake")
        for name in imported(path)
        if name.partition(".")[0] in FRAMEWORKS
    ]
    assert wrong == []


def test_the_layers_of_longtake_point_downwards() -> None:
    wrong = []
    for path in sources("longtake"):
        own = path.relative_to(ROOT / "longtake").parts[0].removesuffix(".py")
        for name in imported(path):
            head, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if head != "longtake" or own not in ORDER:
                continue
            if ORDER.get(other, 0) > ORDER[own] or other in UNKNOWN_TO_NETWORKS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def modules(*tops: str) -> list[str]:
    files = [path for top in tops for path in sources(top)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_workers_that_make_or_read_clips_start_without_torch() -> None:
    names = modules("datamodules/sources", "longtake/media", "datamodules/writing/shard_writer.py")
    heavy = "('torch', 'lightning', 'hydra')"
    code = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    code += f"    found = [heavy for heavy in {heavy} if heavy in sys.modules]\n"
    code += "    assert not found, f'{name} imports {found}'\n"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_everything_imports_where_decord_is_missing() -> None:
    names = modules(*MIDDLE, "longtake", "launcher", "scripts", "train.py")
    code = "import importlib, sys\nsys.modules['decord'] = None\n"
    code += f"for name in {names!r}:\n    importlib.import_module(name)\n"
    done = run(code)
    assert done.returncode == 0, done.stderr
