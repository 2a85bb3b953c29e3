"""The reader process behind `ingest.sandbox`: `python -m ingest.sandbox_worker DESCRIPTOR PARENT LIMITS`."""

import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ingest.tasks  # noqa: F401 - imported before memory is limited, and before the first task is timed
from corpus.errors import RunError, UserError
from corpus.remote_file import forget_failures, noted_failure
from ingest.limits import GB, Limits, activate

# Address space that allocators and threads reserve without using it.
_RESERVED_BYTES = 2 << 30


def answer(name: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Do one task; every outcome is an answer. A source is not broken where the storage failed to give it."""
    forget_failures()
    found = _answer(name, function, arguments)
    failure = noted_failure()
    return {"run_error": failure} if "user_error" in found and failure is not None else found


def _answer(name: str, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    try:
        return {"done": function(*arguments)}
    except UserError as error:
        return {"user_error": str(error)}
    except RunError as error:
        return {"run_error": str(error)}
    except MemoryError:
        return {"died": "it asked for more than its memory (limits.reader_memory_gb)"}
    except Exception as error:  # noqa: BLE001 - a damaged file can make any line of a reader fail in any way
        text = (str(error).splitlines() or [""])[0]
        return {
            "user_error": f"{name}: cannot be read: {type(error).__name__}: {text}",
            "trace": traceback.format_exc(),
        }


def limit_memory(num_bytes: int) -> None:
    """Let allocations beyond what there is now and this much more fail with MemoryError; leave no core file."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    total = pages * resource.getpagesize() + num_bytes + _RESERVED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (total, total))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with(parent: int) -> None:
    """A worker that was killed must not leave a reader at work."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main(descriptor: int, parent: int, limits: Limits) -> None:
    """Answer tasks, one after the other, until the other side closes."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if sys.platform == "linux":
        limit_memory(int(limits.reader_memory_gb * GB))
    activate(limits)
    with Connection(descriptor) as connection:
        connection.send_bytes(b'{"ready": true}')
        while True:
            try:
                name, function, arguments = connection.recv()
            except EOFError:
                return
            connection.send_bytes(json.dumps(answer(name, function, arguments)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Limits.model_validate_json(sys.argv[3]))
