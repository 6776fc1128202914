"""The `equipoise` command: its subcommands by name, and how a user's mistake ends it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from equipoise import __version__
from equipoise.commands import (
    deciding,
    measuring,
    merging,
    parallel,
    pruning,
    quantizing,
    reporting,
    routing,
    sampling,
    serving,
    streaming,
    training,
    whole,
)
from equipoise.errors import EquipoiseError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Balance the load of Mixture-of-Experts models: record where tokens go, plan copies and bits, apply, prove.",
)
for command in (
    measuring.profile,
    merging.merge,
    sampling.sample,
    deciding.plan,
    deciding.frontier,
    serving.simulate,
    serving.export,
    serving.payback,
    streaming.stream,
    streaming.watch,
    parallel.parallel,
    pruning.demonstrations,
    pruning.prune,
    quantizing.apply,
    quantizing.quantize,
    measuring.evaluate,
    whole.balance,
    whole.demo,
    deciding.inspect,
    reporting.report,
    deciding.methods,
):
    app.command()(command)
app.command("ls", help="Short for `methods`.")(deciding.methods)
app.add_typer(routing.app, name="policy")
app.add_typer(training.app, name="lab")


def main() -> None:
    """Run the command; a user's mistake is one line on standard error and exit status 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that spin while they wait make a shared machine ten times slower; sleeping costs an idle one nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars belong on terminals alone
    try:
        app()
    except EquipoiseError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _interrupted()
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has taken the KeyboardInterrupt of a command, and says nothing
            _interrupted()
        raise


def _interrupted() -> None:
    print("interrupted; the same command goes on from what is finished", file=sys.stderr)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit
