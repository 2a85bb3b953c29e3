"""The command line: precedence, one-line errors, exit status."""

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic_settings import CliPositionalArg

from corpus.errors import RunError, UserError
from corpus.settings import Command, Settings, main


class Group(Settings):
    """A group."""

    number: int = 3
    """A number."""


class Item(Settings):
    """One of a list."""

    uri: str


class Act(Command):
    """Do it."""

    seen: ClassVar[list["Act"]] = []
    corpus: CliPositionalArg[str]
    """A corpus."""
    group: Group = Group()
    """Rules."""
    items: list[Item] = []
    fail: str = ""

    def run(self) -> None:
        """Act."""
        self.seen.append(self)
        if self.fail == "user":
            raise UserError("file x.h5ad, row 3: bad")
        if self.fail == "run":
            raise RunError("two units are left")
        if self.fail == "bug":
            raise ZeroDivisionError("oops")


def call(*arguments: str) -> int:
    Act.seen.clear()
    return main("toy", {"act": Act}, arguments)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[group]\nnumber = 5\n[[items]]\nuri = "a"\n')
    assert call("act", "C", "--config", str(config)) == 0
    assert (Act.seen[0].group.number, Act.seen[0].items) == (5, [Item(uri="a")])
    assert call("act", "C", f"--config={config}", "--group.number", "7") == 0
    assert Act.seen[0].group.number == 7
    assert call("act", "C") == 0
    assert Act.seen[0].group.number == 3


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "user")
    assert call("act", "C") == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("act",), "CORPUS"),
        (("act", "C", "--group.number", "many"), "group.number"),
        (("act", "C", "--bogus", "1"), "--bogus"),
        (("act", "C", "--config", "absent.toml"), "absent.toml: no such settings file"),
        (("act", "C", "--config"), "--config needs a file name"),
        (("dance",), "unknown verb 'dance'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["nope = 1", "[group]\nnope = 1", "group == 1"])
def test_a_wrong_file_is_named_by_key_or_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text(text)
    assert call("act", "C", "--config", str(config)) == 2
    error = capsys.readouterr().err
    assert "nope" in error or ("c.toml" in error and "line 1" in error)
    assert "Traceback" not in error


@pytest.mark.parametrize(("fail", "status"), [("user", 2), ("run", 1), ("bug", 1)])
def test_failures_have_a_status_and_a_line(fail: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("act", "C", "--fail", fail) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.startswith("toy act: ")
    assert call("act", "C", "--fail", fail, "--debug") == status
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure_to_talk_about(repository: Path) -> None:
    """As in `python -m ingest verify CORPUS | head -1`."""
    program = (
        "import sys\n"
        "from corpus.settings import Command, main\n"
        "class Talk(Command):\n"
        "    def run(self):\n"
        "        for number in range(100_000):\n"
        "            print(number)\n"
        "sys.exit(main('toy', {'talk': Talk}))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "talk"], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_help_names_verbs_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "Do it." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        call("act", "--help")
    assert "A number." in capsys.readouterr().out


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Group().number = 4  # type: ignore[misc]
