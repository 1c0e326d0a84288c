"""The command line: one verb per stage, and `fit`, `profile`, `serve`, `list`, `show`, `find`, `compare`, `zoo`.

Nothing heavy is imported before a command needs it, so that `tokenry list` answers at once.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, cast

import click

from .. import __version__
from ..core.errors import InputError
from ..core.fields import is_unicode, shown
from . import catalogue, compare, decode, fit, judge, profile, read, represent, select, serve, tokenize, train, zoo
from .options import SAID, example, standard_output_is_ours

__all__ = ["leaves", "main"]


class Refusal(click.ClickException):
    """Bad input: one sentence, exit code 2."""

    exit_code = 2


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Commands(click.Group):
    """Turns InputError, and a standard output that takes no more, into a refusal; what is no UTF-8 gets one, too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
        for argument in args:
            if not is_unicode(argument):
                raise Refusal(f"the argument {shown(argument)} is not UTF-8; give it in UTF-8, and rename such a file")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except InputError as error:
            raise Refusal(re.sub(r"(\S{80})\S{80,}", r"\1...", str(error))) from None  # a value may be long
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered is flushed once more at exit
            raise Refusal(f"standard output cannot be written ({error.strerror}); write somewhere else") from None


@click.group(cls=Commands, epilog=example("tokenry compare antislop --report report.html"))
@click.version_option(__version__)
def main() -> None:
    """Everything that happens to a token in a transformer: methods from the literature, each measured."""
    logging.getLogger("tokenry.core.files").addHandler(SAID)  # adding it again changes nothing
    logging.getLogger("tokenry.core.files").setLevel(logging.INFO)


for command in (
    catalogue.list_methods,
    catalogue.find,
    catalogue.show,
    tokenize.tokenize,
    select.select,
    represent.represent,
    decode.decode,
    read.read,
    fit.fit,
    judge.judge,
    profile.profile,
    train.train,
    serve.serve,
    compare.compare,
    zoo.zoo,
):
    main.add_command(command)


def leaves(group: click.Group) -> Iterator[click.Command]:
    """All commands that do something."""
    for command in group.commands.values():
        yield from leaves(command) if isinstance(command, click.Group) else [command]


for command in leaves(main):
    command.callback = standard_output_is_ours()(cast(Any, command.callback))
