"""Policies of the user's own: files, installed packages, and what is said where they err."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from kvtrace.cli import main
from kvtrace.errors import InputError
from kvtrace.testing import SyntheticTrace
from kvtrace_viewer.commands import view
from kvtrace_viewer.derived.policies import policy_help
from kvtrace_viewer.jobs import ReplayJobs
from kvtrace_viewer.replay import parse_policy, plugins, replay

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "my_policy.py"
HEAD = """
from dataclasses import dataclass
from kvtrace_viewer.replay import Policy, parameter
"""
Write = Callable[[str], str]
SCORES = "class Mine(Policy):\n    def scores(self, block, cuts, state):\n        return {}"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a policy file under a name of its own: --policy `write(source)`."""

    def made(source: str) -> str:
        path = tmp_path / f"policy_{len(list(tmp_path.glob('*.py')))}.py"
        path.write_text(HEAD + textwrap.dedent(source))
        return str(path)

    return made


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was loaded or added before, or stays after."""
    for registry in ("_loaded", "_added", "_installed_ones"):
        monkeypatch.setattr(plugins, registry, {})


def test_the_example_is_fifteen_lines_and_replays(synthetic_trace: SyntheticTrace) -> None:
    code = EXAMPLE.read_text().partition("@dataclass")[2].splitlines()[1:]
    assert len([line for line in code if line.strip()]) <= 15
    trace = synthetic_trace(steps=[40] + [1] * 20)
    spec = f"{EXAMPLE}:Fading"
    plain, short = replay(trace, [spec, f"{spec}:half_life=2"], ["25%"], "step", store=False)
    assert plain.policy == spec
    assert plain.parameters["half_life"] == 16.0
    assert plain.evicted_at.tobytes() != short.evicted_at.tobytes()
    assert parse_policy(str(EXAMPLE)).name == "fading", "the only policy of a file needs no name"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("class Mine(Policy\n    pass", "line 4: .* Python was expected; mend that line"),
        ("1 / 0", "line 4: ZeroDivisionError"),
        ("Mine = 3", r"py: 3 is no policy"),
        ("class Other(Policy):\n    pass", "no class 'Mine'; its policies are Other"),
        ("class Mine(Policy):\n    pass", "line 4: Mine has no scoring method"),
        ("class Mine(Policy):\n    x: int = 3", "line 4: Mine has parameters and is no dataclass"),
        (
            "@dataclass(frozen=True, kw_only=True)\nclass Mine(Policy):\n    x: int",
            "line 4: Mine has no default for x",
        ),
        (
            "class Mine(Policy):\n    def scores(self, block):\n        return block",
            r"line 5: Mine.scores\(self, block\) cannot be called .*\(self, block, cuts, state\)",
        ),
        (
            SCORES.format("block") + "\n    def start(self):\n        return 3",
            r"line 7: Mine.start\(self\) cannot be called .* start\(self, head, cuts\)",
        ),
    ],
)
def test_a_file_with_a_mistake_gives_line_and_reason(write: Write, source: str, said: str) -> None:
    path = write(source)
    with pytest.raises(InputError, match=said) as raised:
        parse_policy(f"{path}:Mine")
    assert "\n" not in str(raised.value)
    assert path in str(raised.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            SCORES.format("block.received[:1, :-1]"),
            r"line 5: Mine.scores returned scores \[1, 39\]",
        ),
        (SCORES.format("block.received[:1] * float('nan')"), "line 5: .*NaN at row 39 for key 0"),
        (SCORES.format("None"), "line 5: Mine.scores returned NoneType; numbers"),
        (SCORES.format("block.rows[cuts]"), "line 6, in scores: AttributeError"),
        (
            "class Mine(Policy):\n    needs_held = True\n"
            "    def score_held(self, held, limit, row, block, state):\n        return held[1:]",
            r"line 6: Mine.score_held returned scores \[39\]; \[40\] were expected",
        ),
    ],
)
def test_a_policy_that_scores_wrong_is_one_error_line(
    write: Write,
    source: str,
    said: str,
    synthetic_trace: SyntheticTrace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = synthetic_trace(steps=[40, 1, 1])
    args = ["replay", str(trace.path), "--policy", f"{write(source)}:Mine", "--budget", "9"]
    assert main([*args, "--when", "prefill"]) == 1
    found = capsys.readouterr().err.strip()
    assert found.startswith("error: ")
    assert found.count("\n") == 0
    with pytest.raises(InputError, match=said):
        replay(trace, [args[3]], [9], "prefill", store=False)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.py does not exist"):
        parse_policy("nowhere.py:Mine")


def test_which_of_several_policies_is_meant_must_be_said(write: Write) -> None:
    path = write("class A(Policy):\n    pass\nclass B(Policy):\n    pass")
    with pytest.raises(InputError, match=r"2 policies \(A, B\); one was expected"):
        parse_policy(path)


@pytest.mark.usefixtures("fresh")
def test_installed_packages_bring_their_own(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(write(SCORES.format("block.received[cuts.rows - block.start]")))
    monkeypatch.syspath_prepend(str(path.parent))
    points = [
        EntryPoint("mine", f"{path.stem}:Mine", plugins.GROUP),
        EntryPoint("broken", "no_such_module:Mine", plugins.GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    assert parse_policy("mine:sinks=2").spec == "mine:sinks=2"
    with pytest.raises(InputError, match="'broken' of an installed package cannot be loaded"):
        parse_policy("broken")
    assert [p.name for p in policy_help()][-1] == "mine"
    assert main(["replay", "--help"]) == 0
    told = capsys.readouterr().out
    assert "\n  mine " in told
    assert "\n  broken " in told


@pytest.mark.usefixtures("fresh")
def test_the_viewer_offers_a_policy_by_name_and_takes_no_file(
    synthetic_trace: SyntheticTrace,
) -> None:
    view.offer([f"{EXAMPLE}:Fading"])
    assert "fading" in [policy.name for policy in policy_help()]
    trace = synthetic_trace(steps=[40, 1, 1])
    jobs = ReplayJobs()
    assert finished(jobs, trace, "fading:half_life=2") is None
    refused = finished(jobs, trace, f"{EXAMPLE}:Fading")
    assert refused is not None
    assert "is a file; expected a name here" in refused
    with pytest.raises(InputError, match="expected a file and a class"):
        view.offer(["h2o"])


@pytest.mark.usefixtures("fresh")
def test_no_policy_of_a_file_takes_the_name_of_one_of_ours(write: Write) -> None:
    path = write(SCORES.format("None").replace("def", "name = 'h2o'\n    def", 1))
    with pytest.raises(InputError, match="has the name 'h2o'"):
        plugins.add(f"{path}:Mine")


def finished(jobs: ReplayJobs, trace: object, policy: str) -> str | None:
    """Run a job to its end; its error."""
    job = jobs.start(trace, [policy], ["9"], "step")  # type: ignore[arg-type]
    for thread in threading.enumerate():
        if thread.name == f"replay-{job.id}":
            thread.join()
    assert job.state != "running"
    return job.error
