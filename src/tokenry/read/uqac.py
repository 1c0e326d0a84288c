"""UQAC: which tokens of a chain of thought carried its answer, and how sure the model is of it.

Paper: Language Model Uncertainty Quantification with Attention Chain, arXiv 2503.19168.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..core.fields import Count, Entries, Probability, Times, Tokens
from ..models.load import Loaded
from ..models.prompts import prompt_ids
from ..text.answers import answer_tokens, check_marker, find_answer
from ..text.spans import Span
from ..trace.reducers import LowEntropyRows
from ..trace.trace import Trace, capture
from .chains.backtrack import Walk, backtrack, is_stop
from .chains.variations import chosen_logprobs, variations
from .contract import Reading, ReadMethod

__all__ = ["UQAC", "ChainReading", "ChainResult"]

Mode = Literal["marginal", "sim_prod", "attn_prod", "answer"]


class UQAC(ReadMethod):
    """Walk back along attention from the answer, keep what resembles it, and sum over small variations of that."""

    slug: ClassVar[str] = "uqac"
    title: ClassVar[str] = "Attention-chain uncertainty"
    paper: ClassVar[str] = "Language Model Uncertainty Quantification with Attention Chain, arXiv 2503.19168"
    claim: ClassVar[str] = (
        "The tokens that an answer rests on give a better calibrated confidence than the answer alone."
    )
    takes: ClassVar = ("text", "trace")
    input_options: ClassVar[tuple[str, ...]] = (
        *("n_heads", "reduction", "buffer_size", "threshold", "min_chain", "similarity", "top_k_similarity"),
        *("similarity_threshold", "n_candidates", "ensemble_k", "min_prob", "mode", "marker", "max_new_tokens"),
    )

    n_heads: Count = Field(default=16, description="attention rows of lowest entropy, of all layers, for each token")
    reduction: Literal["max", "mean"] = Field(default="max", description="how these rows become one")
    buffer_size: Count = Field(default=3, description="tokens that a step of the walk may add")
    threshold: Probability = Field(default=0.5, description="attention that such a token needs")
    min_chain: Times = Field(default=5, description="tokens that are added whatever their attention")
    similarity: Literal["sim-mean", "emb-mean", "starting-token"] = Field(
        default="sim-mean",
        description="of a token's state with the answer: mean over its tokens, with their mean, or with the first",
    )
    top_k_similarity: Times = Field(default=10, description="tokens of the chain that are kept, the most similar")
    similarity_threshold: float = Field(default=0.0, ge=-1, le=1, description="similarity that a kept token needs")
    n_candidates: Entries = Field(default=5, description="likely tokens of each kept place that are tried")
    ensemble_k: Times = Field(default=10, description="variations, beside one for each kept token; 0 for none")
    min_prob: Probability = Field(default=0.01, description="probability that the token of a variation must exceed")
    mode: Mode = Field(
        default="marginal",
        description="confidence: the sum over variations, or the product over kept tokens and answer (sim_prod), the "
        "whole chain (attn_prod), or the answer alone",
    )
    marker: str = Field(
        default="number", description="where the answer is: boxed, answer, number (the last), or a regex"
    )
    max_new_tokens: Tokens = Field(default=256, description="length of the answer that a text is given")

    @field_validator("marker")
    @classmethod
    def _is_marker(cls, marker: str) -> str:
        check_marker(marker)
        return marker

    def read(self, given: str | Trace, artifact: None = None, loaded: Loaded | None = None) -> Reading:
        """The tokens that carried the answer, and the confidence in it.

        Args:
            given: a question, which the model answers greedily first; or a trace with a prompt, a response and
                `LowEntropyRows`, see `trace`.
            loaded: the model and its tokenizer; of a trace that has its model they can be left out.

        Returns:
            Rows of position, token, score, similarity, probability and kept; `picture` shows them in the text.
        """
        if isinstance(given, str):
            if loaded is None:
                raise InputError("a text is answered by a model; give loaded=, or a trace")
            given = self.trace(given, loaded)
        model = given.model if loaded is None else loaded[0]
        if model is None:
            raise InputError("the confidence needs the model; give loaded=, or the model to Trace.load")
        span = self.answer_span(given)
        chain = self.attention_chain(given, span)
        return _reading(given, span, chain, self._confidence(model, given, span, chain, self.mode))

    def trace(self, text: str, loaded: Loaded) -> Trace:
        """The trace of a question and the model's greedy answer to it, with what `read` needs."""
        model, tokenizer = loaded[0], loaded[1]
        prompt = torch.tensor([prompt_ids(tokenizer, text)], device=model.device)
        ids = cast(Any, model).generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=self.max_new_tokens
        )
        return self.trace_ids(ids[0], prompt.shape[1], loaded)

    @torch.no_grad()
    def trace_ids(self, ids: Tensor, prompt: int, loaded: Loaded) -> Trace:
        """The trace of these ids (T,), the first `prompt` of which are the prompt."""
        model, tokenizer = loaded[0], loaded[1]
        rows = LowEntropyRows(self.n_heads, self.reduction, prompt)
        with capture(model, tokenizer, reducers=[rows]) as cap:
            model(ids[None].to(model.device), use_cache=False, logits_to_keep=1)
        return cap.trace.with_prompt(prompt)

    def answer_span(self, trace: Trace) -> Span:
        """The tokens of the final answer in the response."""
        offsets = trace.offsets
        begin = _response(trace)
        start = int(offsets[begin, 0])
        found = find_answer(trace.text[start:], self.marker)
        tokens = [] if found is None else answer_tokens(trace.text, offsets, (found[0] + start, found[1] + start))
        tokens = [token for token in tokens if token >= begin]
        if not tokens:
            raise InputError(f"the response has no answer at the marker {self.marker!r}; give another marker")
        return tokens[0], tokens[-1] + 1

    def attention_chain(self, trace: Trace, answer_span: Span) -> ChainResult:
        """The tokens that the answer rests on, by position.

        Args:
            answer_span: half-open token span, counted from the start of the trace.

        Raises:
            InputError: an empty span or one outside the response, a trace without the rows or the text of tokens.
        """
        begin, (first, last) = self._checked(trace, answer_span), answer_span
        rows = self._rows(trace)
        rows[:begin] = 0
        text, pairs = trace.text, trace.offsets.tolist()
        stop = [i < begin or is_stop(text[a:b]) for i, (a, b) in enumerate(pairs)]
        walk = Walk(self.buffer_size, self.threshold, self.min_chain)
        found = backtrack(rows, range(first - 1, last - 1), stop, walk)
        sources = sorted(found)
        similarity = self._similarity(trace, [source + 1 for source in sources], answer_span)
        indices = [source + 1 - begin for source in sources]
        return ChainResult(indices, [found[source] for source in sources], similarity.tolist())

    def kept(self, trace: Trace, answer_span: Span, chain: ChainResult) -> list[int]:
        """The positions of a chain that resemble the answer most, without the answer's own."""
        begin = _response(trace)
        listed = [
            (sim, i + begin) for i, sim in zip(chain.indices, chain.similarities) if sim >= self.similarity_threshold
        ]
        listed = [(sim, place) for sim, place in listed if not answer_span[0] <= place < answer_span[1]]
        return sorted(place for _, place in sorted(listed, key=lambda pair: -pair[0])[: self.top_k_similarity])

    def confidence(self, model: PreTrainedModel, trace: Trace, answer_span: Span, mode: Mode | None = None) -> float:
        """How sure the model is of the answer, 0 to 1.

        Args:
            mode: instead of the option of this name.

        Raises:
            InputError: see `attention_chain`; a trace of another model.
        """
        mode = mode or self.mode
        if mode not in ("marginal", "sim_prod", "attn_prod", "answer"):
            raise InputError(f"mode={mode!r} is not allowed; give marginal, sim_prod, attn_prod or answer")
        self._checked(trace, answer_span)
        chain = None if mode == "answer" else self.attention_chain(trace, answer_span)
        return self._confidence(model, trace, answer_span, chain, mode)

    def _confidence(
        self, model: PreTrainedModel, trace: Trace, answer_span: Span, chain: ChainResult | None, mode: Mode
    ) -> float:
        """`chain` is that of the answer; the mode "answer" does without."""
        trace.check_model(model)
        places, kept = {*range(*answer_span)}, []
        if chain is not None and mode == "attn_prod":
            places |= {i + _response(trace) for i in chain.indices}
        elif chain is not None and mode != "answer":
            kept = self.kept(trace, answer_span, chain)
        places = sorted(places | {*kept})
        if mode != "marginal":
            return float(_floored(trace.logprob[places]).sum().exp())
        return self.marginal(model, trace, answer_span, kept)

    def marginal(self, model: PreTrainedModel, trace: Trace, answer_span: Span, kept: Sequence[int]) -> float:
        """The probability of these positions and the answer together, summed over variations of them, 0 to 1."""
        vocabulary = model.config.get_text_config().vocab_size
        if self.n_candidates > vocabulary:
            raise InputError(f"n_candidates={self.n_candidates} is not allowed; the model knows {vocabulary} tokens")
        trace, places = Trace(trace.tensors, trace.header, model), sorted({*range(*answer_span), *kept})
        ids = variations(trace, kept, self.n_candidates, self.ensemble_k, self.min_prob)
        logprobs = _floored(chosen_logprobs(model, trace, ids, places))
        return min(1.0, float(logprobs.double().sum(-1).exp().sum()))

    def _checked(self, trace: Trace, span: Span) -> int:
        begin, (first, last) = _response(trace), span
        if not begin <= first < last <= len(trace):
            raise InputError(
                f"the answer span {span} is empty or outside the response; give (start, stop) within "
                f"{begin} to {len(trace)}"
            )
        return begin

    def _rows(self, trace: Trace) -> Tensor:
        """(T, T) rows of the response, zero before."""
        asked = f"LowEntropyRows({self.n_heads}, {self.reduction!r})"
        rows = trace.reduced.get("low_entropy_rows")
        if rows is None:
            raise InputError(f"this trace does not hold low-entropy rows; capture again with reducers=[{asked}]")
        k, start, mean = trace.reduced["low_entropy_setting"].tolist()
        if (k, bool(mean)) != (self.n_heads, self.reduction == "mean") or start > _response(trace):
            raise InputError(
                f"this trace has rows of n_heads={k}, {'mean' if mean else 'max'}, from token {start} on; set these "
                f"options, or capture again with reducers=[{asked}]"
            )
        return torch.cat((torch.zeros(start, len(trace)), rows))

    def _similarity(self, trace: Trace, places: list[int], span: Span) -> Tensor:
        """(places,) similarity of the token's state with those of the answer."""
        states = trace.hidden("final").float()
        answer = states[span[0] : span[1]]
        if self.similarity == "emb-mean":
            answer = answer.mean(0, keepdim=True)
        elif self.similarity == "starting-token":
            answer = answer[:1]
        return cosine_similarity(states[places][:, None], answer[None], dim=-1).mean(1)


class ChainResult(NamedTuple):
    """Tokens of a chain: positions in the response, attention scores (0 for the answer), similarities to the answer."""

    indices: list[int]
    scores: list[float]
    similarities: list[float]


@dataclass(frozen=True)
class ChainReading(Reading):
    """A reading that can show its tokens in the text of the response.

    Attributes:
        pieces: the texts of the response's tokens, each with its share of the attention score, 0 to 1.
    """

    pieces: list[tuple[str, float]] = field(default_factory=list)

    def to_json(self) -> dict:
        """Title and rows."""
        return {name: value for name, value in asdict(self).items() if name != "pieces"}

    def picture(self) -> str:
        """The response, each token the darker the more of the answer it carried."""
        spans = (
            f'<span style="background:rgba(255,150,0,{share:.3f})" title="{share:.1%}">{html.escape(piece)}</span>'
            for piece, share in self.pieces
        )
        return f'<p style="white-space:pre-wrap">{"".join(spans)}</p>'


def _response(trace: Trace) -> int:
    """The first token of the response."""
    begin = trace.spans["prompt"][0][1]
    if begin == 0 or len(trace) - begin < 2:
        raise InputError(
            f"this trace has a prompt of {begin} and a response of {len(trace) - begin} tokens; give a prompt and at "
            "least 2 tokens of response, see Trace.with_prompt"
        )
    return begin


def _floored(logprobs: Tensor) -> Tensor:
    return logprobs.clamp_min(torch.tensor(1e-12).log())


def _reading(trace: Trace, span: Span, chain: ChainResult, confidence: float) -> ChainReading:
    begin, pairs, rows = _response(trace), trace.offsets.tolist(), []
    whole = sum(chain.scores) or 1.0
    shares = dict(zip(chain.indices, (score / whole for score in chain.scores)))
    for index, score, similarity in zip(*chain):
        place = index + begin
        piece, probability = trace.text[slice(*pairs[place])], float(trace.logprob[place].exp())
        role = "answer" if span[0] <= place < span[1] else "chain"
        rows.append(
            {"position": place, "token": piece, "role": role, "score": score, "share": shares[index]}
            | {"similarity": similarity, "probability": probability, "confidence": confidence}
        )
    pieces = [(trace.text[a:b], shares.get(i, 0.0)) for i, (a, b) in enumerate(pairs[begin:])]
    return ChainReading(f"tokens that carried the answer; confidence {confidence:.3f}", rows, pieces)
