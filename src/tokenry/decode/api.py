"""The doors to the decode loop: `loop` for `model.generate(custom_generate=...)`, `generate` for prompts as text, and
`opened` for the loop itself, before its first step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..core.errors import InputError
from ..core.fields import Temperature, Tokens, TorchSeed, check
from ..models.anatomy import vocabulary_size
from ..models.checkpoint_files import read_tokenizer, reading
from ..models.kv_cache import held_columns
from ..models.masks import sees_both_sides
from ..models.positions import check_prompt_fits, context_window, fixed_positions
from ..models.prompts import Prompts, encode_prompts
from ..text.words import listed
from .contract import Call, DecodeMethod, LoopMethod, PlanMethod, Plugins, RunnerMethod, refuse_others
from .engines.choice import open_engine
from .generation.engine import Engine
from .generation.job import Job
from .generation.layer_policy import LayerPolicy
from .generation.loop import DecodeLoop
from .generation.monitor import Monitor
from .generation.options import AfterPrompt, check_config, check_processors, ending, kept_by_generate
from .generation.output import DecodeOutput
from .generation.plugins import Drafting
from .generation.sampler import WARPERS

__all__ = ["EngineFor", "generate", "loop", "opened"]

EngineFor = Callable[[Plugins], Engine | None]  # the engine for a loop with these plug-ins; None: one of its own


def loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    monitors: Sequence[Monitor] = (),
    layer_policy: LayerPolicy | None = None,
    interventions: Sequence[AbstractContextManager] = (),
    final_processors: Sequence[LogitsProcessor] = (),
    token_streamers: Sequence[BaseStreamer] = (),
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    rewind: str = "auto",
    budgets: Sequence[int] | None = None,
    speculation: Drafting | None = None,
    logprobs: int | None = None,
    engine: EngineFor | None = None,
    unstarted: bool = False,
    **model_kwargs: Any,
) -> DecodeOutput | DecodeLoop | Tensor:
    """The decode loop as a `custom_generate` callable.

        model.generate(**inputs, custom_generate=tokenry.decode.loop, monitors=[...], processing_class=tokenizer)

    `generate` prepares the configuration, logits processors and cache as always. `processing_class` is the
    tokenizer; without it the one saved beside the model is used. `final_processors` are logits processors that act
    last, after temperature and truncation. `token_streamers` has one streamer per row; `streamer` of `generate` is for
    one row. All of them end, also when something fails. `budgets` are the most new tokens of each row, where that is
    less than `max_new_tokens`. `speculation` drafts several tokens per step (see `speculative`). `past_key_values` may
    hold the first columns of the prompt. `logprobs` is how many of the likeliest tokens are told beside each token, in
    `DecodeOutput.logprobs`. `engine` may give another engine than one of this loop's own; it is not asked where the
    cache holds something. Returns ids, or a `DecodeOutput` with `return_dict_in_generate=True`; with `unstarted=True`
    the loop itself, before its first step.

    Strings that end a text are given as `stop`: before it gets here, `generate` refuses `stop_strings` and loses the
    `tokenizer` that it asks for.

    Raises:
        InputError: an option of `generate` that the loop would have to ignore (beams, assistants, scores, ...), what
            does not fit together, a prompt beyond the context window.
    """
    kept = kept_by_generate("streamer", "assistant_model", "synced_gpus")
    with ending([*token_streamers, *([AfterPrompt(kept["streamer"])] if "streamer" in kept else [])]) as streamers:
        if "streamer" in kept and len(streamers) != len(input_ids):
            raise InputError(
                f"streamer shows one row, here are {len(input_ids)} rows, {len(token_streamers)} token_streamers; "
                "give token_streamers alone, one per row"
            )
        check_config(generation_config, **kept)
        _check_draw(seed, generation_config)
        mask = model_kwargs.pop("attention_mask", None)
        _check_model(model)
        _check_inputs(model, input_ids, mask, model_kwargs)
        if monitors or stop:
            processing_class = processing_class or _tokenizer_of(model.name_or_path)
        if monitors or speculation is not None:
            check_processors(logits_processor)
        processors, warpers = _split(logits_processor)
        plugins = Plugins(processors, monitors, layer_policy, interventions, final_processors, speculation)
        limits = _limits(model, input_ids, mask, stopping_criteria, generation_config)
        made = _engine(model, plugins, rewind, limits["max_new_tokens"], model_kwargs, engine)
        job = Job(
            input_ids,
            attention_mask=mask,
            do_sample=generation_config.do_sample,
            seed=seed,
            warpers=warpers,
            budgets=budgets,
            stop=stop,
            logprobs=logprobs,
            **limits,
        )
        make = cast(Callable[..., DecodeLoop], DecodeLoop if speculation is None else speculation.loop)
        decoding = make(made, job, processing_class, plugins)
        if unstarted:
            return decoding
        output = decoding.generate(streamers)
    return output if generation_config.return_dict_in_generate else output.sequences


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    methods: Sequence[DecodeMethod] = (),
    processors: Sequence[LogitsProcessor] = (),
    monitors: Sequence[Monitor] = (),
    layer_policy: LayerPolicy | None = None,
    interventions: Sequence[AbstractContextManager] = (),
    final_processors: Sequence[LogitsProcessor] = (),
    speculation: Drafting | None = None,
    streamers: Sequence[BaseStreamer] = (),
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    max_new_tokens: int = 256,
    **options: Any,
) -> DecodeOutput:
    """Continue one or several prompts with any combination of methods and plug-ins.

    Args:
        prompts: a prompt or several, see `encode_prompts`.
        methods: decode methods; their plug-ins come before the ones given here. One that reads the prompts first, or
            writes the texts itself, gets all the rest.
        final_processors: logits processors that act last, after temperature and truncation.
        speculation: drafts several tokens per step, see `loop`.
        seed: makes sampling repeatable, row by row; None uses torch's global generator.
        chat: put each prompt through the chat template where the tokenizer has one.
        options: what `model.generate` takes, such as do_sample, temperature, min_p, stop_strings, streamer. With
            `generation_config` it is that which says whether to sample.

    Raises:
        InputError: empty prompt, one with half a surrogate pair, a chat template that fails, a prompt beyond the
            context window, a number of tokens, temperature or seed out of range, an option of `model.generate` that the
            loop would have to ignore.
    """
    single = options.pop("streamer", None)
    with ending([*streamers, *([] if single is None else [single])]) as streamers:
        plugins = Plugins(processors, monitors, layer_policy, interventions, final_processors, speculation)
        call = Call(plugins, max_new_tokens, seed, stop, chat, streamers, options)
        call, readers = _checked(model, tokenizer, methods, call)
        if readers and isinstance(readers[0], RunnerMethod):
            return readers[0].run(model, tokenizer, prompts, call, readers[1:])
        return _opened(model, tokenizer, prompts, call, readers).generate(streamers)


def opened(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    methods: Sequence[DecodeMethod] = (),
    engine: EngineFor | None = None,
    **options: Any,
) -> DecodeLoop:
    """The decode loop that `generate` would run, before its first step.

        loop = tokenry.decode.opened(model, tokenizer, prompt, methods=[Antislop(...)])
        for settled in loop.steps(): ...

    Args:
        engine: asked with the plug-ins of the loop, gives the engine that it runs on, or None for one of its own. Not
            asked where a method has read the prompts into a cache.
        options: what else `generate` takes, but no streamers.

    Raises:
        InputError: what `generate` refuses; a method that writes the texts itself, and so has no steps.
    """
    if options.get("streamers") or options.get("streamer") is not None:
        raise InputError("streamers are fed by tokenry.generate; take the steps of the loop instead")
    call, readers = _checked(model, tokenizer, methods, Call.of(**options))
    if readers and isinstance(readers[0], RunnerMethod):
        raise InputError(f"{readers[0].slug} writes the texts itself and has no steps; use tokenry.generate")
    return _opened(model, tokenizer, prompts, call, readers, engine)


def _checked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, methods: Sequence[DecodeMethod], call: Call
) -> tuple[Call, list[DecodeMethod]]:
    """The call with what the methods bring to it, and those methods that do more than that."""
    if call.max_new_tokens < 1:
        raise InputError(f"max_new_tokens={call.max_new_tokens} leaves nothing to generate; give a number >= 1")
    check("max_new_tokens", call.max_new_tokens, Tokens)
    if call.options.get("temperature") is not None:
        check("temperature", call.options["temperature"], Temperature)
    if call.seed is not None:
        check("seed", call.seed, TorchSeed)
    options, own, stop = _taken(model, dict(call.options), call.stop)
    plugins = replace(call.plugins, processors=(*call.plugins.processors, *own))
    for method in reversed([method for method in methods if isinstance(method, LoopMethod)]):
        plugins = method.plugins(model, tokenizer) + plugins
    readers = [method for method in methods if not isinstance(method, LoopMethod)]
    return replace(call, plugins=plugins, stop=stop, options=options), readers


def _opened(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    call: Call,
    readers: Sequence[DecodeMethod],
    engine: EngineFor | None = None,
) -> DecodeLoop:
    """The decode loop, behind what a method has read, if there is one that reads."""
    first = readers[0] if readers else None
    if not isinstance(first, PlanMethod):
        return _looped(model, tokenizer, encode_prompts(tokenizer, prompts, call.chat), call, engine)
    refuse_others(first, readers[1:])
    plan = first.plan(model, tokenizer, prompts, call)
    call = replace(call, plugins=call.plugins + plan.plugins, options={**call.options, **plan.options})
    decoding = _looped(model, tokenizer, plan.prompts, call, engine)
    decoding.finish = plan.finish
    return decoding


def _looped(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    call: Call,
    engine: EngineFor | None,
) -> DecodeLoop:
    """The decode loop of encoded prompts, behind what `model.generate` prepares."""
    plugins = {f.name: getattr(call.plugins, f.name) for f in fields(Plugins) if f.name != "processors"}
    return cast(Any, model).generate(
        **inputs.to(model.device),
        custom_generate=loop,
        unstarted=True,
        engine=engine,
        logits_processor=LogitsProcessorList(call.plugins.processors),
        **plugins,
        processing_class=tokenizer,
        seed=call.seed,
        stop=call.stop,
        max_new_tokens=call.max_new_tokens,
        **{"do_sample": False, "use_cache": True, **call.options},
    )


ELSEWHERE = {  # arguments of `model.generate` that `generate` has in another place
    "inputs": "give the prompts as third argument",
    "input_ids": "give the prompts as third argument",
    "inputs_embeds": "the decode loop starts from tokens; give texts or ids as third argument",
    "attention_mask": "give a mapping with input_ids and attention_mask as third argument",
    "custom_generate": "give methods or plug-ins",
    "max_length": "give max_new_tokens",
    "return_dict_in_generate": "the result is always a DecodeOutput; leave it out",
    "monitors": "give it to one call only",
    "token_streamers": "give streamers",
    "processing_class": "the tokenizer is the second argument",
    "unstarted": "tokenry.decode.opened gives the loop itself",
    "engine": "tokenry.decode.opened takes it",
}


def _taken(
    model: PreTrainedModel, options: dict[str, Any], stop: str | Sequence[str]
) -> tuple[dict[str, Any], Sequence[LogitsProcessor], Sequence[str]]:
    """Options that can be handed to `model.generate`, the logits processors among them, and all stop strings."""
    for name, remedy in ELSEWHERE.items():
        if options.get(name) is not None:
            raise InputError(f"{name} is not an option of tokenry.generate; {remedy}")
    if options.get("cache_implementation") == "paged":
        raise InputError("cache_implementation='paged' leaves the decode loop out; choose another one")
    config = options.get("generation_config")
    check_config(config or GenerationConfig(), **options)
    rest = {name: value for name, value in options.items() if name not in ("logits_processor", "stop_strings")}
    if config is not None:
        if config.max_new_tokens is not None or config.max_length is not None:
            raise InputError(
                "the generation_config says how long the text may be; give max_new_tokens beside it instead"
            )
        rest.setdefault("do_sample", bool(config.do_sample))
    known = [options.get("stop_strings"), getattr(config, "stop_strings", None), model.generation_config.stop_strings]
    strings = next((one for one in known if one is not None), ())
    if strings:  # `model.generate` would ask for a tokenizer that it does not hand on
        rest["stop_strings"] = None
    return rest, options.get("logits_processor") or (), (*listed(stop, "stop string"), *listed(strings, "stop string"))


# --- small pieces --------------------------------------------------------------------------------------------------


def _check_model(model: PreTrainedModel) -> None:
    if sees_both_sides(model):
        raise InputError(
            "the model sees both sides and cannot write from left to right; use a method for masked-diffusion models, "
            "such as masked-diffusion"
        )


def _check_inputs(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, further: dict[str, Any]) -> None:
    """Refuse a prompt that the loop would read in another way than it is meant. Takes `position_ids` out."""
    if further.get("inputs_embeds") is not None:
        raise InputError("the decode loop starts from tokens and does not take inputs_embeds; give input_ids")
    size = vocabulary_size(model)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise InputError(f"input_ids run from {int(ids.min())} to {int(ids.max())}; this model has ids 0 to {size - 1}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("a prompt is padded on the right, where tokens will follow; pad it with padding_side='left'")
    positions = further.pop("position_ids", None)
    live = torch.ones_like(ids) if mask is None else mask.long()
    if positions is not None and bool(((positions[..., : ids.shape[1]] - live.cumsum(-1) + 1) * live).any()):
        raise InputError("position_ids do not count the tokens of the prompt one by one; leave them to the decode loop")
    check_prompt_fits(model, int(live.sum(-1).max()))


def _check_draw(seed: int | None, config: GenerationConfig) -> None:
    if seed is not None:
        check("seed", seed, TorchSeed)
    if config.do_sample and config.temperature is not None:
        check("temperature", config.temperature, Temperature)


def _limits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, criteria: Sequence[Any], config: GenerationConfig
) -> dict[str, Any]:
    """When rows end: fields of `Job`, from what `generate` has prepared."""
    eos = {i for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist()}
    others = [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    longest = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    most = min([config.max_length, *longest]) - ids.shape[1]
    pad = config._pad_token_tensor
    return {
        "max_new_tokens": most,
        "room": _room(model, ids, mask, most),
        "eos_ids": tuple(eos),
        "stopping_criteria": [StoppingCriteriaList(others)] if others else (),
        "pad_id": None if pad is None else int(pad),
    }


def _engine(
    model: PreTrainedModel,
    plugins: Plugins,
    rewind: str,
    max_new_tokens: int,
    model_kwargs: dict[str, Any],
    engine: EngineFor | None,
) -> Engine:
    """The engine with the cache among the arguments of the model, if there is one; the rest goes to its forward. Or
    another one, where there is nothing of both."""
    caches = [model_kwargs.pop(name, None) for name in ("past_key_values", "cache_params")]
    cache = next((cache for cache in caches if cache is not None), None)
    for name in ("logits_to_keep", "use_cache"):
        model_kwargs.pop(name, None)
    if engine is not None and not model_kwargs and not held_columns(cache):
        other = engine(plugins)
        if other is not None:
            return other
    rewinds = bool(plugins.monitors) or plugins.speculation is not None
    return open_engine(model, plugins, rewinds, cache, rewind, model_kwargs, max_new_tokens)


def _room(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, wanted: int) -> list[int] | None:
    """How many tokens each row may get, if positions end before `wanted` of them; None if that is no limit."""
    window = context_window(model)
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    if window is None or max(lengths) + wanted <= window:
        return None
    ends = fixed_positions(model) is not None
    warnings.warn(
        f"the text may come to {max(lengths) + wanted} tokens, the model's context window is {window}: "
        + ("it ends there" if ends else "beyond it the model writes what it was not made for"),
        stacklevel=4,
    )
    return [min(wanted, window - length) for length in lengths] if ends else None


def _split(processors: LogitsProcessorList) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
    """What changes the distribution, and what only truncates the draw. `generate` puts the latter last."""
    first = next((i for i, p in enumerate(processors) if isinstance(p, WARPERS)), len(processors))
    return list(processors[:first]), list(processors[first:])


@lru_cache(maxsize=4)
def _tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    if not name or not Path(name).is_dir():
        raise InputError("monitors and stop strings read text; pass processing_class=tokenizer to generate")
    with reading(name, "tokenizer"):
        return read_tokenizer(name)
