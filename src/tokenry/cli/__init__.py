"""The command line: one verb per stage, and `list`, `show`, `find`, `compare`, `zoo`.

Nothing heavy is imported before a command needs it, so that `tokenry list` answers at once.
"""

from __future__ import annotations

import logging
from typing import Any

import click

from .. import __version__
from ..errors import InputError
from . import catalogue, compare, decode, judge, read, represent, select, tokenize, train, zoo
from .shared import SAID, example

__all__ = ["main"]


class Refusal(click.ClickException):
    """Bad input: one sentence, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """A group that turns InputError into a refusal."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise Refusal(str(error)) from None


@click.group(cls=Commands, epilog=example("tokenry compare antislop --report report.html"))
@click.version_option(__version__)
def main() -> None:
    """Everything that happens to a token in a transformer: methods from the literature, each measured."""
    logging.getLogger("tokenry.files").addHandler(SAID)  # adding it again changes nothing
    logging.getLogger("tokenry.files").setLevel(logging.INFO)


for command in (
    catalogue.list_methods,
    catalogue.find,
    catalogue.show,
    tokenize.tokenize,
    select.select,
    represent.represent,
    decode.decode,
    read.read,
    judge.judge,
    train.train,
    compare.compare,
    zoo.zoo,
):
    main.add_command(command)
