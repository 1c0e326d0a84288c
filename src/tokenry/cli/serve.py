"""serve: OpenAI's routes over HTTP, in front of a model or of another server."""

from __future__ import annotations

import ipaddress
import json
import logging
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import click
from annotated_types import Ge, Le

from ..core.errors import InputError
from ..core.fields import Batch, Chunk, Positive, Times, Tokens, shown
from .options import (
    Number,
    engine_options,
    example,
    load_model,
    load_reader,
    parse_methods,
    refuse_unused,
    say,
    trust_option,
)

NEEDED = ("fastapi", "prometheus_client", "uvicorn")
LOCAL = ("127.0.0.1", "localhost", "::1")
OF_MODELS = ("--dtype", "--device", "--engine", "--context", "--threads", "--reuse-memory")
OF_SERVERS = ("--server-model", "--server-key", "--tokenizer", "--chunk")
MIB = 2**20
PROMPT = {"prompt": "The sea was calm, and", "max_tokens": 40, "banned_strings": ["a testament to"]}

Port = Annotated[int, Ge(0), Le(65535)]


@click.command(epilog=example("tokenry serve --model smollm2 --method antislop -o phrases=builtin:en --port 8000"))
@click.option("--model", "model_name", default="smollm2", show_default=True, help="Name, folder, hub id or GGUF file.")
@engine_options
@click.option("--dtype", help="float32, bfloat16 or float16; default: float32 on CPU.")
@click.option("--device", help="Where to run; default: cuda where there is one.")
@trust_option
@click.option("--server", help="Stand in front of another OpenAI-compatible server, such as http://127.0.0.1:8001.")
@click.option("--server-model", help="The model's name there; default: the first one that it lists.")
@click.option("--server-key", envvar="TOKENRY_API_KEY", help="What that server wants to see; or set TOKENRY_API_KEY.")
@click.option("--tokenizer", help="Whose tokenizer the model of that server has; default: that of --model.")
@click.option("--chunk", type=Number(Chunk), help="Tokens asked of that server at a time; default: it adapts.")
@click.option("--method", "slugs", multiple=True, help="A decode method for every request; may be repeated.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("--port", type=Number(Port), default=8000, show_default=True, help="0: any free one.")
@click.option("--rows", type=Number(Batch), default=32, show_default=True, help="Texts written at a time.")
@click.option("--waiting", type=Number(Times), default=256, show_default=True, help="Texts that may wait for a row.")
@click.option(
    "--reuse-memory",
    type=Number(Times),
    default=1024,
    show_default=True,
    help="MiB for texts that are over, so that one that begins alike is not read anew; 0: none rests.",
)
@click.option("--max-tokens", type=Number(Tokens), default=4096, show_default=True, help="Most new tokens of a text.")
@click.option("--timeout", type=Number(Positive), default=600.0, show_default=True, help="Most seconds of a text.")
@click.option("--api-key", envvar="TOKENRY_SERVE_KEY", help="What requests must bring; or set TOKENRY_SERVE_KEY.")
@click.option("--insecure", is_flag=True, help="Let other machines in without an API key.")
@click.option("--log-texts", is_flag=True, help="Log prompts and texts; otherwise they are logged nowhere.")
def serve(
    slugs: tuple[str, ...],
    options: tuple[str, ...],
    host: str,
    port: int,
    rows: int,
    waiting: int,
    max_tokens: int,
    timeout: float,
    api_key: str | None,
    insecure: bool,
    log_texts: bool,
    **given: Any,
) -> None:
    """Serve a model by OpenAI's routes, with methods in every request or those that a request names."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"the server needs {', '.join(missing)}; run `pip install tokenry[serve]`")
    check_key(api_key)
    if not is_loopback(host) and not api_key and not insecure:
        raise InputError(
            f"--host {host} lets other machines in; give --api-key KEY, or --insecure where all of them are trusted"
        )
    methods = parse_methods(slugs, options, "decode")
    from ..serve.app import create_app
    from ..serve.running import Server, bound
    from ..serve.service import Limits

    with bound(host, port) as place:
        backend = proxy(rows, waiting, **given) if given["server"] is not None else worker(rows, waiting, **given)
        if log_texts:
            log()
        app = create_app(
            backend,
            methods=methods,
            limits=Limits(tokens=max_tokens, seconds=timeout),
            api_key=api_key,
            hosts=None if api_key or insecure else dict.fromkeys((*LOCAL, host)),
            log_texts=log_texts,
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
        with suppress(KeyboardInterrupt):  # which uvicorn hands on when all is closed
            Server(app, GRACE, lambda: announce(backend.name, url, api_key is not None)).run(sockets=[place])


GRACE = 30.0  # seconds in which running texts may end when the server is told to stop


def check_key(key: str | None) -> None:
    """Refuse what no header takes."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise InputError("the API key must be printable ASCII, as it travels in a header; give another one")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise InputError(f"--host {shown(host)} is no address; give one such as 127.0.0.1 or 0.0.0.0") from None


def worker(
    rows: int,
    waiting: int,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    engine: str | None,
    context: int | None,
    threads: int | None,
    reuse_memory: int,
    **_: Any,
) -> Any:
    """A backend that runs a model of its own."""
    refuse_unused(OF_SERVERS, "without --server")
    loaded = load_model(model_name, dtype, device, trust_remote_code, engine=engine, context=context, threads=threads)
    from ..serve.worker import Worker

    name = Path(model_name).stem if model_name.endswith(".gguf") else model_name
    return Worker(loaded, name, rows, waiting, reuse_memory=reuse_memory * MIB)


def proxy(
    rows: int,
    waiting: int,
    server: str,
    server_model: str | None,
    server_key: str | None,
    tokenizer: str | None,
    chunk: int | None,
    model_name: str,
    trust_remote_code: bool,
    **_: Any,
) -> Any:
    """A backend that asks another server."""
    refuse_unused(OF_MODELS, "with --server")
    from ..decode import RemoteServer
    from ..serve.proxy import Proxy

    reader = load_reader(tokenizer or model_name, trust_remote_code)
    return Proxy(RemoteServer(server, server_model, server_key), reader, rows, waiting, chunk)


def log() -> None:
    """Show prompts and texts on standard error."""
    logger, handler = logging.getLogger("tokenry.serve"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def announce(name: str, url: str, has_key: bool) -> None:
    """Say where the server is, and how it is asked."""
    key = ' -H "Authorization: Bearer $TOKENRY_SERVE_KEY"' if has_key else ""
    say(f"{name} is served at {url}/v1; Ctrl-C ends it. Try")
    say(f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(PROMPT)}'")
