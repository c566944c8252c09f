"""The rooms and the arrows between them (design, section 3), and what must hold of every file we track."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("infra", "storage_schemas", "pipeline", "trainer", "analysis", "benchmarks")
MAY_IMPORT = {
    "infra": set(),
    "storage_schemas": {"infra"},
    "pipeline": {"infra", "storage_schemas"},
    "trainer": {"infra", "storage_schemas", "pipeline"},
    "analysis": {"infra", "storage_schemas", "pipeline", "trainer"},
    "benchmarks": {"infra", "storage_schemas", "pipeline", "trainer", "analysis"},
}
#: Of pipeline, the trainer sees the teacher, the images and extract().
TRAINER_MAY_IMPORT = {
    *("pipeline.teacher", "pipeline.checkpoints"),
    *("pipeline.preprocess", "pipeline.sources", "pipeline.digits"),
    "pipeline.extract",
}


def modules(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path, *, at_top: bool = False) -> list[str]:
    """Names of imported modules, wherever they are imported, or only those that importing the file itself imports."""
    return list(_imports(path, at_top))


def _imports(path: Path, at_top: bool) -> Iterator[str]:
    for node in _top_level(tree_of(path)) if at_top else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _top_level(child)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for path in modules(package):
        for name in imports(path):
            room = name.partition(".")[0]
            assert room not in PACKAGES or room == package or room in MAY_IMPORT[package], f"{path} imports {name}"


def test_the_trainer_sees_only_teacher_images_and_extract():
    for path in modules("trainer"):
        for name in imports(path):
            if name.partition(".")[0] == "pipeline":
                assert any(f"{name}.".startswith(f"{allowed}.") for allowed in TRAINER_MAY_IMPORT), f"{path}: {name}"


def test_nothing_we_ship_imports_the_tests():
    for package in PACKAGES:
        for path in modules(package):
            assert not [name for name in imports(path) if name.partition(".")[0] == "tests"], path


def test_files_that_open_nothing_open_nothing():
    """Spec, keys, codecs and layout are pure: reading and writing are other files above them."""
    for name in (
        "spec",
        "keys",
        "codecs",
        "precision",
        "zarr_layout",
        "tar_layout",
        "layout",
        "documents",
        "commit_table",
        "statistics",
    ):
        path = REPOSITORY / f"storage_schemas/{name}.py"
        assert not [i for i in imports(path) if i.startswith("infra.objects") or i in ("os", "pathlib")], path
        calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        assert "open" not in [call.id for call in calls if isinstance(call, ast.Name)], path


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_one_door(package):
    doors = [path.name for path in modules(package) if re.search(r"^if __name__ ==", path.read_text(), re.MULTILINE)]
    has_code = any(path.name != "__init__.py" for path in modules(package))
    assert doors == (["__main__.py"] if has_code else [])


def test_the_makefile_calls_only_doors():
    called = re.findall(r"\$\(PYTHON\) (?:-\w+ )*(\S+)(?: (\S+))?", (REPOSITORY / "Makefile").read_text())
    run = [re.sub(r"^-m\s*", "", " ".join(call)) for call in called]
    assert run, "the Makefile calls no Python at all, or this test cannot see it"
    scripts = [call for call in run if call.split()[0].endswith(".py")]
    assert scripts == []


def test_ray_is_imported_by_thin_files_only():
    """At the top of a file only where the whole file is about Ray."""
    for package in PACKAGES:
        for path in modules(package):
            if any(name.partition(".")[0] == "ray" for name in imports(path, at_top=True)):
                assert path.stem.endswith("_ray"), f"{path} imports ray when it is imported"


IMPORT_ALL = """
import importlib, json, sys
names, guarded = json.loads(sys.argv[1])
before = set(sys.modules)
if guarded:
    import torch, zarr
    def settings():
        return [torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
                torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), zarr.config.to_dict()
                if hasattr(zarr.config, "to_dict") else zarr.config.config]
    first = repr(settings())
for name in names:
    importlib.import_module(name)
same = repr(settings()) == first if guarded else True
print(json.dumps([sorted({m.partition(".")[0] for m in sys.modules}), same]))
"""


def import_all(names: list[str], *, guarded: bool = False) -> tuple[list[str], bool]:
    """Top-level modules loaded when all those are imported in a fresh process; whether settings stayed as they were."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", IMPORT_ALL, json.dumps([names, guarded])],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    loaded, same = json.loads(done.stdout.splitlines()[-1])
    return loaded, same


def names_of(*packages: str) -> list[str]:
    every = [module_name(path) for package in packages for path in modules(package)]
    return [name for name in every if not name.endswith(("__main__", "_ray"))]


def test_storage_schemas_needs_neither_torch_nor_ray():
    loaded, _ = import_all(names_of("storage_schemas"))
    assert {"storage_schemas", "infra", "numpy"} <= set(loaded)
    assert not {"torch", "ray", "timm", "zarr"} & set(loaded)


def test_importing_anything_starts_no_ray_and_sets_nothing():
    loaded, same = import_all(names_of("infra", "storage_schemas", "pipeline", "trainer", "analysis"), guarded=True)
    assert {"torch", "trainer", "pipeline"} <= set(loaded)
    assert "ray" not in loaded
    assert same, "importing one of our modules changed a global setting of torch or zarr"


def test_no_pickled_code_is_read_or_written():
    for package in PACKAGES:
        for path in modules(package):
            for node in ast.walk(tree_of(path)):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = ast.unparse(node.func.value)
                called = f"{owner}.{node.func.attr}"
                assert owner not in ("pickle", "cloudpickle", "dill", "joblib"), f"{path}: {called}"
                assert called != "torch.save", f"{path}: {called}"
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if called == "torch.load":
                    assert given.get("weights_only") == "True", f"{path}: torch.load without weights_only=True"
                if called in ("np.load", "numpy.load"):
                    assert given.get("allow_pickle", "False") == "False", f"{path}: {called} with pickles"


class TestRequirements:
    LINES = (REPOSITORY / "requirements.txt").read_text().splitlines()

    def test_everything_is_pinned(self):
        lines = [line for line in self.LINES if line.strip() and not line.startswith("#")]
        assert len(lines) > 50
        for line in lines:
            assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.+!]+( ; .+)?", line), line

    def test_there_are_no_addresses(self):
        for name in ("requirements.txt", "requirements.in", "pyproject.toml"):
            text = (REPOSITORY / name).read_text()
            assert not re.search(r"://|--index|--extra|--find-links|--trusted| @ ", text), name

    def test_everything_asked_for_is_there(self):
        asked = (REPOSITORY / "requirements.in").read_text().splitlines()
        names = {re.split(r"[\[=<>~! ;]", line)[0].lower() for line in asked if line and not line.startswith("#")}
        pinned = {re.split(r"[\[=]", line)[0].lower() for line in self.LINES}
        assert names - pinned == set()


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        pytest.skip("this is no git checkout")
    paths = [REPOSITORY / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_tracked_file_names_a_place_on_this_machine():
    places = re.compile(
        rb"(?<![\w.~-])/(?:root|home/(?!ray\b)\w+|Users/\w+|work/(?:main|shared)|tmp/w|opt/conda)(?:/|\b)"
    )
    found = [f"{path}: {m.group().decode()}" for path in tracked() for m in [places.search(path.read_bytes())] if m]
    assert [line for line in found if not line.startswith(f"{__file__}:")] == []


def test_no_tracked_file_names_a_registry():
    hosts = re.compile("|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "download.pytorch" + r"\.org"]).encode())
    assert [path for path in tracked() if hosts.search(path.read_bytes())] == []


def test_tracked_files_are_small_and_plain():
    for path in tracked():
        assert not path.is_symlink(), path
        assert path.stat().st_size < 5_000_000, f"{path} is too large to be tracked"
        assert path.suffix not in (".pkl", ".pickle", ".pth", ".pt", ".pyc"), path
