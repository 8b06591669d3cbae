"""Policies that live elsewhere: in a user's file, or in an installed package.

>>> parse_policy("my_policy.py:Mine:weight=0.3")     # doctest: +SKIP

A package brings its own through the entry-point group `kvtrace.policies`, a name and a class each.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint, entry_points
from itertools import chain
from pathlib import Path

from kvtrace.errors import InputError
from kvtrace_viewer.replay.policies import POLICIES
from kvtrace_viewer.replay.policy import Policy
from kvtrace_viewer.user_files import FILE, class_line, class_of_file, mistakes_of, usable_class

logger = logging.getLogger(__name__)
GROUP = "kvtrace.policies"

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
        _loaded[key] = _usable(class_of_file(path, kind, Policy), str(path), "")
    return _loaded[key]


def mistakes_explained() -> AbstractContextManager[None]:
    """Turn what a policy that is not ours raises into one line that says where and why."""
    # Views: what is loaded inside the context counts too.
    return mistakes_of(chain(_loaded.values(), _installed_ones.values()))


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


def _usable(found: object, place: str, name: str) -> type[Policy]:
    """Refuse what is no policy; give a policy without a name one."""
    kind = usable_class(found, place, Policy)
    methods = ("scores", "score_held", "decide")
    if all(getattr(kind, one) is getattr(Policy, one) for one in methods):
        raise InputError(
            f"{class_line(kind, place)} has no scoring method; one of {', '.join(methods)} was"
            " expected; define scores(self, block, cuts, state)"
        )
    _check_signatures(kind, place)
    if not kind.name:
        kind.name = name or kind.__name__.lower()
    return kind


def _check_signatures(kind: type[Policy], place: str) -> None:
    """Refuse methods that the engine could not call."""
    for name, expected in vars(Policy).items():
        own = getattr(kind, name)
        if name.startswith("_") or not inspect.isfunction(expected) or own is expected:
            continue
        wanted = inspect.signature(expected)
        try:
            inspect.signature(own).bind(*wanted.parameters)
        except TypeError as error:
            line = own.__code__.co_firstlineno if inspect.isfunction(own) else 0
            raise InputError(
                f"{place} line {line}: {kind.__name__}.{name}{inspect.signature(own)} cannot be"
                f" called as the engine does ({error}); expected {name}"
                f"({', '.join(wanted.parameters)}); mend that line"
            ) from error
