"""What README.md and docs/ show is correct: shell, YAML, commands, links; docs/how-to/deploy.md can be followed."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml

from minitron.cli.app import app
from tests.constants import REPOSITORY
from tests.servers.deploy_guide import GUIDE, created_secrets, follow_guide, read_blocks

CLUSTER_COMMANDS = {"doctor", "submit", "schedule", "runs", "unschedule", "serve-manifest"}
FENCE = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
"""Language and content of a code block."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^(?:.*\$\()?minitron ([^)\n]+)", re.MULTILINE)
NAMED = re.compile(r"(?<![\w./:-])(?:manifests|images|docs|pipelines)/[\w./-]+")


def list_commands() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    return group.commands  # type: ignore[union-attr, no-any-return]


def list_pages() -> list[Path]:
    return [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]


def list_sections(page: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def list_fences(*languages: str) -> list[str]:
    """Return the content of all code blocks of these languages."""
    found = [fence for page in list_pages() for fence in FENCE.findall(page.read_text())]
    return [content for language, content in found if language in languages]


def list_minitron_lines(*blocks: str) -> list[list[str]]:
    """Read the `minitron` commands off the blocks, variables as they are."""
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in COMMAND.findall(joined)]


def parse_command(line: list[str]) -> None:
    """Parse a command as `minitron` does, without running it."""
    group = typer.main.get_command(app)
    command = group if line[0].startswith("-") else list_commands()[line[0]]
    arguments = line if command is group else line[1:]
    try:
        command.make_context("minitron", arguments)
    except typer.Exit as done:  # of --help and --version
        assert done.exit_code == 0


def list_named_files() -> list[str]:
    return sorted({name.rstrip("./") for name in NAMED.findall(GUIDE.read_text())})


@pytest.mark.parametrize("page", list_pages(), ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block without a language would be checked by nobody."""
    text = page.read_text()
    languages = [language for language, _ in FENCE.findall(text)]
    assert set(languages) <= {"mermaid", "python", "sh", "text", "yaml"}
    assert 2 * len(languages) == sum(line.lstrip().startswith(("```", "~~~")) for line in text.splitlines())


@pytest.mark.parametrize("page", list_pages(), ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files and sections of this repository; other addresses are not asked."""
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http:", "https:")):
            name, _, section = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), target
            assert not section or section in list_sections(file), target


@pytest.mark.parametrize("block", list_fences("sh"), ids=lambda block: block.split("\n")[0][:40])
def test_the_shell_understands_it(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", list_fences("python"), ids=lambda block: block.split("\n")[0][:40])
def test_python_is_python(block: str) -> None:
    """tests/flows/test_own_pipeline.py runs the README's."""
    compile(block, "block", "exec")


@pytest.mark.parametrize("block", list_fences("yaml"), ids=lambda block: block.split("\n")[0][:40])
def test_yaml_is_yaml(block: str) -> None:
    assert yaml.safe_load(block)


def test_commands_are_only_in_blocks_of_shell() -> None:
    assert list_minitron_lines(*list_fences("text", "yaml")) == []


def test_every_command_runs_and_every_variable_is_set_before_it_is_used() -> None:
    followed = follow_guide()
    assert followed.status == 0, followed.errors
    assert followed.errors == ""
    assert {"gcloud", "kubectl", "minitron", "docker", "kind", "git"} == {call[0] for call in followed.calls}


@pytest.mark.parametrize("name", list_named_files())
def test_what_it_names_exists(name: str) -> None:
    assert (REPOSITORY / name).exists()


@pytest.mark.parametrize("line", list_minitron_lines(*list_fences("sh")), ids=lambda line: " ".join(line[:2]))
def test_minitron_takes_its_commands(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown commands and flags, and missing ones, end here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # as the text says
    parse_command(line)


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--frobnicate"):
        parse_command(["run", "compress", "--preset", "tiny", "--frobnicate"])


def test_the_guide_uses_all_that_talk_to_a_cluster() -> None:
    assert {line[0] for line in list_minitron_lines(*read_blocks())} == {"--version", *CLUSTER_COMMANDS}


def test_the_docs_show_every_command() -> None:
    assert {line[0] for line in list_minitron_lines(*list_fences("sh"))} == {"--version", *list_commands()}


def list_applied() -> list[Path]:
    """Return our directories that the guide applies, in the copy that it has written its settings to."""
    given = [
        call[call.index("-k") + 1] for call in follow_guide().calls if call[:2] == ["kubectl", "apply"] and "-k" in call
    ]
    return [follow_guide().root / name for name in given if name.startswith("manifests/")]


def test_what_it_applies_renders_with_the_settings_it_writes() -> None:
    assert [path.name for path in list_applied()] == ["gke", "kind"]
    for path in list_applied():
        done = subprocess.run(["kubectl", "kustomize", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"\b(PROJECT|BUCKET|DOMAIN|REPOSITORY|TASKS_ACCOUNT|MLFLOW_ACCOUNT)\b", done.stdout)
    assert (
        "gs://my-project-minitron/mlflow"
        in subprocess.run(["kubectl", "kustomize", str(list_applied()[0])], capture_output=True, text=True).stdout
    )


def test_it_sets_every_setting_there_is() -> None:
    name = "manifests/overlays/gke/settings.env"
    keys = [
        {line.split("=")[0] for line in (root / name).read_text().splitlines() if not line.startswith("#")}
        for root in (REPOSITORY, follow_guide().root)
    ]
    assert keys[0] == keys[1]


def test_the_optional_secret_has_keys_that_the_tasks_read() -> None:
    names = {name for _, name in created_secrets()}
    assert names == {"minitron-postgres/password", "minitron/HF_TOKEN"}
    compiled = (REPOSITORY / "pipelines/compress.yaml").read_text()
    assert all(name.split("/")[1] in compiled for name in names if name.startswith("minitron/"))


def test_the_accounts_it_binds_are_those_of_the_manifests() -> None:
    bound = {part for call in follow_guide().calls for part in re.findall(r"\[minitron/(\w+)\]", " ".join(call))}
    rendered = subprocess.run(["kubectl", "kustomize", str(list_applied()[0])], capture_output=True, text=True).stdout
    accounts = re.findall(
        r"^kind: ServiceAccount\nmetadata:\n  annotations:\n.*?\n  name: (\w+)", rendered, re.MULTILINE
    )
    assert bound == set(accounts)
