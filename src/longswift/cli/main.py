"""Entry point: the table of commands, and errors as one line."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longswift.cli import (
    bench,
    build,
    calibrate,
    compare,
    demo,
    eval,
    fidelity,
    generate,
    info,
    patterns,
    report,
    tiny,
)

# Typer carries its own copy of Click or uses the installed one, depending on its version.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_USER, _INTERRUPTED = 2, 130


def _say(message: str) -> None:
    typer.echo(f"longswift: {' '.join(str(message).split())}", err=True)


def _debug() -> bool:
    return os.environ.get("LONGSWIFT_DEBUG", "") not in ("", "0")


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, even if it hit an import that made another error of it."""
    pressed = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    # What a shell starts in the background ignores it, and other threads cannot listen.
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    mine = mine and threading.current_thread() is threading.main_thread()
    if mine:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Program(TyperGroup):
    """The root command: user errors are one line and exit code 2, Ctrl-C is exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, turning errors a user can cause into one line."""
        from longswift.core.errors import LongSwiftError

        try:
            with _ctrl_c():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted; no half-written file is left.")
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output has seen enough; nothing more can be told to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except ModuleNotFoundError as error:
            if _debug() or (error.name or "").startswith("longswift"):
                raise
            _say(_missing(error))
            raise typer.Exit(_USER) from None
        except (LongSwiftError, OSError, MemoryError) as error:
            if _debug():
                raise
            _say(_describe(error))
            raise typer.Exit(_USER) from None
        except RuntimeError as error:
            if _debug() or "alloc" not in str(error) and "out of memory" not in str(error):
                raise
            _say(f"out of memory: {str(error).splitlines()[0]}")
            raise typer.Exit(_USER) from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Parse and run; usage errors are one line too."""
        # What a terminal without UTF-8 cannot show must not end the work.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        standalone_mode = extra.get("standalone_mode", True)
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
        except _ClickError as error:
            if not standalone_mode:
                raise
            where = getattr(getattr(error, "ctx", None), "command_path", "longswift")
            _say(f"{error.format_message()} Try '{where} --help'.")
            sys.exit(_USER)
        except typer.Abort:
            _say("interrupted.")
            sys.exit(_INTERRUPTED)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _missing(error: ModuleNotFoundError) -> str:
    # Lazy imports raise anew, without a name, what an import of theirs raised.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return f"this command needs {cause.name}. Install it with pip install {cause.name}."
        cause = cause.__cause__ or cause.__context__
    return str(error)


def _describe(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory. Use a shorter length or a smaller model."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}. Check the path and its permissions."
    return str(error)


app = typer.Typer(
    cls=Program,
    name="longswift",
    help="Long context for the Transformers models people already have.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from longswift import __version__

        typer.echo(f"longswift {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (also LONGSWIFT_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["LONGSWIFT_DEBUG"] = "1"
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command()(info.info)
app.command()(build.build)
app.command()(generate.generate)
app.add_typer(bench.app, name="bench")
app.command()(demo.demo)
app.command(name="eval")(eval.evaluate)
app.command()(compare.compare)
app.command()(fidelity.fidelity)
app.command()(calibrate.calibrate)
app.command()(patterns.patterns)
app.command()(report.report)
app.add_typer(tiny.app, name="tiny")


def main() -> None:
    """Run the command line."""
    try:
        app()
    except KeyboardInterrupt:
        _say("interrupted.")
        sys.exit(_INTERRUPTED)
