"""What pip installs: the sdist, a wheel built from it, and that wheel beside a user's files."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; its standard output. Fails with what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "-n", "--sdist", "--outdir", out, cwd=ROOT)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(out, filter="data")
    (unpacked,) = (path for path in out.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "-n", "--wheel", "--outdir", out, cwd=sdist)
    return next(out.glob("*.whl"))


def package_files() -> set[str]:
    """Every file of the three packages that git knows, as a wheel names them."""
    listed = run("git", "ls-files", "schemas", "recorder", "viewer", cwd=ROOT).split("\n")
    return {name.split("/", 1)[1] for name in listed if name}


def test_the_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        assert package_files() <= set(file.namelist())


def test_the_sdist_holds_no_traces_and_no_tests(sdist: Path) -> None:
    assert {path.name for path in sdist.iterdir()} == {
        "schemas", "recorder", "viewer", "README.md", "LICENSE", "pyproject.toml", "PKG-INFO",
        ".gitignore",
    }  # fmt: skip


def test_the_installed_wheel_runs_beside_a_users_own_schemas(wheel: Path, tmp_path: Path) -> None:
    # A serving script often has its own `schemas/` and `recorder.py`: theirs must win, ours work.
    target, project = tmp_path / "site", tmp_path / "project"
    run(
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile",
        "--target", target, wheel, cwd=tmp_path,
    )  # fmt: skip
    (project / "schemas").mkdir(parents=True)
    (project / "schemas/__init__.py").write_text("OWNER = 'the user'")
    (project / "recorder.py").write_text("OWNER = 'the user'")
    (project / "serve.py").write_text(
        "import kvtrace, recorder, schemas\n"
        "import kvtrace_recorder, kvtrace_viewer\n"
        "print(recorder.OWNER, schemas.OWNER, kvtrace.__file__)\n"
    )
    libraries = sysconfig.get_path("purelib")
    # -S keeps the editable install out; the installed wheel comes first, its libraries after it.
    out = run(
        sys.executable, "-S", project / "serve.py",
        cwd=project, PYTHONPATH=os.pathsep.join([str(target), libraries]),
    )  # fmt: skip
    assert out.startswith(f"the user the user {target}")
    verbs = run(
        sys.executable, "-S", "-m", "kvtrace.cli", "--help",
        cwd=project, PYTHONPATH=os.pathsep.join([str(target), libraries]),
    )  # fmt: skip
    assert "replay" in verbs
