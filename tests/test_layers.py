"""The rules between layers of docs/architecture.md, read from the sources' import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.stages import STAGES
from minitron.config.tasks import TASKS

REPOSITORY = Path(__file__).parent.parent
LIBRARY = sorted(path for path in (REPOSITORY / "minitron").rglob("*.py"))
COMPONENTS = sorted((REPOSITORY / "components").glob("*.py"))
PIPELINES = sorted((REPOSITORY / "pipelines").glob("*.py"))
TRAINING = {"torch", "transformers", "nemo", "megatron", "mlflow"}


def imported(source: str, module_level_only: bool = False) -> set[str]:
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


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path.read_text())}


def within(names: set[str], module: str) -> set[str]:
    return {name for name in names if name == module or name.startswith(f"{module}.")}


def label(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_every_form_of_import_is_seen() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    from g.h import i\n    import j"
    assert imported(source) == {"a.b", "d", "d.e", "g.h", "g.h.i", "j"}
    assert imported(source, module_level_only=True) == {"a.b", "d", "d.e"}
    assert imported("if TYPE_CHECKING:\n    import a\nif b:\n    import c") == {"c"}


def test_the_sources_are_where_this_test_looks() -> None:
    assert {path.stem for path in LIBRARY} > set(STAGES) | {"config", "cli", "tracking", "storage", "hf"}
    assert {path.stem for path in COMPONENTS} == {*STAGES, *TASKS, "__init__", "images"}
    assert {path.stem for path in PIPELINES} == {"__init__", "compress", "promote", "retrain"}


@pytest.mark.parametrize("path", LIBRARY, ids=label)
def test_the_library_knows_neither_kubeflow_nor_the_layers_above(path: Path) -> None:
    names = imported(path.read_text())
    assert not within(names, "minitron.components") | within(names, "minitron.pipelines")


@pytest.mark.parametrize(
    ("package", "users"),
    [
        ("kfp", {"cluster.py", "local.py"}),
        ("kfp_server_api", {"cluster.py"}),
        ("kubernetes", {"kube.py"}),
        ("mlflow", {"mlflow_client.py", "registry.py", "tracking.py"}),
        ("google.cloud", {"bucket.py", "transfers.py"}),
        ("google_crc32c", {"transfers.py"}),
    ],
)
def test_only_these_modules_use_a_service(package: str, users: set[str]) -> None:
    found = {path.name for path in LIBRARY if within(imported(path.read_text()), package)}
    assert found == users


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    names = imported((REPOSITORY / "minitron" / f"{stage}.py").read_text())
    assert not {other for other in STAGES if other != stage and within(names, f"minitron.{other}")}


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.stem not in STAGES], ids=label)
def test_what_the_stages_share_imports_no_stage(path: Path) -> None:
    names = imported(path.read_text())
    assert not {stage for stage in STAGES if within(names, f"minitron.{stage}")}


LIGHT = ["config", "errors", "storage", "results", "inputs", "delivery", "references", "bucket", "stage", "presets"]


@pytest.mark.parametrize("name", [f"{name}.py" for name in LIGHT])
def test_what_a_task_reads_before_it_works_is_light(name: str) -> None:
    assert not packages(REPOSITORY / "minitron" / name) & TRAINING


def test_register_runs_in_an_image_without_torch() -> None:
    names = sorted(TRAINING | {"numpy", "pandas"})
    code = f"import sys, minitron.stages.register; print(*(name for name in {names} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not loaded.split()


@pytest.mark.parametrize("path", COMPONENTS, ids=label)
def test_a_component_imports_kfp_its_image_and_in_its_body_the_stage(path: Path) -> None:
    source = path.read_text()
    minitron = within(imported(source, module_level_only=True), "minitron")
    allowed = within(minitron, "minitron.components") | within(minitron, "minitron.config")
    assert minitron - allowed <= {"minitron", "minitron.__version__"}
    assert packages(path) <= {"kfp", "minitron", "typing", "shutil", "collections"}
    if path.stem in STAGES | TASKS:
        inside = imported(source) - imported(source, module_level_only=True)
        assert {name for name in inside if within({name}, "minitron")} == {
            "minitron.runtime.stage",
            "minitron.runtime.entry.launch",
        }


@pytest.mark.parametrize("path", PIPELINES, ids=label)
def test_a_pipeline_imports_kfp_and_the_components(path: Path) -> None:
    minitron = within(imported(path.read_text()), "minitron")
    layers = ("minitron.pipelines", "minitron.components", "minitron.config")
    assert minitron <= set().union(*(within(minitron, layer) for layer in layers))
    assert packages(path) <= {"inspect", "kfp", "minitron", "pathlib", "typing"}
