"""Classes from a user's Python file, `file.py:Class`, with every mistake in one clear line."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from kvtrace.errors import InputError

Kind = TypeVar("Kind")
FILE = re.compile(r"(?P<file>.+?\.py)(:(?P<kind>\w+))?(:(?P<rest>.*))?")


def class_of_file(path: Path, kind: str | None, base: type[Kind]) -> type[Kind]:
    """Run a Python file, and return its class of a name; its only one where `kind` is None.

    Raises
    ------
    InputError
        With the line and the reason, where the file cannot be run or the class is not derived
        from `base`, or cannot be made from its defaults.
    """
    module = run_file(path)
    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
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
    return usable_class(found, str(path), base)


def usable_class(found: object, place: str, base: type[Kind]) -> type[Kind]:
    """Refuse what is not derived from `base`, or cannot be made from its defaults."""
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(
            f"{place}: {getattr(found, '__name__', found)} is no policy; a class derived from "
            f"{base.__module__.rpartition('.')[0]}.{base.__name__} was expected; derive it"
        )
    line = class_line(found, place)
    if "__dataclass_params__" not in vars(found) and inspect.get_annotations(found):
        raise InputError(
            f"{line} has parameters and is no dataclass; one was expected; "
            "write @dataclass(frozen=True, kw_only=True) above it"
        )
    for field in fields(found):  # type: ignore[arg-type]
        if field.default is MISSING and field.default_factory is MISSING:
            raise InputError(
                f"{line} has no default for {field.name}; every parameter needs one; "
                f"write {field.name} = parameter(...)"
            )
    return found


def class_line(found: type, place: str) -> str:
    """Where a class is, for errors."""
    return f"{place} line {inspect.getsourcelines(found)[1]}: {found.__name__}"


@contextmanager
def mistakes_of(kinds: Iterable[type]) -> Iterator[None]:
    """Turn what the code of such classes raises into one line that says where and why.

    Parameters
    ----------
    kinds : iterable of type
        Read only when something is raised.

    Raises
    ------
    InputError
        In the place of the class's own error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        files = {inspect.getsourcefile(kind) for kind in kinds}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        if not frames:
            raise
        at = frames[-1]
        raise InputError(
            f"{at.filename} line {at.lineno}, in {at.name}: {type(error).__name__}: {error}; "
            "the policy was expected to run; mend that line"
        ) from error


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
