"""Who may import whom: the rooms of minitron/ and what each may use, read from the sources' import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.stages import STAGES, TASKS
from tests.constants import REPOSITORY

MAY_IMPORT: dict[str, set[str]] = {  # errors and fast_imports: everybody
    "config": set(),
    "cluster": set(),
    "storage": {"config"},
    "data": {"config", "storage"},
    "tracking": {"config", "storage"},
    "models": {"config", "storage", "data"},
    "registry": {"config", "storage", "data", "tracking"},
    "report": {"config", "storage", "registry"},
    "engines": {"config", "cluster", "storage", "data", "tracking", "models"},
    "runtime": {"config", "storage", "tracking", "registry", "engines"},
    "stages": {"config", "storage", "data", "tracking", "registry", "report", "models", "engines", "runtime"},
    "cli": {"config", "cluster", "storage", "tracking", "registry", "report", "models", "engines", "runtime"},
}
EVERYBODY = {"errors", "fast_imports"}

USERS = {
    "kfp": {"cluster/pipelines_client.py", "cli/local.py"},
    "kfp_server_api": {"cluster/pipelines_client.py", "cluster/pipelines_api.py"},
    "kubernetes": {"cluster/kubernetes_api.py"},
    "mlflow": {"tracking/client.py", "tracking/artifacts.py", "tracking/stage_run.py", "registry/versions.py"},
    "google.cloud": {"storage/bucket.py", "storage/transfers.py"},
    "google_crc32c": {"storage/hashing.py"},
}
"""The only modules that use a service's client."""

WITHOUT_TORCH = ("config", "storage", "tracking", "registry", "runtime", "cluster")
TRAINING = {"torch", "transformers", "nemo", "megatron"}
MOST_ENTRIES = 12
"""Of a folder: what one look takes in."""

BESIDE = {"__init__.py", "__pycache__", "py.typed", *(f"{name}.py" for name in EVERYBODY)}
"""What does not count: these stand beside the rooms, not in one."""

PACKAGE = REPOSITORY / "minitron"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
COMPONENTS = sorted((REPOSITORY / "components").glob("*.py"))
PIPELINES = sorted((REPOSITORY / "pipelines").glob("*.py"))
FOLDERS = sorted(
    folder
    for top in ("minitron", "components", "pipelines")
    for folder in (REPOSITORY / top, *(REPOSITORY / top).rglob("*"))
    if folder.is_dir() and folder.name != "__pycache__"
)


def list_imports(source: str, module_level_only: bool = False) -> set[str]:
    """Return the dotted names that a source imports: `from a import b` counts as a and as a.b; types alone do not."""
    tree = _WithoutTypes().visit(ast.parse(source))
    names = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide a layer; import by the full name"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


class _WithoutTypes(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def list_rooms(names: set[str]) -> set[str]:
    """Return what of minitron/ is imported: rooms, and modules beside them."""
    parts = [name.split(".") for name in names]
    constants = {"__version__", "METHOD_VERSION", "COMPENSATION_VERSION"}
    return {part[1] for part in parts if part[0] == "minitron" and len(part) > 1} - constants


def list_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in list_imports(path.read_text())}


def select_within(names: set[str], module: str) -> set[str]:
    return {name for name in names if name == module or name.startswith(f"{module}.")}


def make_label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_every_form_of_import_is_seen() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    from g.h import i\n    import j"
    assert list_imports(source) == {"a.b", "d", "d.e", "g.h", "g.h.i", "j"}
    assert list_imports(source, module_level_only=True) == {"a.b", "d", "d.e"}
    assert list_imports("if TYPE_CHECKING:\n    import a\nif b:\n    import c") == {"c"}
    assert list_rooms({"minitron", "minitron.data.packed", "minitron.errors", "torch.nn"}) == {"data", "errors"}


def test_the_sources_are_where_this_test_looks() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", *EVERYBODY}
    assert {path.stem for path in (PACKAGE / "stages").glob("*.py")} == {"__init__", *STAGES, *TASKS}
    assert {path.stem for path in COMPONENTS} == {*STAGES, *TASKS, "__init__"}
    assert {path.stem for path in PIPELINES} >= {"__init__", "compress", "promote", "retrain", "search"}


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.parent != PACKAGE], ids=make_label)
def test_a_room_imports_what_it_may(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    assert list_rooms(list_imports(path.read_text())) <= MAY_IMPORT[room] | EVERYBODY | {room}


def test_no_two_rooms_import_each_other() -> None:
    reached = {room: set(allowed) for room, allowed in MAY_IMPORT.items()}
    for _ in MAY_IMPORT:
        reached = {room: set().union(below, *(reached[other] for other in below)) for room, below in reached.items()}
    assert not [room for room, below in reached.items() if room in below]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=make_label)
def test_what_everybody_imports_imports_nobody(path: Path) -> None:
    assert list_rooms(list_imports(path.read_text())) == set()


@pytest.mark.parametrize("path", FOLDERS, ids=make_label)
def test_a_folder_can_be_taken_in_at_one_look(path: Path) -> None:
    entries = {entry.name for entry in path.iterdir()} - BESIDE
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_says_what_it_is_for(room: str) -> None:
    assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))


@pytest.mark.parametrize(("package", "users"), USERS.items(), ids=USERS)
def test_only_these_modules_use_a_service(package: str, users: set[str]) -> None:
    found = {
        str(path.relative_to(PACKAGE)) for path in LIBRARY if select_within(list_imports(path.read_text()), package)
    }
    assert found == users


@pytest.mark.parametrize("path", sorted((PACKAGE / "stages").glob("*.py")), ids=make_label)
def test_a_stage_imports_no_other_stage(path: Path) -> None:
    assert not select_within(list_imports(path.read_text()), "minitron.stages")


LIGHT = [path for path in LIBRARY if path.relative_to(PACKAGE).parts[0] in WITHOUT_TORCH]


@pytest.mark.parametrize("path", LIGHT, ids=make_label)
def test_what_a_task_reads_before_it_works_is_light(path: Path) -> None:
    assert not list_packages(path) & TRAINING


def test_register_runs_in_an_image_without_torch() -> None:
    """In a process of its own: this one has imported it."""
    names = sorted(TRAINING | {"mlflow", "numpy", "pandas"})
    code = f"import sys, minitron.stages.register; print(*(name for name in {names} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not loaded.split()


def test_a_stage_is_started_by_its_name_and_imported_once() -> None:
    """In a process of its own: this one has imported the stage."""
    code = """
import atexit, runpy, sys
atexit.register(lambda: print("minitron.prune" in sys.modules, "minitron.stages.prune" in sys.modules))
sys.argv = ["prune", "--config", "none.yaml"]
runpy.run_module("minitron.prune", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"] and "none.yaml: No such file" in done.stderr, done.stderr


@pytest.mark.parametrize("path", COMPONENTS, ids=make_label)
def test_a_component_imports_kfp_its_image_and_in_its_body_the_entry(path: Path) -> None:
    source = path.read_text()
    minitron = select_within(list_imports(source, module_level_only=True), "minitron")
    allowed = select_within(minitron, "minitron.components") | select_within(minitron, "minitron.config")
    assert minitron - allowed <= {"minitron", "minitron.__version__"}
    assert list_packages(path) <= {"kfp", "minitron", "typing", "shutil", "collections"}
    if path.stem in STAGES | TASKS:
        inside = list_imports(source) - list_imports(source, module_level_only=True)
        assert {name for name in inside if select_within({name}, "minitron")} == {
            "minitron.runtime.entry",
            "minitron.runtime.entry.launch",
        }


@pytest.mark.parametrize("path", PIPELINES, ids=make_label)
def test_a_pipeline_imports_kfp_and_the_components(path: Path) -> None:
    minitron = select_within(list_imports(path.read_text()), "minitron")
    layers = ("minitron.pipelines", "minitron.components", "minitron.config")
    assert minitron <= set().union(*(select_within(minitron, layer) for layer in layers))
    assert list_packages(path) <= {"kfp", "minitron", "pathlib", "tempfile", "typing", "yaml"}
