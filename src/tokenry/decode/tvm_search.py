"""TVM search: several next steps are written, a value model says which of them lead to right ends, the best go on.

Paper: Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models,
arXiv 2407.12863, ICLR 2025. Step-level beam search: from b beginnings K steps are written, each is valued at its last
token, b stay. With `allocation=rebase` the better beginnings get more of the K (arXiv 2408.00724). The constants of the
search are those usual in its field; the paper's own were not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Count, Positive, Tokens
from ..learned.token_values import TokenValueField
from ..models.batch import pad_id, right_padded
from ..models.load import Loaded
from ..models.prompts import Prompts, encode_prompts
from .contract import Call, DecodeMethod, RunnerMethod, refuse_others
from .generation.options import ending
from .generation.output import UNSET, DecodeOutput
from .generation.sampler import row_seed
from .reasoning.tree_search import SearchResult, TreeShape, step_beam_search

__all__ = ["TVMSearch", "TVMSearchOutput"]

SAMPLING = {"do_sample": True, "temperature": 0.7}


class TVMSearch(RunnerMethod):
    """Write several next steps, and go on with those that a value model trusts most.

    out = TVMSearch(values="values").generate(model, tokenizer, "12+35-8*3=", temperature=0.7, do_sample=True)
    """

    slug: ClassVar[str] = "tvm-search"
    title: ClassVar[str] = "TVM search"
    paper: ClassVar[str] = (
        "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language "
        "Models, ICLR 2025, arXiv 2407.12863"
    )
    claim: ClassVar[str] = (
        "Search over steps that is led by values of tokens solves more problems than sampling whole solutions for the "
        "same tokens."
    )

    values: TokenValueField = Field(
        description="folder of a token value model, or in Python the model itself; `tokenry train --method tvm` makes "
        "one"
    )
    beams: Count = Field(default=4, description="beginnings that go on after each step")
    candidates: Count = Field(default=16, description="steps written from all of them together, a multiple of beams")
    allocation: Literal["even", "rebase"] = Field(
        default="even", description="as many steps from each beginning, or more from the better ones"
    )
    balance: Positive = Field(default=0.2, description="of rebase: the higher, the more even")
    delimiter: str = Field(default="\n", min_length=1, description="text that ends a step")
    max_steps: Count | None = Field(default=None, description="most steps of a text; none for no limit")
    max_step_tokens: Tokens = Field(default=512, description="most tokens of a step")

    @model_validator(mode="after")
    def _shared_out(self) -> TVMSearch:
        self.shape  # noqa: B018, which refuses what cannot be shared out
        return self

    @property
    def shape(self) -> TreeShape:
        """How wide and deep is searched."""
        return TreeShape(**{name: getattr(self, name) for name in TreeShape.__dataclass_fields__})

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        call: Call,
        others: Sequence[DecodeMethod] = (),
    ) -> TVMSearchOutput:
        """Search for each prompt by itself. Plug-ins are refused; streamers get whole texts.

        With `beams=1, candidates=1` the text is that of plain sampling from the same seed.
        """
        refuse_others(self, others)
        for name, given in {**vars(call.plugins), "stop": call.stop}.items():
            if given:
                raise InputError(f"tvm-search writes many texts at once and takes no {name}; leave them out")
        values = self.values.eval()
        values.to(model.device)  # pyright: ignore[reportArgumentType]  # wrapped, it does not look like a method
        encoded = encode_prompts(tokenizer, prompts, call.chat)
        ids, mask = encoded["input_ids"], encoded.get("attention_mask")
        rows = [row.tolist() if mask is None else row[mask[b].bool()].tolist() for b, row in enumerate(ids)]
        with ending(call.streamers) as streamers:
            if streamers and len(streamers) != len(rows):
                raise InputError(f"{len(streamers)} streamers for {len(rows)} rows; give one streamer per row")
            found = []
            for b, row in enumerate(rows):
                found.append(self._search(Loaded(model, tokenizer), values, row, call, b))
                for part in (row, found[b].best.ids) if streamers else ():
                    streamers[b].put(torch.tensor(part, dtype=torch.long))
        return _output(tokenizer, ids, rows, found)

    def _search(self, generator: Loaded, values: Any, prompt: list[int], call: Call, row: int) -> SearchResult:
        return step_beam_search(
            generator,
            values,
            prompt,
            self.shape,
            max_new_tokens=call.max_new_tokens,
            seed=None if call.seed is None else row_seed(call.seed, row),
            **(call.options or SAMPLING),
        )


@dataclass(frozen=True)
class SearchStats:
    """What the searches of a batch cost, in tokens."""

    results: Sequence[SearchResult]

    def summary(self) -> dict[str, Any]:
        """The counts, for JSON."""
        total = {name: sum(getattr(r, name) for r in self.results) for name in ("written", "kept", "fed", "value_fed")}
        return {**total, "reread": sum(r.reread for r in self.results), "value": [r.best.value for r in self.results]}

    def in_words(self) -> str:
        """What the command line says."""
        s = self.summary()
        fed = s["fed"] + s["value_fed"]
        return (
            f"value {', '.join(f'{value:.2f}' for value in s['value'])}; {s['kept']} of {s['written']} written tokens "
            f"kept; {fed} tokens fed to both models, {s['reread']} without caches"
        )


@dataclass
class TVMSearchOutput(DecodeOutput):
    """A `DecodeOutput` with the `SearchResult` of each row."""

    results: list[SearchResult] = UNSET


def _output(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, rows: list[list[int]], found: list[SearchResult]
) -> TVMSearchOutput:
    new = [result.best.ids for result in found]
    tail = right_padded(new, pad_id(tokenizer))[0].to(ids.device)
    return TVMSearchOutput(
        sequences=torch.cat([ids, tail], 1),
        new_ids=new,
        prompt_ids=rows,
        texts=[str(tokenizer.decode(one, skip_special_tokens=True)) for one in new],
        events=[],
        forward_calls=sum(result.calls for result in found),
        tokens_processed=sum(result.fed for result in found),
        stop_reasons=["finished" if result.finished else "budget" for result in found],
        stats=SearchStats(found),
        results=found,
    )
