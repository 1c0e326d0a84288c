"""Two doors to the decode loop: `loop` for `model.generate(custom_generate=...)`, `generate` for prompts as text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ..checkpoint_files import read_tokenizer, reading
from ..errors import InputError
from ..fields import Temperature, Tokens, TorchSeed, check
from ..masks import sees_both_sides
from ..prompts import rendered
from ..text import check_encodable
from ..words import listed
from .core import WARPERS, DecodeLoop, DecodeOutput, Monitor
from .engine import LayerPolicy, TransformersEngine
from .method import DecodeMethod, Plugins

__all__ = ["encode_prompts", "generate", "loop"]


def loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    monitors: Sequence[Monitor] = (),
    layer_policy: LayerPolicy | None = None,
    steerers: Sequence[AbstractContextManager] = (),
    caps: Sequence[LogitsProcessor] = (),
    token_streamers: Sequence[BaseStreamer] = (),
    processing_class: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    rewind: str = "auto",
    budgets: Sequence[int] | None = None,
    speculation: Any = None,
    **model_kwargs: Any,
) -> DecodeOutput | Tensor:
    """The decode loop as a `custom_generate` callable.

        model.generate(**inputs, custom_generate=tokenry.decode.loop, monitors=[...], processing_class=tokenizer)

    `generate` prepares the configuration, logits processors and cache as always. `processing_class` is the
    tokenizer; without it the one saved beside the model is used. `caps` are logits processors that act last, after
    temperature and truncation. `token_streamers` has one streamer per row
    (`generate` does not pass its own `streamer` on). `budgets` are the most new tokens of each row, where that is less
    than `max_new_tokens`. `speculation` drafts several tokens per step (see `speculative`). `past_key_values` may hold
    the first columns of the prompt. Returns ids, or a `DecodeOutput` with `return_dict_in_generate=True`.
    """
    if generation_config.num_beams > 1:
        raise InputError("the decode loop has no beams; leave num_beams at 1")
    if sees_both_sides(model):
        raise InputError(
            "the model sees both sides and cannot write from left to right; use a method for masked-diffusion models, "
            "such as masked-diffusion"
        )
    if seed is not None:
        check("seed", seed, TorchSeed)
    if generation_config.do_sample and generation_config.temperature is not None:
        check("temperature", generation_config.temperature, Temperature)
    if monitors or token_streamers or stop:
        processing_class = processing_class or _tokenizer_of(model.name_or_path)
    _check_context(model, input_ids.shape[1])
    processors, warpers = _split(logits_processor)
    eos = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
    others = [c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    mask = model_kwargs.pop("attention_mask", None)
    cache = model_kwargs.pop("past_key_values", None)
    for name in ("position_ids", "logits_to_keep", "use_cache", "synced_gpus", "streamer", "tokenizer"):
        model_kwargs.pop(name, None)
    max_new_tokens = generation_config.max_length - input_ids.shape[1]
    rewinds = bool(monitors) or speculation is not None
    engine = TransformersEngine(model, cache, layer_policy, rewinds, rewind, model_kwargs, max_new_tokens)
    runner = (DecodeLoop if speculation is None else speculation.loop)(
        engine,
        processing_class,
        processors=processors,
        warpers=warpers,
        caps=caps,
        monitors=monitors,
        steerers=steerers,
        streamers=token_streamers,
        do_sample=generation_config.do_sample,
        seed=seed,
    )
    pad = generation_config._pad_token_tensor
    output = runner.generate(
        input_ids,
        mask,
        max_new_tokens=max_new_tokens,
        budgets=budgets,
        eos_ids=eos[0] if eos else (),
        pad_id=None if pad is None else int(pad),
        stop=stop,
        stopping_criteria=others,
    )
    return output if generation_config.return_dict_in_generate else output.sequences


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | BatchEncoding,
    *,
    methods: Sequence[DecodeMethod] = (),
    processors: Sequence[LogitsProcessor] = (),
    monitors: Sequence[Monitor] = (),
    layer_policy: LayerPolicy | None = None,
    steerers: Sequence[AbstractContextManager] = (),
    caps: Sequence[LogitsProcessor] = (),
    speculation: Any = None,
    streamers: Sequence[BaseStreamer] = (),
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    max_new_tokens: int = 256,
    **options: Any,
) -> DecodeOutput:
    """Continue one or several prompts with any combination of methods and plug-ins.

    Args:
        prompts: texts, or `input_ids` and `attention_mask` as `encode_prompts` makes them.
        methods: decode methods; their plug-ins come before the ones given here. One that reads the prompts first has a
            `generate` of its own, which gets all the rest.
        caps: logits processors that act last, after temperature and truncation.
        speculation: drafts several tokens per step, see `loop`.
        seed: makes sampling repeatable, row by row; None uses torch's global generator.
        chat: put each prompt through the chat template where the tokenizer has one.
        options: anything `model.generate` takes, such as do_sample, temperature, min_p.

    Raises:
        InputError: empty prompt, one with a lone surrogate, a chat template that fails, a prompt beyond the context
            window, a number of tokens, temperature or seed out of range.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give a number >= 1")
    check("max_new_tokens", max_new_tokens, Tokens)
    if options.get("temperature") is not None:
        check("temperature", options["temperature"], Temperature)
    if seed is not None:
        check("seed", seed, TorchSeed)
    plugins = Plugins(processors, monitors, layer_policy, steerers, caps, speculation)
    readers = [method for method in methods if hasattr(method, "generate")]
    for method in reversed([method for method in methods if not hasattr(method, "generate")]):
        plugins = method.plugins(model, tokenizer) + plugins
    if readers:
        rest = {"streamers": streamers, "seed": seed, "stop": stop, "chat": chat, "max_new_tokens": max_new_tokens}
        reader = reduce(lambda one, other: one.beside(other), readers)
        return reader.generate(model, tokenizer, prompts, **vars(plugins), **rest, **options)
    if isinstance(prompts, BatchEncoding):
        inputs = prompts
    else:
        inputs = encode_prompts(tokenizer, [prompts] if isinstance(prompts, str) else prompts, chat)
    _check_context(model, inputs["input_ids"].shape[1])
    return model.generate(
        **inputs.to(model.device),
        custom_generate=loop,
        logits_processor=LogitsProcessorList(plugins.processors),
        monitors=plugins.monitors,
        layer_policy=plugins.layer_policy,
        steerers=plugins.steerers,
        caps=plugins.caps,
        speculation=plugins.speculation,
        token_streamers=streamers,
        processing_class=tokenizer,
        seed=seed,
        stop=stop,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: str | Sequence[str], chat: bool = True) -> Any:
    """Left-padded `input_ids` and `attention_mask` of the prompts."""
    prompts = listed(prompts, "prompt")
    if not prompts or any(not p.strip() for p in prompts):
        raise InputError("the prompt is empty; give some text to continue")
    for number, prompt in enumerate(prompts):
        check_encodable(prompt, f"prompt {number}")
    if chat and tokenizer.chat_template:
        turns = [[{"role": "user", "content": p}] for p in prompts]
        texts = [rendered(tokenizer, t, add_generation_prompt=True) for t in turns]
        return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")


def _check_context(model: PreTrainedModel, length: int) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is not None and length >= window:
        raise InputError(f"the prompt has {length} tokens, the model's context window {window}; shorten the prompt")


def _split(processors: LogitsProcessorList) -> tuple[list[LogitsProcessor], list[LogitsProcessor]]:
    """What changes the distribution, and what only truncates the draw. `generate` puts the latter last."""
    first = next((i for i, p in enumerate(processors) if isinstance(p, WARPERS)), len(processors))
    return list(processors[:first]), list(processors[first:])


@lru_cache(maxsize=4)
def _tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    if not name or not Path(name).is_dir():
        raise InputError("monitors and streamers read text; pass processing_class=tokenizer to generate")
    with reading(name, "tokenizer"):
        return read_tokenizer(name)
