r"""KV events of vLLM, SGLang and their like: a live publisher, or a dump of what one said.

SOURCE is tcp://HOST:PORT of a publisher, followed until Ctrl-C, or a file: JSON lines of messages
or single events, as maps or arrays, or msgpack of [topic, sequence, payload] (what --dump writes);
either may be gzipped. See docs/kv-events.md.

Example: kvtrace import kv-events tcp://localhost:5557 --replay tcp://localhost:5558 \
             --out run.kvtrace
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from kvtrace.console import progress
from kvtrace.errors import InputError, KvtraceError
from kvtrace.writer import TraceWriter

#: Rows of one commit of a dump: a file per table and commit.
_COMMIT_ROWS = 50_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source and the options."""
    parser.add_argument("source", metavar="SOURCE", help="tcp://HOST:PORT, or a file")
    live = parser.add_argument_group("of a live publisher")
    live.add_argument(
        "--replay", metavar="tcp://HOST:PORT", help="its replay socket, for messages that were lost"
    )
    live.add_argument(
        "--topic", metavar="TEXT", default="", help="only topics that begin so (default: all)"
    )
    live.add_argument("--dump", type=Path, metavar="FILE", help="keep the messages as they came")
    live.add_argument("--for", dest="seconds", type=float, metavar="S", help="end after S seconds")
    live.add_argument(
        "--until-idle", type=float, metavar="S", help="end after S seconds without a message"
    )


def run_import(args: argparse.Namespace, out: Path, command: list[str]) -> None:
    """Make a trace.

    Raises
    ------
    KvtraceError
        Where pyzmq or msgpack is missing.
    InputError
        For an address that cannot be used, and a file without KV events.
    TraceError
        Where `out` exists and may not be replaced.
    """
    _check_installed()
    if "://" in args.source:
        problems = _follow(args, out, command)
    else:
        _refuse_live_options(args)
        problems = _read(Path(args.source), out, force=args.force, command=command)
    for line in problems:
        print(f"kvtrace: {line}", file=sys.stderr)


def _follow(args: argparse.Namespace, out: Path, command: list[str]) -> list[str]:
    from kvtrace_recorder.importers.kv_events.follow import follow
    from kvtrace_recorder.importers.kv_events.stream import Subscriber

    with closing(Subscriber(args.source, args.replay, args.topic)) as subscriber:
        return follow(
            subscriber,
            out,
            dump=args.dump,
            seconds=args.seconds,
            idle_seconds=args.until_idle,
            force=args.force,
            command=command,
        )


def _read(path: Path, out: Path, *, force: bool, command: list[str]) -> list[str]:
    from kvtrace_recorder.importers.kv_events.dump import DumpReader
    from kvtrace_recorder.importers.kv_events.intake import Intake
    from kvtrace_recorder.importers.kv_events.problems import Problems
    from kvtrace_recorder.importers.kv_events.write import EventWriter

    problems = Problems()
    with closing(DumpReader(path, problems)) as reader:
        records = reader.records()
        first = next(records, None)
        if first is None:
            raise InputError(
                f"{path} holds no KV events ({'; '.join(problems.lines()) or 'it is empty'});"
                " JSON lines or msgpack of messages was expected; see docs/kv-events.md"
            )
        with (
            TraceWriter(
                out, source="imported", command=command, detail="events", force=force
            ) as writer,
            progress("importing") as tell,
        ):
            events = EventWriter(writer, problems)
            intake = Intake(events, problems)
            place, record = first
            while True:
                intake.take(record, intake.judge(record), "not in the dump", place)
                if events.pending >= _COMMIT_ROWS:
                    events.commit()
                    tell(reader.share)
                found = next(records, None)
                if found is None:
                    break
                place, record = found
            events.finish()
    return problems.lines()


def _refuse_live_options(args: argparse.Namespace) -> None:
    given = [
        name
        for name, value in (
            ("--replay", args.replay),
            ("--topic", args.topic),
            ("--dump", args.dump),
            ("--for", args.seconds),
            ("--until-idle", args.until_idle),
        )
        if value
    ]
    if given:
        raise InputError(
            f"{', '.join(given)} with the file {args.source}; they belong to a live publisher"
            " (tcp://HOST:PORT); leave them out"
        )


def _check_installed() -> None:
    missing = [name for name in ("zmq", "msgpack") if find_spec(name) is None]
    if missing:
        raise KvtraceError(
            f"kv-events needs {' and '.join(missing)}, not installed; pip install 'kvtrace[events]'"
        )
