"""Policies that live elsewhere: in a user's file, or in an installed package.

>>> parse_policy("my_policy.py:Mine:weight=0.3")     # doctest: +SKIP

A package brings its own through the entry-point group `kvtrace.policies`, a name and a class each.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from kvtrace.errors import InputError
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy

logger = logging.getLogger(__name__)
GROUP = "kvtrace.policies"
FILE = re.compile(r"(?P<file>.+?\.py)(:(?P<kind>\w+))?(:(?P<rest>.*))?")

_loaded: dict[str, type[Policy]] = {}
"""Policies of files, by `file.py:Class` with the whole path."""
_added: dict[str, type[Policy]] = {}
"""Policies that `add` made known by name."""
_installed_ones: dict[str, type[Policy]] = {}
"""Policies of installed packages, by `module:Class`."""


def known_policies() -> dict[str, type[Policy]]:
    """Every policy that has a name: ours, those of installed packages, those that were added.

    A package's that cannot be loaded is left out, with a warning in the log.
    """
    found: dict[str, type[Policy]] = {}
    for name in known_names():
        try:
            kind = named_policy(name)
        except InputError as error:
            logger.warning("%s", error)
            continue
        if kind is not None:
            found[name] = kind
    return found


def known_names() -> list[str]:
    """Names of `known_policies`, without loading what packages bring."""
    return list(dict.fromkeys([*POLICIES, *(point.name for point in _points()), *_added]))


def named_policy(name: str) -> type[Policy] | None:
    """Return the policy of a name; None where there is none.

    Raises
    ------
    InputError
        Where it is an installed package's and cannot be loaded.
    """
    point = next((point for point in _points() if point.name == name), None)
    known = POLICIES.get(name) or _added.get(name)
    return known or (_installed(point) if point else None)


def add(text: str) -> type[Policy]:
    """Make the policy of `file.py:Class` known by its name, for as long as the process lives.

    Raises
    ------
    InputError
        Where it cannot be loaded, or another policy has its name.
    """
    match = FILE.fullmatch(text)
    if match is None or match["rest"] is not None:
        raise InputError(
            f"the policy to offer is {text!r}; expected a file and a class; "
            "write --policy my_policy.py:Mine"
        )
    kind = load_policy(match["file"], match["kind"])
    if kind.name in POLICIES:
        raise InputError(
            f"{text} has the name {kind.name!r}, which is a policy of ours; expected one of its "
            "own; change its `name`"
        )
    _added[kind.name] = kind
    return kind


def load_policy(file: str, kind: str | None) -> type[Policy]:
    """Load a policy class from a Python file; its only one where `kind` is None.

    The file is run, as `python file.py` would.

    Raises
    ------
    InputError
        With the line and the reason, where the file cannot be run or the class is no policy.
    """
    path = Path(file).resolve()
    key = f"{path}:{kind}"
    if key not in _loaded:
        _loaded[key] = _checked(run_file(path), path, kind)
    return _loaded[key]


@contextmanager
def mistakes_explained() -> Iterator[None]:
    """Turn what a policy that is not ours raises into one line that says where and why.

    Raises
    ------
    InputError
        In the place of the policy's own error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kinds = [*_loaded.values(), *_installed_ones.values()]
        files = {inspect.getsourcefile(kind) for kind in kinds}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        if not frames:
            raise
        at = frames[-1]
        raise InputError(
            f"{at.filename} line {at.lineno}, in {at.name}: {type(error).__name__}: {error}; "
            "the policy was expected to run; mend that line"
        ) from error


def _points() -> list[EntryPoint]:
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _installed(point: EntryPoint) -> type[Policy]:
    if point.value not in _installed_ones:
        try:
            found = point.load()
        except Exception as error:
            raise InputError(
                f"policy {point.name!r} of an installed package cannot be loaded from "
                f"{point.value} ({type(error).__name__}: {error}); a Policy class was expected; "
                "mend or uninstall the package"
            ) from error
        _installed_ones[point.value] = _usable(found, point.value, point.name)
    return _installed_ones[point.value]


def run_file(path: Path) -> ModuleType:
    """Run a policy file as a module of its own.

    Raises
    ------
    InputError
        With the line and the reason, where it cannot be run.
    """
    name = f"kvtrace_policy_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(
            f"the policy file {path} does not exist; a Python file was expected; "
            "write --policy my_policy.py:Mine"
        )
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(
            f"{error.filename} line {error.lineno}: {error.msg}; Python was expected; "
            "mend that line"
        ) from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = frames[-1].lineno if frames else 1
        raise InputError(
            f"{path} line {line}: {type(error).__name__}: {error}; "
            "the file was expected to run; mend that line"
        ) from error
    return module


def _checked(module: ModuleType, path: Path, kind: str | None) -> type[Policy]:
    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Policy)
        and value.__module__ == module.__name__
    }
    names = ", ".join(own) or "none"
    if kind is None and len(own) != 1:
        raise InputError(
            f"{path} has {len(own)} policies ({names}); one was expected; "
            f"name it: --policy {path.name}:{next(iter(own), 'Mine')}"
        )
    found = getattr(module, kind, None) if kind else next(iter(own.values()))
    if found is None:
        raise InputError(
            f"{path} has no class {kind!r}; its policies are {names}; name one of them"
        )
    return _usable(found, str(path), "")


def _usable(found: object, place: str, name: str) -> type[Policy]:
    """Refuse what is no policy, or a policy that cannot be made from its defaults."""
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise InputError(
            f"{place}: {getattr(found, '__name__', found)} is no policy; a class derived from "
            "kvtrace_viewer.replay.Policy was expected; derive it"
        )
    line = f"{place} line {inspect.getsourcelines(found)[1]}: {found.__name__}"
    if "__dataclass_params__" not in vars(found) and inspect.get_annotations(found):
        raise InputError(
            f"{line} has parameters and is no dataclass; one was expected; "
            "write @dataclass(frozen=True, kw_only=True) above it"
        )
    for field in fields(found):
        if field.default is MISSING and field.default_factory is MISSING:
            raise InputError(
                f"{line} has no default for {field.name}; every parameter needs one; "
                f"write {field.name} = parameter(...)"
            )
    methods = ("scores", "score_held", "decide")
    if all(getattr(found, one) is getattr(Policy, one) for one in methods):
        raise InputError(
            f"{line} has no scoring method; one of {', '.join(methods)} was expected; "
            "define scores(self, block, cuts, state)"
        )
    if not found.name:
        found.name = name or found.__name__.lower()
    return found
