"""What `--help` prints is what the options say."""

from __future__ import annotations

import click
import pytest
import typer.main
from typer.testing import CliRunner

from equipoise.cli import app


def _paths(command, path=()):
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from _paths(below, (*path, name))


def _command(path):
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return command


@pytest.mark.parametrize("path", list(_paths(_command(()))), ids=" ".join)
def test_help_shows_every_option_whole(path):
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "1000", "TERMINAL_WIDTH": "1000"})
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    for option in _command(path).params:
        if option.help:
            assert " ".join(option.help.split()) in words, f"{option.name}: markup has taken a part of the text"
        if isinstance(option, click.Option) and isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in words, option.name
