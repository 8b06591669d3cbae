"""The first file of the writer's process: finds this package where its host has it, and goes on.

Run by its path in an isolated interpreter, so that nothing beside the user's script, and nothing
in this folder, may take the place of what is imported.
"""

import json
import os
import sys


def _find_packages() -> None:
    own, others = json.loads(os.environ.pop("KVTRACE_WRITER_PATHS"))
    at = next((i for i, p in enumerate(sys.path) if p.endswith("-packages")), len(sys.path))
    sys.path[at:at] = own
    sys.path += [path for path in others if path not in sys.path]


if __name__ == "__main__":
    _find_packages()
    from kvtrace_recorder.writer.main import main

    main(int(sys.argv[1]))
