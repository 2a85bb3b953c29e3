"""Commands: frozen settings from TOML and flags, one-line errors, exit status 0, 1 or 2.

A package's `__main__.py` names its verbs: `main("ingest", {"run": Run, ...})`. A verb is a `Command`, a frozen pydantic
model whose fields are the settings and whose `run` does the work.
"""

import os
import select
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TextIO

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from corpus.errors import RunError, UserError
from corpus.store import Store


def _absolute(uri: str) -> str:
    return Store(uri).uri if uri else uri


Uri = Annotated[str, AfterValidator(_absolute)]
"""A local path or `s3://...`. Local ones become absolute at once: Ray starts workers in folders of its own."""


class Settings(BaseModel):
    """Base of every group of settings: frozen, refuses unknown keys, help text from the field docs."""

    # The settings flavour of ConfigDict lets a verb be a `Command` and a group of `Settings` at once.
    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(  # type: ignore[misc]
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )


class Command(BaseSettings):
    """Base of every verb. Flags win over the TOML file, which wins over the defaults; the environment is not read."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    def run(self) -> None:
        """Do the work."""
        raise NotImplementedError

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave out the environment: a run must be explained by its files and its command line."""
        return init_settings, TomlConfigSettingsSource(settings_cls)


def main(package: str, verbs: Mapping[str, type[Command]], arguments: Sequence[str] | None = None) -> int:
    """Run `python -m <package> <verb> [--config FILE.toml] [--a.b value ...] [--debug]`.

    Returns
    -------
    Exit status: 0 done, 1 failed, 2 bad arguments or bad input.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in rest
    if debug:
        rest.remove("--debug")
    if not rest or rest[0] in {"-h", "--help"}:
        print(_overview(package, verbs))
        return 0 if rest else 2
    verb = rest.pop(0)
    try:
        if verb not in verbs:
            raise UserError(f"unknown verb {verb!r}; {package} has {', '.join(verbs)}")
        parse(package, verb, verbs[verb], rest).run()
        sys.stdout.flush()
    except (UserError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"{package} {verb}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{package} {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - the outermost handler: anything else is our fault, told in one line
        if isinstance(error, BrokenPipeError) and _nobody_reads(sys.stdout):
            # `... | head`: nobody to tell. Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if debug:
            traceback.print_exc()
        text = str(error).strip().splitlines()
        print(
            f"{package} {verb}: failed: {type(error).__name__}: {text[-1] if text else ''} (--debug shows more)",
            file=sys.stderr,
        )
        return 1
    return 0


def _nobody_reads(stream: TextIO) -> bool:
    """Tell whether a stream is a pipe whose other end is closed."""
    watch = select.poll()
    watch.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def parse(package: str, verb: str, command: type[Command], arguments: list[str]) -> Command:
    """Build a verb's settings from its arguments.

    Raises
    ------
    UserError
        One line per wrong setting, each with its key.
    """
    arguments, config = _take_config(arguments)
    if config is not None and not config.is_file():
        raise UserError(f"{config}: no such settings file")
    # The class is derived only to give this one parse its file name and program name.
    configured = type(
        command.__name__,
        (command,),
        {
            "__doc__": f"{command.__doc__ or ''}\n\nAlso: --config FILE.toml (settings), --debug (full error traces).",
            "__module__": command.__module__,
            "model_config": SettingsConfigDict(
                toml_file=config, cli_prog_name=f"python -m {package} {verb}", cli_exit_on_error=False
            ),
        },
    )
    try:
        return configured(_cli_parse_args=arguments)  # type: ignore[call-arg]
    except ValidationError as error:
        raise UserError("; ".join(_problem(item) for item in error.errors())) from error
    except SettingsError as error:
        raise UserError(str(error).splitlines()[-1].removeprefix("error parsing CLI: ")) from error
    except ValueError as error:  # tomllib's, with line and column
        raise UserError(f"{config}: {error}") from error


def _take_config(arguments: list[str]) -> tuple[list[str], Path | None]:
    rest, config = [], None
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config":
            value = next(pending, None)
            if value is None:
                raise UserError("--config needs a file name")
            config = Path(value)
        elif argument.startswith("--config="):
            config = Path(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return rest, config


def _problem(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{key}: missing (give it in the TOML file or as --{key.replace('_', '-')})"
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown setting"
    return f"{key}: {item['msg']} (found {item['input']!r})" if key else str(item["msg"])


def _overview(package: str, verbs: Mapping[str, type[Command]]) -> str:
    lines = [f"usage: python -m {package} VERB [--config FILE.toml] [--a.b VALUE ...] [--debug]", "", "verbs:"]
    for name, command in verbs.items():
        first = (command.__doc__ or "").strip().splitlines()
        lines.append(f"  {name:<10} {first[0] if first else ''}")
    lines.append(f"\n`python -m {package} VERB --help` lists a verb's settings.")
    return "\n".join(lines)
