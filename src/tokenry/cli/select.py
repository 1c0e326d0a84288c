"""select: answer from a shortened cache."""

from __future__ import annotations

import click

from ..core.errors import InputError
from ..core.fields import Tokens
from .options import Number, as_json, example, load_model, model_options, parse_methods, progress, read_text, say


@click.command(epilog=example('tokenry select --method compresskv -o budget=128 --context FILE "Who opened the door?"'))
@click.argument("question")
@click.option("--method", "slug", required=True, help="A select method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--context", required=True, help="File with the long text; '-' for standard input.")
@click.option("--max-new-tokens", type=Number(Tokens), default=64, show_default=True)
@model_options
def select(
    question: str,
    slug: str,
    options: tuple[str, ...],
    context: str,
    max_new_tokens: int,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    (method,) = parse_methods([slug], options, "select")
    text = read_text(context, "context")
    if not text.strip() or not question.strip():
        raise InputError("the context or the question is empty; give some text")
    from ..decode import generate
    from ..models.kv_cache import cache_bytes

    model, tokenizer = load_model(model_name, dtype, device, trust_remote_code)
    with method(model) as kept, progress(slug, None):
        output = generate(model, tokenizer, f"{text}\n\n{question}", max_new_tokens=max_new_tokens)
    counts = kept.trace.counts()
    if json_output:
        size = {"prompt_tokens": len(output.prompt_ids[0]), "cache_bytes": cache_bytes(output.past_key_values)}
        as_json({"text": output.texts[0], "kept": list(counts.values()), **size})
    else:
        say(output.texts[0].strip())
        mean = sum(counts.values()) / len(counts)
        click.echo(f"(kept {mean:.0f} of {len(output.prompt_ids[0])} tokens per layer)", err=True)
