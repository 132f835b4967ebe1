# SPDX-License-Identifier: Apache-2.0
"""What is shipped: a core that links and exports nothing, an import without side effects."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import hullkit
import pytest
import torch
from hullkit import _core

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
MODULE = Path(_core.__file__)


def _output(*command: str) -> str:
    tool = shutil.which(command[0])
    assert tool, f"{command[0]} is missing: install binutils and libc's tools"
    return subprocess.run(
        [tool, *command[1:]], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def _python(*arguments: str) -> str:
    # From a folder without sources, so that the installed package is what answers.
    return subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT / "tests",
    ).stdout


def test_build_info() -> None:
    info = hullkit.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "simd",
        "cuda",
        "cuda_runtime",
        "cuda_architectures",
        "cuda_devices",
        "cuda_problem",
    }
    assert info["simd"] in ("portable", "avx2", "avx512", "neon")
    assert re.match(r"\w+ \d+", info["compiler"])
    assert isinstance(info["cuda"], bool)
    if info["cuda"]:
        assert re.fullmatch(r"\d+\.\d+", info["cuda_runtime"])
        assert info["cuda_architectures"]
    else:
        assert info["cuda_runtime"] == info["cuda_architectures"] == ""
        assert "built without CUDA" in info["cuda_problem"]
    assert bool(info["cuda_devices"]) != bool(info["cuda_problem"])


@pytest.mark.gpu
def test_every_device_runs_the_code() -> None:
    info = hullkit.build_info()
    assert info["cuda"], "a machine with a device, but a build without CUDA"
    assert len(info["cuda_devices"]) == torch.cuda.device_count()
    assert all("runs sm_" in line for line in info["cuda_devices"]), info["cuda_devices"]


def test_versions_agree() -> None:
    version = importlib.metadata.version("hullkit")
    assert hullkit.__version__ == version == hullkit.build_info()["version"] == _core.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def test_module_exports_its_entry_point_only() -> None:
    symbols = [
        line.split()[-1] for line in _output("nm", "-D", "--defined-only", str(MODULE)).splitlines()
    ]
    assert symbols == ["PyInit__core"]


def test_module_links_nothing_that_can_go_missing() -> None:
    libraries = _output("ldd", str(MODULE))
    assert "not found" not in libraries
    names = {Path(line.split()[0]).name.split(".so")[0] for line in libraries.splitlines()}
    allowed = {
        "linux-vdso",
        "libc",
        "libm",
        "libstdc++",
        "libgcc_s",
        "libpthread",
        "libdl",
        "librt",
    }
    assert {name for name in names if not name.startswith("ld-")} <= allowed


def _sources() -> list[Path]:
    found = [path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh")]
    assert len(found) > 20
    return found


def test_core_knows_neither_torch_nor_python() -> None:
    for path in _sources():
        included = re.findall(r'#\s*include\s*[<"]([^">]+)', path.read_text())
        for header in included:
            assert not re.match(r"(torch|ATen|c10|omp\.h|cublas)", header), f"{path}: {header}"
            if re.match(r"(pybind11|Python\.h)", header):
                assert path.is_relative_to(CSRC / "bindings"), f"{path}: {header}"


def test_build_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert requires
    assert set(re.findall(r'"([\w-]+)', requires.group(1))) == {"scikit-build-core", "pybind11"}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for word in ("find_package(Torch", "OpenMP", "GLOB", "-march=native", "ffast-math"):
        assert word not in cmake
    declared = importlib.metadata.requires("hullkit") or []
    assert any(re.fullmatch(r"torch>=[\d.]+", line) for line in declared), declared


def test_import_has_no_side_effects() -> None:
    script = """
import sys, torch, warnings
before = set(sys.modules)
threads = torch.get_num_threads()
import hullkit
new = set(sys.modules) - before
heavy = {name.partition(".")[0] for name in new} & {
    "triton", "transformers", "faiss", "matplotlib", "triton_kernels"}
assert not heavy, heavy
assert "hullkit.triton_kernels" not in new
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
print("ok")
"""
    assert _python("-W", "error", "-c", script).strip() == "ok"


def test_public_names() -> None:
    assert hullkit.__all__ == sorted(hullkit.__all__, key=lambda name: name)
    for name in hullkit.__all__:
        assert hasattr(hullkit, name)
    tree = ast.parse((Path(hullkit.__file__)).read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert imported == set(hullkit.__all__)
    for name in hullkit.__all__:
        value = getattr(hullkit, name)
        if callable(value):
            assert value.__doc__, f"{name} has no docstring"


def test_environment_report() -> None:
    report = _python("-m", "hullkit")
    for line in ("hullkit", "python", "torch", "platform", "compiler", "CPU kernels", "CUDA"):
        assert re.search(rf"^{line} +\S", report, re.MULTILINE), report
    assert hullkit.__version__ in report


def test_stub_names_the_built_module() -> None:
    stub = MODULE.with_name("_core.pyi")
    tree = ast.parse(stub.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if not hullkit.build_info()["cuda"]:
        del functions["adam_product_cuda"]  # only in builds with CUDA
    values = {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    built = {name for name in dir(_core) if not name.startswith("__")} | {"__version__"}
    assert set(functions) | set(classes) | values == built
    for name, stubbed in classes.items():
        methods = {node.name for node in stubbed.body if isinstance(node, ast.FunctionDef)}
        own = {key for key, value in vars(getattr(_core, name)).items() if callable(value)}
        assert methods == {key for key in own if not key.startswith("_pybind11")}, name
    for name, function in functions.items():
        arguments = function.args.posonlyargs + function.args.args
        signature = str(getattr(_core, name).__doc__).partition("\n")[0]
        taken = len(re.findall(r"\barg\d+:", signature))
        by_name = [argument.arg for argument in function.args.kwonlyargs]
        assert by_name == re.findall(r"(?!arg\d)\b(\w+): ", signature), signature
        variadic = function.args.vararg is not None
        assert taken == len(arguments) or (variadic and taken > len(arguments)), signature


def test_typing_marker_is_installed() -> None:
    assert Path(hullkit.__file__).with_name("py.typed").exists()


def test_triton_kernels_live_in_our_package() -> None:
    assert _python("-c", "import hullkit.triton_kernels as t; print(t.__name__)").strip() == (
        "hullkit.triton_kernels"
    )
    files = [str(file) for file in importlib.metadata.files("hullkit") or []]
    assert "hullkit/triton_kernels/__init__.py" in files
    # One package at the top level of the wheel: "triton_kernels" there is Triton's own name.
    tops = {name.partition("/")[0] for name in files if not name.startswith(("..", "hullkit-"))}
    assert tops == {"hullkit"}
    assert not [name for name in files if name.endswith(".a")]


def test_source_tree_without_a_build_says_what_to_do() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'python')!r}); import hullkit"
    if list((ROOT / "python" / "hullkit").glob("_core*.so")):
        pytest.fail("a compiled module lies in the source tree: remove it")
    failed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert failed.returncode != 0
    assert "pip install ." in failed.stderr


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Python of a fresh environment with hullkit installed from its sdist, and the sdist unpacked.

    All other packages are those of the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp("stranger")
    build = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    environment = os.environ | {"HULLKIT_CUDA": "OFF"}

    def run(*command: str, cwd: Path) -> None:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(sys.executable, "-c", build, str(folder), cwd=ROOT)
    (sdist,) = folder.glob("hullkit-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    # A line of a .pth that imports is run: a folder added so has its own .pth read as well.
    others = "".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages())
    (home,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (home / "others.pth").write_text(others)
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    # The build's requirements in Python are the test extra's: with CMake here, nothing is fetched.
    isolation = ("--no-build-isolation",) if shutil.which("cmake") else ()
    run(*pip, "install", "--no-deps", "--ignore-installed", *isolation, str(sdist), cwd=folder)
    return python, sdist.with_name(sdist.name.removesuffix(".tar.gz"))


def test_sdist_has_the_same_bytes_whenever_it_is_built(tmp_path: Path) -> None:
    build = "import sys, scikit_build_core.build as b; print(b.build_sdist(sys.argv[1]))"
    hashes = set()
    for folder in (tmp_path / "one", tmp_path / "another one"):
        done = subprocess.run(
            [sys.executable, "-c", build, str(folder)],
            cwd=ROOT,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        (sdist,) = folder.glob("*.tar.gz")
        hashes.add(hashlib.sha256(sdist.read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_a_strangers_path(stranger: tuple[Path, Path]) -> None:
    """From the sdist alone: each snippet of the README and the guides, and each example."""
    python, source = stranger
    script = """
import pathlib, re, runpy, sys, torch
import hullkit
assert pathlib.Path(hullkit.__file__).is_relative_to(sys.prefix), hullkit.__file__
torch.set_num_threads(1)
snippets = 0
for page in ["README.md", *sorted(map(str, pathlib.Path("docs/guides").glob("*.md")))]:
    names, text = {}, open(page).read()
    for snippet in re.findall(r"^```python\\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, page, "exec"), names)
        snippets += 1
sys.path.insert(0, "examples")
examples = sorted(pathlib.Path("examples").glob("[0-9]*.py"))
for example in examples:
    runpy.run_path(str(example), run_name="__main__")
print("ran", snippets, len(examples))
"""
    done = subprocess.run(
        [str(python), "-c", script], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    examples = list((ROOT / "examples").glob("[0-9]*.py"))
    pages = [ROOT / "README.md", *(ROOT / "docs" / "guides").glob("*.md")]
    snippets = sum(page.read_text().count("\n```python\n") for page in pages)
    assert snippets > 10
    assert done.stdout.splitlines()[-1] == f"ran {snippets} {len(examples)}"
