"""The `kvtrace` command: finds its verbs through the entry-point group `kvtrace.commands`."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from kvtrace.errors import KvtraceError
from kvtrace.version import __version__

GROUP = "kvtrace.commands"
#: Which extra brings a package that a verb may miss.
_EXTRAS = {
    "kvtrace_recorder": "recorder",
    "kvtrace_viewer": "viewer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, 1 for an error of the user's, 2 for misuse."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = {point.name: point for point in entry_points(group=GROUP)}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(verbs))
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"kvtrace {__version__}")
        return 0
    if arguments[0] not in verbs:
        print(
            f"error: {arguments[0]!r} is no verb; one of {', '.join(verbs)} was expected;"
            " see kvtrace --help",
            file=sys.stderr,
        )
        return 2
    try:
        return _run(verbs[arguments[0]], arguments[1:])
    except KvtraceError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, nothing more to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(point: EntryPoint, arguments: Sequence[str]) -> int:
    verb = _load(point)
    text = (verb.__doc__ or "").strip()
    parser = argparse.ArgumentParser(
        prog=f"kvtrace {point.name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_arguments(parser)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:
        # argparse has printed its usage and reason, or the help that was asked for.
        return int(stop.code or 0)
    return int(verb.run(parsed))


def _load(point: EntryPoint) -> ModuleType:
    try:
        return import_module(point.value)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(point.value.split(".")[0])
        if extra is None or (error.name or "").startswith("kvtrace"):
            raise
        raise KvtraceError(
            f"`kvtrace {point.name}` needs the package {error.name}, which is not installed;"
            f" pip install 'kvtrace[{extra}]'"
        ) from error


def _overview(verbs: dict[str, EntryPoint]) -> str:
    lines = [
        "usage: kvtrace VERB ...",
        "",
        "Record what a language model does with its KV cache once, replay everything.",
        "",
    ]
    lines += [f"  {name:<10} {_summary(point)}" for name, point in sorted(verbs.items())]
    lines += ["", "kvtrace VERB --help tells more; start with: kvtrace demo"]
    return "\n".join(lines)


def _summary(point: EntryPoint) -> str:
    # The help must not cost the import of torch or dash: read the docstring from the source.
    spec = find_spec(point.value)
    if spec is None or spec.origin is None:
        return "(not installed)"
    source = Path(spec.origin).read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.splitlines()[0] if text else ""


if __name__ == "__main__":
    sys.exit(main())
