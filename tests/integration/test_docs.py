"""The README's code runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from benchmarks.sql_by_hand import BY_HAND, Data
from tests.cookbook import agree, recipes, table_text

from kvtrace import open as open_trace
from kvtrace import reference
from kvtrace_recorder import demo
from kvtrace_viewer.replay import POLICIES
from kvtrace_viewer.replay.spec import as_row

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


RECORDING = (ROOT / "docs/recording.md").read_text(encoding="utf-8")
COOKBOOK = (ROOT / "docs/cookbook.md").read_text(encoding="utf-8")

YOUR_POLICY = (ROOT / "docs/your-policy.md").read_text(encoding="utf-8")

#: A script that knows nothing of a recorder.
GENERATE = f"""
import argparse
from transformers import pipeline

parser = argparse.ArgumentParser()
parser.add_argument("--prompt")
pipeline("text-generation", {str(demo.MODEL_DIR)!r})(parser.parse_args().prompt, max_new_tokens=8)
"""


def blocks(language: str, page: str = README) -> list[str]:
    """Code blocks of the README, or of another page."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def run(*command: str, cwd: Path) -> str:
    """Run a command; its standard output."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kvtrace(line: str, cwd: Path) -> str:
    """Run a `kvtrace` line of the README, in this environment."""
    words = shlex.split(line, comments=True)
    code = f"import sys; from kvtrace.cli import main; sys.exit(main({words!r}))"
    return run(sys.executable, "-c", code, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the demo trace in it."""
    folder = tmp_path_factory.mktemp("readme")
    out = kvtrace("demo --out traces --no-view", folder)
    for policy in ("full", "sliding_window", "streaming_llm", "lru", "h2o", "oracle"):
        assert policy in out
    return folder


def test_the_python_blocks_run(folder: Path) -> None:
    found = blocks("python")
    assert len(found) == 2
    for number, block in enumerate(found):
        script = folder / f"block{number}.py"
        script.write_text(block.replace('"NAME"', repr(str(demo.MODEL_DIR))))
        run(sys.executable, str(script), cwd=folder)
    assert (folder / "traces/mine.kvtrace").is_dir()


def test_the_questions_are_answered(folder: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    # `kvtrace verify` has tests of its own, and takes the longest.
    verbs = tuple(f"kvtrace {verb}" for verb in ("info", "replay", "sql", "size"))
    asked = [line for line in lines if line.startswith(verbs)]
    assert len(asked) == 6
    for line in asked:
        assert kvtrace(line.removeprefix("kvtrace "), folder)


def test_the_recording_page_does_what_it_says(folder: Path) -> None:
    inside, callback = blocks("python", RECORDING)
    (folder / "inside.py").write_text(inside)
    assert "tokens; no gaps" in run(sys.executable, "inside.py", cwd=folder)
    # The callback's own tests train; here only its call is looked at.
    (folder / "callback.py").write_text(callback)
    run(sys.executable, "callback.py", cwd=folder)
    (folder / "generate.py").write_text(GENERATE)
    lines = [line for block in blocks("sh", RECORDING) for line in block.splitlines()]
    for line in lines:
        if "outside.kvtrace" in line:
            kvtrace(line.removeprefix("kvtrace "), folder)
    trace = open_trace(folder / "traces/outside.kvtrace")
    assert (trace.status, len(trace.requests())) == ("complete", 1)


def test_the_cookbook_is_answered_as_it_says(folder: Path) -> None:
    (command,) = (b for b in blocks("sh", COOKBOOK) if "--regret" in b)
    assert kvtrace(command.strip().removeprefix("kvtrace "), folder)
    trace = open_trace(folder / "traces/demo.kvtrace")
    found = recipes()
    assert len(found) == 20
    data = Data(trace)
    for recipe, by_hand in zip(found, BY_HAND, strict=True):
        shown, answered = recipe.answer.splitlines(), table_text(trace.sql(recipe.sql)).splitlines()
        # Times, and a sampled answer, are the machine's: the columns and how much is said are not.
        assert shown[0] == answered[0], recipe.title
        assert len(answered) == len(shown) > 2, recipe.title
        # What the SQL says is what numpy says.
        assert agree(trace.sql(recipe.sql).to_pylist(), by_hand(data)), recipe.title


def test_the_sql_reference_is_what_the_definitions_say() -> None:
    text = (ROOT / "docs/sql.md").read_text(encoding="utf-8")
    assert text == reference.page(), "stale: python -m kvtrace.reference > docs/sql.md"


def test_the_tutorial_of_ones_own_policy_runs(folder: Path) -> None:
    example = (ROOT / "examples/my_policy.py").read_text(encoding="utf-8")
    shown, kit = blocks("python", YOUR_POLICY)
    assert shown.strip() in example, "the page shows the example as it is"
    (folder / "examples").mkdir()
    (folder / "examples/my_policy.py").write_text(example)
    (folder / "test_fading.py").write_text(kit)
    lines = [line for block in blocks("sh", YOUR_POLICY) for line in block.splitlines()]
    for line in lines:
        if line.startswith("kvtrace replay"):
            out = kvtrace(line.removeprefix("kvtrace "), folder)
            assert "Fading" in out
            assert "bound" in out
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:dash", "test_fading.py", cwd=folder)


def test_local_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_policy_and_its_parameters_are_documented() -> None:
    page = (ROOT / "docs/policies.md").read_text(encoding="utf-8").splitlines()
    first = page.index("|---|---|---|---|---|---|") + 1
    want = [as_row(policy) for policy in POLICIES.values()]
    assert page[first : first + len(want) + 1] == [*want, ""]


def test_every_verb_is_documented() -> None:
    for point in entry_points(group="kvtrace.commands"):
        assert re.search(rf"(kvtrace|make) {point.name}\b", README), point.name
