"""Decode methods inside vLLM: those that are logits processors, by the parameters of a request.

    python -m vllm.entrypoints.openai.api_server --model MODEL
    {"prompt": ..., "vllm_xargs": {"cyclicreflex": "{\"amplitude\": 3, \"period\": 600}"}}
    {"prompt": ..., "vllm_xargs": {"cyclicreflex.amplitude": 3, "cyclicreflex.period": 600}}

vLLM finds the class by the entry point group `vllm.logits_processors`, and imports it in every process: nothing heavy
is imported here before a request asks for a method. The one class has both of vLLM's interfaces, that of the V1 runner
(`update_state`, `apply(logits)`) and that of the V2 runner (`add_request`, `apply(logits, context)`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, cast

from .. import catalog
from ..core.errors import InputError
from ..core.fields import shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..decode.contract import LogitsMethod

__all__ = ["TokenryLogitsProcessor"]

logger = logging.getLogger(__name__)

INTERFACES = ("vllm.v1.worker.gpu.sample.logits_processor", "vllm.v1.sample.logits_processor")


def interfaces() -> tuple[type, ...]:
    """vLLM's own base classes, without which it refuses a class; none where there is no vLLM."""
    found = []
    for module in INTERFACES:
        try:
            found.append(import_module(module).LogitsProcessor)
        except ImportError:
            continue
    return tuple(found)


class TokenryLogitsProcessor(*interfaces()):
    """The methods that the requests of a batch ask for."""

    config: ClassVar[Any] = None  # of the engine in this process

    def __init__(self, vllm_config: Any, second: Any, is_pin_memory: bool | None = None) -> None:
        """`second` is a device for the V1 runner, and the states of all requests for the V2 runner."""
        self.model_config = vllm_config.model_config
        self.states = second
        self.rows: dict[int, tuple[Rule, list[int]]] = {}  # V1: by place in the batch, with the live list of its ids
        self.slots: dict[int, Rule] = {}  # V2: by slot
        self.again = self.config is vllm_config  # it was asked for by name, too, beside its entry point
        type(self).config = vllm_config

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with 400. What needs the tokenizer is known only in the process of the
        model, which with a server is another one."""
        methods = methods_of(sampling_params)
        if cls.config is not None:
            for method in methods:
                method.processor(tokenizer_of(cls.config.model_config))

    def is_argmax_invariant(self) -> bool:
        return False

    # --- the V1 runner ---------------------------------------------------------------------------------------------

    def update_state(self, batch_update: Any) -> None:
        """Follow requests that come, go and move; `batch_update` is None where nothing has changed."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, _, output_ids in batch_update.added:
            rule = self._rule(params)
            self._put(index, None if rule is None else (rule, output_ids))
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.pop(source, None), self.rows.pop(target, None)
            self._put(target, moved)
            self._put(source, replaced if direction.name == "SWAP" else None)

    def _put(self, index: int, row: tuple[Rule, list[int]] | None) -> None:
        self.rows.pop(index, None)
        if row is not None:
            self.rows[index] = row

    # --- the V2 runner ---------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot, which another one may have had before."""
        self.slots.pop(req_idx, None)
        rule = self._rule(sampling_params)
        if rule is not None:
            self.slots[req_idx] = rule
        return rule is not None

    # --- both ------------------------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """The logits (rows, vocab), with the rows of requests that ask for a method changed in place."""
        for row, rule, generated in self._listed(logits) if ctx is None else self._drafted(ctx):
            logits[row] = rule(generated, logits[row : row + 1])[0].to(logits.dtype)
        return logits

    def _listed(self, logits: Tensor) -> list[tuple[int, Rule, Tensor]]:
        import torch

        return [
            (index, rule, torch.tensor([ids], dtype=torch.long, device=logits.device))
            for index, (rule, ids) in self.rows.items()
        ]

    def _drafted(self, ctx: Any) -> list[tuple[int, Rule, Tensor]]:
        """Rows of slots with a rule, and what is generated before each. A request has a row for each drafted token:
        those before it are no part of its ids yet, and stand in `ctx.input_ids` alone."""
        import torch

        if self.slots.keys().isdisjoint(ctx.idx_mapping_np.tolist()):
            return []
        found = []
        columns = (ctx.expanded_idx_mapping, ctx.pos, ctx.expanded_local_pos)
        for row, (slot, position, drafted) in enumerate(zip(*(column.tolist() for column in columns))):
            prompt = int(self.states.prompt_len.np[slot])
            if slot not in self.slots or position + 1 < prompt:  # of a prompt that is read in several parts
                continue
            known = max(position - drafted, prompt)  # the row's first token is the last that is settled
            ids = self.states.all_token_ids.gpu[slot, prompt:known]
            fed = ctx.input_ids[row - (position - known) : row + 1] if position >= prompt else ids[:0]
            found.append((row, self.slots[slot], torch.cat([ids.long(), fed.long()])[None]))
        return found

    def _rule(self, params: Any) -> Rule | None:
        methods = [] if self.again else methods_of(params)
        return Rule(methods, self.model_config) if methods else None


class Rule:
    """What one request asks for.

    Words are looked up where the model runs, too late for an answer with an error. A request that cannot be served ends
    at once instead, with the reason in the log, and the other requests go on.
    """

    def __init__(self, methods: Sequence[LogitsMethod], model_config: Any) -> None:
        self.tokenizer = tokenizer_of(model_config)
        self.refused = False
        self.changes: list[Callable[[Tensor, Tensor], Tensor]] = []
        try:
            self.changes = [method.processor(self.tokenizer).change for method in methods]
        except InputError as error:
            self._refuse(error)

    def __call__(self, generated: Tensor, scores: Tensor) -> Tensor:
        """Scores (1, vocab) after the generated ids (1, t)."""
        try:
            return self._ended(scores) if self.refused else self._changed(generated, scores)
        except InputError as error:
            self._refuse(error)
            return self._ended(scores)

    def _changed(self, generated: Tensor, scores: Tensor) -> Tensor:
        if bool((generated < 0).any()):
            raise InputError(
                "vLLM has not said which tokens were drawn; start it with --no-async-scheduling, or with "
                f"--logits-processors {__name__}:{TokenryLogitsProcessor.__name__}"
            )
        for change in self.changes:
            scores = change(generated, scores)
        return scores

    def _refuse(self, error: InputError) -> None:
        self.refused = True
        logger.error("a request ends with nothing more: %s", error)

    def _ended(self, scores: Tensor) -> Tensor:
        ended = scores.new_full(scores.shape, -float("inf"))
        ended[:, cast("int | None", self.tokenizer.eos_token_id) or 0] = 0.0
        return ended


# --- what a request asks for ---------------------------------------------------------------------------------------


def methods_of(sampling_params: Any) -> list[LogitsMethod]:
    """The methods in `extra_args`, which HTTP calls `vllm_xargs`, in the order of the catalogue.

    Raises:
        InputError: a method that is no logits processor, or options that it has not.
    """
    given: Mapping[str, Any] = getattr(sampling_params, "extra_args", None) or {}
    named = {key.partition(".")[0] for key in given}
    return [method_of(entry, given) for entry in catalog.by_stage("decode") if entry.slug in named]


def method_of(entry: catalog.Entry, given: Mapping[str, Any]) -> LogitsMethod:
    from ..decode.contract import LogitsMethod

    try:
        cls = entry.load()
    except ImportError:  # of what only tokenry's own loop needs
        cls = None
    if cls is None or not issubclass(cls, LogitsMethod):
        raise InputError(
            f"{entry.slug} is more than a logits processor, so vLLM cannot run it; put `tokenry serve --server URL` "
            "in front of it for antislop, or load the model with tokenry"
        )
    values = written(entry.slug, given.get(entry.slug, {}))
    for key, value in given.items():
        slug, _, name = key.partition(".")
        if slug == entry.slug and name:
            if name in values:
                raise InputError(f"{shown(key)} is given twice, as JSON and by itself; give it once")
            values[name] = value
    return cls(**values)


def written(slug: str, value: Any) -> dict[str, Any]:
    """The options of a method: an object, or JSON of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{slug}={shown(value)} is not JSON; give an object such as '{{}}'") from None
    if not isinstance(value, Mapping):
        raise InputError(f"{slug}={shown(value)} is not allowed; give an object with its options, such as '{{}}'")
    return dict(value)


def tokenizer_of(model_config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that vLLM was started with."""
    return loaded(model_config.tokenizer, model_config.tokenizer_revision, model_config.trust_remote_code)


@lru_cache(maxsize=1)
def loaded(name: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
