"""`remote`: prompts continued by another server, and checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ....core.errors import InputError
from ....core.fields import Portion, Positive, Probability, Temperature, Times, Tokens, TorchSeed, check
from ....models.batch import pad_id
from ....models.prompts import Prompts, encode_prompts
from ...contract import DecodeMethod, MonitorMethod
from ...generation.job import Job
from ...generation.monitor import Monitor
from ...generation.options import ending
from ...generation.output import DecodeOutput
from ...generation.plugins import Plugins
from .client import RemoteServer
from .dialects import Sampling
from .loop import RemoteLoop, RemoteOptions

__all__ = ["job_for", "remote", "sampling_of", "watching"]


def remote(
    server: str | RemoteServer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    methods: Sequence[DecodeMethod] = (),
    monitors: Sequence[Monitor] = (),
    streamers: Sequence[BaseStreamer] = (),
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = True,
    max_new_tokens: int = 256,
    chunk: int | None = None,
    repair: Literal["ask", "local"] | None = None,
    logit_bias: Mapping[int, float] | None = None,
    **options: Any,
) -> DecodeOutput:
    """Continue one or several prompts on an OpenAI-compatible server, with methods that watch the text.

        out = tokenry.decode.remote("http://127.0.0.1:8000", tokenizer, "Once", methods=[Antislop(phrases=[...])])

    As `generate`, with a server in the place of the model. Greedy texts and repairs are those of `generate` on the same
    weights in the same precision. Of sampling this much is promised: the server draws with its own generator, the seed
    fixes each single request, and requests follow one another in the same way; so the same call gives the same text
    where the server answers the same request in the same way, which servers that batch do not always do. It is not
    the text of `generate` at that seed, and other chunks give another one. A replacement that is asked for is drawn
    from the server's distribution; with repair="local" it is drawn from the 20 likeliest tokens.

    Args:
        server: its address, or a `RemoteServer`, which stays open.
        tokenizer: that of the server's model.
        prompts: see `encode_prompts`.
        methods: those that watch the text, such as Antislop.
        seed: makes the requests repeatable; None lets the server choose.
        chat: put each prompt through the chat template of the tokenizer where it has one.
        chunk: tokens of a request. None: 64 where the server streams, as a request is closed where something is found;
            otherwise few after something was found, and more when nothing was found for a while.
        repair: how a rejected token is replaced: "ask" the server for one token, or "local", from the likeliest tokens
            that it has told. None: local for greedy decoding, ask for sampling.
        logit_bias: {token: what is added to its score}, everywhere.
        options: do_sample, temperature, top_k, top_p, min_p and repetition_penalty, as `generate` takes them.

    Raises:
        InputError: what `RemoteServer` and `generate` refuse, another option, a method that needs scores or the model.
    """
    single = options.pop("streamer", None)
    with ending([*streamers, *([] if single is None else [single])]) as streamers:
        check("max_new_tokens", max_new_tokens, Tokens)
        if seed is not None:
            check("seed", seed, TorchSeed)
        sampling = sampling_of(options)
        plugins = Plugins(monitors=[*watching(methods, tokenizer), *monitors])
        inputs = encode_prompts(tokenizer, prompts, chat)
        how = RemoteOptions(sampling, chunk, repair, logit_bias or {})
        with RemoteServer(server) if isinstance(server, str) else nullcontext(server) as opened:
            opened.dialect(tokenizer)
            rows = inputs["input_ids"], inputs["attention_mask"]
            further = {"max_new_tokens": max_new_tokens, "seed": seed, "stop": stop}
            job = job_for(opened, tokenizer, *rows, sampling, **further)
            return RemoteLoop(opened, job, tokenizer, plugins, how).generate(streamers)


def job_for(
    server: RemoteServer,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    **further: Any,
) -> Job:
    """What a `RemoteLoop` has to do for prompts (batch, time); `further` are fields of `Job`.

    Raises:
        InputError: a prompt beyond the server's window, and what `Job` refuses.
    """
    return Job(
        input_ids,
        attention_mask=attention_mask,
        do_sample=not sampling.greedy,
        warpers=sampling.warpers(),
        room=server.room(attention_mask.sum(-1).tolist()),
        eos_ids=() if tokenizer.eos_token_id is None else (cast(int, tokenizer.eos_token_id),),
        pad_id=pad_id(tokenizer),
        **further,
    )


def watching(methods: Sequence[DecodeMethod], tokenizer: PreTrainedTokenizerBase) -> list[Monitor]:
    """The monitors of methods that bring nothing else.

    Raises:
        InputError: a method that needs more.
    """
    made: list[Monitor] = []
    for method in methods:
        if not isinstance(method, MonitorMethod):
            raise InputError(
                f"{method.slug} needs the model or its scores, which stay with the server; use methods that watch the "
                "text, such as antislop, or run it on a model that is here"
            )
        made += method.monitors(tokenizer)
    return made


BOUNDS = {
    "temperature": Temperature,
    "top_k": Times,
    "top_p": Portion,
    "min_p": Probability,
    "repetition_penalty": Positive,
}


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How to draw, by the options of `generate`.

    Raises:
        InputError: an option that servers do not share, or one out of range.
    """
    given = {name: value for name, value in options.items() if value is not None and name != "do_sample"}
    for name, value in given.items():
        if name not in BOUNDS:
            raise InputError(
                f"{name} is nothing to ask a server for; give do_sample, {', '.join(BOUNDS)}, or leave it out"
            )
        check(name, value, BOUNDS[name])
    if not options.get("do_sample"):
        return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
    return Sampling(**{"temperature": 1.0, **given})
