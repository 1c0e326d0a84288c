"""What `model.generate` takes and the decode loop does not do, and what `generate` keeps for itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from ...core.errors import InputError

__all__ = ["REFUSED", "check_config", "check_processors", "ending", "hands_on_to", "kept_by_generate"]

SPECULATIVE = "use custom_generate=tokenry.decode.speculative"
BEAMS = "the decode loop has no beams; leave"
SCORES = "the decode loop keeps no logits; read them in a forward of the finished ids, and leave"
STATES = "the decode loop returns text alone; run it inside `with tokenry.capture(model)`, and leave"
LAYERS = "the decode loop does not contrast layers or tokens; leave"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # {option: (values that ask for nothing, why not, and what to do)}
    "num_beams": ((1,), f"{BEAMS} num_beams at 1"),
    "num_beam_groups": ((1,), f"{BEAMS} num_beam_groups out"),
    "diversity_penalty": ((0.0,), f"{BEAMS} diversity_penalty out"),
    "constraints": ((), f"{BEAMS} constraints out"),
    "force_words_ids": ((), f"{BEAMS} force_words_ids out"),
    "penalty_alpha": ((0.0,), f"{LAYERS} penalty_alpha out"),
    "low_memory": ((False,), f"{LAYERS} low_memory out"),
    "dola_layers": ((), f"{LAYERS} dola_layers out"),
    "use_mtp": ((False,), f"the decode loop has drafters of its own; {SPECULATIVE}, and leave use_mtp out"),
    "speculation_type": ((), f"the decode loop has drafters of its own; {SPECULATIVE}, and leave speculation_type out"),
    "prompt_lookup_num_tokens": (
        (),
        f"the decode loop drafts where it is told to; {SPECULATIVE}, drafter='prompt-lookup', draft_length=...",
    ),
    "assistant_early_exit": (
        (),
        f"the decode loop drafts where it is told to; {SPECULATIVE}, drafter='early-exit', exit_layers=...",
    ),
    "assistant_model": ((), f"the decode loop drafts where it is told to; {SPECULATIVE}, drafter=model"),
    "assistant_tokenizer": ((), f"drafts need the same vocabulary; {SPECULATIVE}, drafter=model"),
    "is_assistant": ((False,), "the decode loop assists nobody; leave is_assistant out"),
    "output_scores": ((False,), f"{SCORES} output_scores out"),
    "output_logits": ((False,), f"{SCORES} output_logits out"),
    "output_attentions": ((False,), f"{STATES} output_attentions out"),
    "output_hidden_states": ((False,), f"{STATES} output_hidden_states out"),
    "use_cache": ((True,), "the decode loop always writes with a cache; give use_cache=True, or leave it out"),
    "prefill_chunk_size": ((), "the decode loop reads a prompt in one piece; leave prefill_chunk_size out"),
    "token_healing": ((False,), "the decode loop takes the prompt as it is; leave token_healing out"),
    "compile_config": ((), "the decode loop compiles nothing; leave compile_config out"),
    "continuous_batching_config": ((), "the decode loop has fixed batches; leave continuous_batching_config out"),
    "synced_gpus": ((False,), "the decode loop does not wait for other processes; leave synced_gpus out"),
}
STATEFUL = {  # they count their calls, and so do not know of tokens that are taken back
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config of SynthID",
}


def check_config(config: GenerationConfig, **arguments: Any) -> None:
    """Refuse what the loop would have to ignore, among the fields of a configuration and arguments of `generate`."""
    for name, (neutral, why) in REFUSED.items():
        value = arguments.get(name, getattr(config, name, None))
        if value is not None and value not in neutral:
            shown = type(value).__name__ if hasattr(value, "parameters") else repr(value)
            raise InputError(f"{name}={shown} is not possible here: {why}")


def check_processors(processors: Sequence[LogitsProcessor]) -> None:
    """Refuse processors that cannot follow when tokens are drafted or taken back."""
    for kind, name in STATEFUL.items():
        if any(isinstance(processor, kind) for processor in processors):
            raise InputError(
                f"{name} counts the tokens it has seen, and here tokens are drafted or taken back; leave it out, or "
                "monitors and drafter"
            )


def kept_by_generate(*names: str) -> dict[str, Any]:
    """Arguments that `model.generate` was called with and does not hand on to its `custom_generate` callable.

    They are read where `generate` holds them: a streamer that nobody feeds would let its reader wait for ever, and an
    assistant would be ignored without a word. Empty if the callable was not called by `generate`.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None or not callable(frame.f_locals.get("custom_generate")):
        return {}
    return {name: frame.f_locals[name] for name in names if frame.f_locals.get(name) is not None}


F = TypeVar("F", bound=Callable)


def hands_on_to(base: Callable, *but: str) -> Callable[[F], F]:
    """For a `custom_generate` callable that hands its `**options` on to `base`: its signature names them, as
    `model.generate` hands on only what a signature names. `but` are those that the callable gives itself."""

    def named(call: F) -> F:
        own = dict(inspect.signature(call).parameters)
        own.popitem()
        rest = {name: p for name, p in inspect.signature(base).parameters.items() if name not in (*own, *but)}
        call.__signature__ = inspect.Signature([*own.values(), *rest.values()])
        return call

    return named


class _EndsOnce(BaseStreamer):
    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer, self.ended = streamer, False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value)

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.streamer.end()


class AfterPrompt(_EndsOnce):
    """A streamer that has its prompt already."""

    prompt = True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.streamer.put(value)
        self.prompt = False


@contextmanager
def ending(streamers: Sequence[BaseStreamer]) -> Iterator[list[BaseStreamer]]:
    """The streamers, which end once: at the latest with the block, so that nobody waits for ever after an error."""
    once: list[BaseStreamer] = [one if isinstance(one, _EndsOnce) else _EndsOnce(one) for one in streamers]
    try:
        yield once
    finally:
        for streamer in once:
            streamer.end()
