"""read: what the neurons of a model stand for, and which of them a text switches on; how difficult a question is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.fields import Count, Layer, Probability, Tokens
from ..core.outputs import check_file
from .difficulty import learn_probe
from .options import (
    Number,
    as_json,
    console,
    example,
    force_option,
    load_model,
    model_options,
    parse_methods,
    progress,
    read_text,
    refuse_unused,
)

if TYPE_CHECKING:
    from ..read import LMHeadNeurons, NeuronMap, Reading
    from ..trace.trace import Trace


@click.command(epilog=example('tokenry read --method lm-head-neurons --find because "She stayed at home because"'))
@click.argument("text", required=False)
@click.option("--method", "slug", required=True, help="A read method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--trace", "trace_path", help="Read a saved trace, captured with neurons, instead of a text.")
@click.option(
    "--least",
    type=Number(Probability),
    default=0.01,
    show_default=True,
    help="Probability from which a top token is a name.",
)
@click.option("--find", "words", multiple=True, help="The neurons of a word; may be repeated.")
@click.option("--layer", type=Number(Layer), help="The most specialized neurons of a layer.")
@click.option("--overlap", "other", metavar="MODEL", help="Share of equal names in another checkpoint.")
@click.option("--map", "map_path", help="A saved map of the model, instead of making one.")
@click.option("--save-map", help="Write the map (safetensors).")
@click.option("--problems", help="Learn difficulty from this file: lines of {question: ..., answer: ...}.")
@click.option("--arithmetic", type=Number(Count), metavar="N", help="Learn difficulty from N sums, for zoo/reasoner.")
@click.option("--marker", default="boxed", show_default=True, help="Answers: boxed, answer, number, or a regex.")
@click.option("--max-new-tokens", type=Number(Tokens), default=256, show_default=True, help="The budget of an answer.")
@click.option("--save", "folder", help="Folder for the difficulty probe.")
@force_option
@model_options
def read(
    text: str | None,
    slug: str,
    options: tuple[str, ...],
    trace_path: str | None,
    least: float,
    words: tuple[str, ...],
    layer: int | None,
    other: str | None,
    map_path: str | None,
    save_map: str | None,
    problems: str | None,
    arithmetic: int | None,
    marker: str,
    max_new_tokens: int,
    folder: str | None,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Name neurons, find them by word, and list those that a text switches on; or learn how difficult a question is.

    TEXT '-' reads standard input.
    """
    (method,) = parse_methods([slug], options, "read")
    of_maps = {"TEXT": text, "--trace": trace_path, "--find": words, "--layer": layer, "--overlap": other}
    of_maps |= {"--map": map_path, "--save-map": save_map}
    of_probes = {"--problems": problems, "--arithmetic": arithmetic, "--save": folder}
    learns = slug == "difficulty-probe"
    refuse_given(of_maps if learns else of_probes, slug)
    how = (dtype, device, trust_remote_code)
    refuse_unused(("--least",) if learns else ("--marker", "--max-new-tokens"), f"with {slug}")
    if arithmetic is not None:
        refuse_unused(("--marker",), "with --arithmetic")
    if text is None and trace_path is None:
        refuse_unused(("--least",), "without a text or a trace")
    if learns:
        where = (folder, force)
        found = learn_probe(method, (model_name, *how), problems, arithmetic, marker, max_new_tokens, *where)
        show(found, json_output)
        return
    if text is not None and trace_path:
        raise InputError("there is a text and --trace; give one of them")
    if text is None and layer is None and not (trace_path or words or other or save_map):
        raise InputError("nothing was asked; give a text, --trace, --find, --layer, --overlap or --save-map")
    if text == "-":
        text = read_text("-", "text")
    if text is not None and not text.strip():
        raise InputError("the text is empty; give some text to read")
    if save_map:
        check_file(save_map, force)
    from ..read import NeuronMap
    from ..trace.trace import Trace

    model, tokenizer = load_model(model_name, *how)
    names = NeuronMap.load(map_path, model, tokenizer) if map_path else make_map(method, model, tokenizer, model_name)
    if save_map:
        names.save(save_map)
    answers = [names.find(word) for word in words]
    if layer is not None:
        answers.append(names.table(layer))
    if other:
        answers.append(compare_maps(names, make_map(method, *load_model(other, *how), other)))
    if text is not None or trace_path:
        layers = names.named_layers(least) or "all"
        trace = Trace.load(trace_path, model) if trace_path else traced(model, tokenizer, text, layers)
        answers.append(method.read(trace, names, least=least))
    show(answers, json_output)


def refuse_given(values: dict[str, Any], slug: str) -> None:
    """Options of other methods are refused, not ignored."""
    given = [name for name, value in values.items() if value not in (None, ())]
    if given:
        raise InputError(f"{slug} has no use for {', '.join(given)}; leave it out, see `tokenry read --help`")


def make_map(method: LMHeadNeurons, model: Any, tokenizer: Any, name: str) -> NeuronMap:
    """Map a model with a progress bar on standard error."""
    with progress(f"neurons of {name}", None) as update:
        return method.map(model, tokenizer, lambda done, total, what: update(completed=done, total=total))


def compare_maps(names: NeuronMap, other: NeuronMap) -> Reading:
    """The overlap of two maps by layer."""
    from ..read import Reading

    found = names.overlap(other)
    title = f"equal top tokens: {found.share:.1%} of all neurons, {found.chance:.1%} by chance"
    return Reading(title, [{"layer": i, "share": a, "chance": b} for i, (a, b) in enumerate(found.by_layer)])


def traced(model: Any, tokenizer: Any, text: str, layers: Any) -> Trace:
    """The trace of a text with the neurons of some layers."""
    import torch

    from ..trace.trace import capture

    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    with capture(model, tokenizer, neurons=layers) as cap, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return cap.trace


def show(answers: list[Reading], json_output: bool) -> None:
    if json_output:
        as_json([{"title": answer.title, "rows": answer.rows} for answer in answers])
        return
    for answer in answers:
        console().print(answer.plot())
