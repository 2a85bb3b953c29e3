"""Reading sources in a process of their own, which may crash, run out of memory or hang without harming the run.

HDF5 is C code over untrusted bytes: of 400 damaged copies of an h5ad file, six made it crash. A worker therefore keeps
one reader process beside it, sends it one task after the other, and starts another one when it dies. Tasks go to the
reader as pickles; what comes back is JSON, so that nothing a file did to the reader reaches the worker but an answer.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from corpus.errors import RunError, UserError
from ingest.limits import Limits

ATTEMPTS = 2
_START_SECONDS = 120.0
_ANSWER_BYTES = 1 << 30


class ReaderDiedError(Exception):
    """A reader process ended before it answered; the message says how."""


class SourceDiedError(Exception):
    """Every attempt at a source killed its reader; the message names the source and says how."""


class Reader:
    """One reader process, started at the first task.

    Parameters
    ----------
    limits
        Its memory and the time it has for a task.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def call(self, name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Have `function(*arguments)` done: a function of a module, whose result JSON can hold.

        Raises
        ------
        UserError, RunError
            As the function raised them. Any other error becomes a `UserError` that names the source (`name`), with the
            trace as its note.
        ReaderDiedError
            If the process crashed, was killed, or took too long or too much memory. The next call starts another.
        """
        if self._connection is None:
            self._connection = self._start()
        answer = self._exchange((name, function, arguments), self.limits.reader_minutes * 60)
        if "died" in answer:
            self.stop()
            raise ReaderDiedError(answer["died"])
        if "done" in answer:
            return dict(answer["done"])
        error = RunError(answer["run_error"]) if "run_error" in answer else UserError(answer["user_error"])
        if "trace" in answer:
            error.add_note(answer["trace"])
        raise error

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            number, limits = theirs.fileno(), self.limits.model_dump_json()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ingest.sandbox_worker", str(number), str(os.getpid()), limits],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._connection = Connection(ours.detach())
        self._exchange(None, _START_SECONDS)  # it says hello once everything is imported
        return self._connection

    def _exchange(self, message: Any, seconds: float) -> dict[str, Any]:
        assert self._connection is not None
        try:
            if message is not None:
                self._connection.send(message)
            if not self._connection.poll(seconds):
                self.stop(kill=True)
                raise ReaderDiedError(f"no answer within {seconds:,.0f} s (limits.reader_minutes)")
            return dict(json.loads(self._connection.recv_bytes(_ANSWER_BYTES)))
        except (EOFError, ConnectionError):
            raise ReaderDiedError(self.stop()) from None

    def stop(self, kill: bool = False) -> str:
        """End the process, by closing its line or by force; return how it ended."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return "not running"
        if kill:
            process.kill()
        try:
            status = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"


_readers: dict[Limits, Reader] = {}


def read_safely(limits: Limits, name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Have a task done by this process's reader, with a second attempt by a fresh one if the reader dies.

    Parameters
    ----------
    name
        The source, for messages.
    function, arguments
        As for `Reader.call`.

    Raises
    ------
    UserError, RunError
        As the function raised them.
    SourceDiedError
        If the reader died at every attempt.
    """
    if limits not in _readers:
        _readers[limits] = Reader(limits)
    reasons: list[str] = []
    for _ in range(ATTEMPTS):
        try:
            return _readers[limits].call(name, function, *arguments)
        except ReaderDiedError as error:
            reasons.append(str(error))
    told = reasons[0] if len(set(reasons)) == 1 else "; then ".join(reasons)
    raise SourceDiedError(f"{name}: its reader died {ATTEMPTS} times ({told})")
