"""CodeFill: names and statements of code completed by beam search; what was declared nearby goes first.

Paper: CodeFill: Multi-token Code Completion by Jointly Learning from Structure and Naming Sequences, ICSE 2022, arXiv
2202.06689. Any causal model can write them; one that `tokenry train --method codefill` has made reads the program as
values, with strings and numbers left out. The source need not be complete, nor right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import BeforeValidator, Field, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Positive, Tokens
from ..models.anatomy import vocabulary_size
from ..models.batch import pad_id, right_padded
from ..models.llamacpp.model import LlamaCppModel
from ..models.masks import sees_both_sides
from ..models.positions import context_window
from ..models.prompts import listed_prompts
from ..text.code.languages import language_of
from ..text.code.views import check_source
from ..text.token_text import check_encodable
from .completion.context import LeftContext, left_of, rendered
from .completion.offers import Completion
from .completion.ranking import PUBLISHED, Candidate, Ranked, rerank, weights_of
from .completion.search import Rest, Vocabulary, next_values, rest_of_statement, vocabulary_of
from .contract import Call, CompletionMethod, DecodeMethod, refuse_others
from .generation.options import ending
from .generation.output import DecodeOutput

__all__ = ["CodeFillCompletion"]

CONTEXT = 512  # tokens that the model reads, from the right
LINES = 20_000  # characters of source that hold more tokens than that


def _read_numbers(value: Any) -> Any:
    """Numbers with commas between, as the command line gives them."""
    return tuple(value.split(",")) if isinstance(value, str) else value


class CodeFillCompletion(CompletionMethod):
    """Complete names and statements of Python and JavaScript, with names declared nearby first."""

    slug: ClassVar[str] = "codefill"
    title: ClassVar[str] = "CodeFill completion"
    paper: ClassVar[str] = (
        "CodeFill: Multi-token Code Completion by Jointly Learning from Structure and Naming Sequences, ICSE 2022, "
        "arXiv 2202.06689"
    )
    claim: ClassVar[str] = "Names that are declared in the function, class or file should be offered first."
    published: ClassVar[Claim] = Claim(
        "70.9", "MRR where editors complete (GPT-C 67.8)", "258 million parameters, PY117K test, with training"
    )

    beam: int = Field(default=5, ge=1, le=256, description="names of several tokens, or statements, followed at a time")
    top_k: int = Field(default=10, ge=1, le=256, description="names that are ranked")
    statement_tokens: Tokens = Field(default=32, description="most tokens of the rest of a statement")
    rerank_weights: Annotated[tuple[Positive, ...], BeforeValidator(_read_numbers)] = Field(
        default=PUBLISHED,
        description="nine numbers: attributes, variables and functions, each visible in function, class and file; all "
        "1 for the model's own order",
    )

    @field_validator("rerank_weights")
    @classmethod
    def _is_table(cls, numbers: tuple[float, ...]) -> tuple[float, ...]:
        weights_of(numbers)
        return numbers

    def complete(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        offset: int | None = None,
        name: str = "the source",
    ) -> list[Completion]:
        """The completions at a character of the source, the rest of the statement last; none inside strings and
        comments.

        Args:
            offset: by default behind the last character.
            name: of the file, in refusals; its ending tells the language, Python where it says nothing.

        Raises:
            InputError: source that is no text or a notebook, a language whose reader is not installed, or a model that
                does not write from left to right.
        """
        left = left_of(check_source(source[:offset], name), language=language_of(name))
        vocabulary = _vocabulary(model, tokenizer)
        if left.values is None:
            return []
        context = _context_ids(model, vocabulary, left, self.statement_tokens)
        found = next_values(model, vocabulary, [context], self.beam, self.top_k, typed=left.typed)[0]
        candidates = [Candidate(one.value, one.probability, left.kind(one.value)) for one in found]
        ranked = rerank(candidates, left.visible.scope, weights_of(self.rerank_weights), self.top_k)
        names = [_offer(one) for one in ranked]
        rest = rest_of_statement(model, vocabulary, context, self.beam, self.statement_tokens, left.typed)
        text = _statement(vocabulary, rest)
        if text and text not in [name.text for name in names]:
            names.append(Completion(text, "statement", rest.probability, rest.probability, None, "model"))
        return names

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Any,
        call: Call,
        others: Sequence[DecodeMethod] = (),
    ) -> DecodeOutput:
        """Write the rest of the statement behind each prompt, a text. Plug-ins and sampling are refused."""
        refuse_others(self, others)
        for name, given in {**vars(call.plugins), "stop": call.stop}.items():
            if given:
                raise InputError(f"codefill searches for whole statements and takes no {name}; leave it out")
        if call.options.get("do_sample"):
            raise InputError("codefill searches for the likeliest statement; leave sampling out, with --greedy")
        texts = cast(list[str], listed_prompts(prompts, texts_only="codefill reads programs"))
        vocabulary = _vocabulary(model, tokenizer)
        most = min(call.max_new_tokens, self.statement_tokens)
        with ending(call.streamers) as streamers:
            rows = []
            for number, text in enumerate(texts):
                check_encodable(text, f"prompt {number}")
                context = _context_ids(model, vocabulary, LeftContext(text, "", _values_of(text)), most)
                rows.append((context, rest_of_statement(model, vocabulary, context, self.beam, most)))
                for streamer in streamers[number : number + 1]:
                    streamer.put(torch.tensor(context))
                    streamer.put(torch.tensor(rows[-1][1].ids, dtype=torch.long))
        return _output(vocabulary, rows, most, self.beam)


def _vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    if isinstance(model, LlamaCppModel):
        raise model.refusal("codefill, which searches in its probabilities,")
    if sees_both_sides(model):
        raise InputError("the model sees both sides and cannot complete from the left; use a causal model")
    return vocabulary_of(tokenizer, vocabulary_size(model))


def _values_of(text: str) -> tuple[str, ...]:
    return left_of(text + " ").values or ()


def _context_ids(model: PreTrainedModel, vocabulary: Vocabulary, left: LeftContext, room: int) -> list[int]:
    """What the model reads: values, or the source without the last space, which belongs to the token that comes."""
    tokenizer = vocabulary.tokenizer
    if vocabulary.reads_values:
        text = "".join(f" {value}" for value in (left.values or ())[-CONTEXT:])
    else:
        text = left.source[-LINES:].removesuffix(" ")
    ids = cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)
    longest = min(CONTEXT, (context_window(model) or CONTEXT + room) - room)
    if longest < 1:
        raise InputError(
            f"statement_tokens={room} leaves no room in the model's window of {context_window(model)}; give less"
        )
    start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return ids[-longest:] or [cast(int, start)]


def _offer(one: Ranked) -> Completion:
    value, probability = one.candidate.value, one.candidate.probability
    changed = one.score != probability
    return Completion(value, "name", probability, one.score, one.scope, "re-ranked" if changed else "model")


def _statement(vocabulary: Vocabulary, rest: Rest) -> str:
    """The text of the rest of a statement."""
    if vocabulary.reads_values:
        return rendered(tuple("".join(vocabulary.texts[i] or "" for i in rest.ids).split()))
    return cast(str, vocabulary.tokenizer.decode(rest.ids, skip_special_tokens=True)).strip()


def _output(vocabulary: Vocabulary, rows: Sequence[tuple[list[int], Rest]], most: int, beam: int) -> DecodeOutput:
    sequences, _ = right_padded([context + rest.ids for context, rest in rows], pad_id(vocabulary.tokenizer))
    return DecodeOutput(
        sequences=sequences,
        new_ids=[rest.ids for _, rest in rows],
        prompt_ids=[context for context, _ in rows],
        texts=[_statement(vocabulary, rest) for _, rest in rows],
        events=[],
        forward_calls=sum(rest.forwards for _, rest in rows),
        tokens_processed=sum(len(context) + beam * (rest.forwards - 1) for context, rest in rows),
        stop_reasons=["budget" if len(rest.ids) >= most else "finished" for _, rest in rows],
    )
