"""The task `discourse`: stories of the model zoo/storyteller, whether they end as undesired, and what is left of
them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Split
from ...decode.api import generate
from ...decode.generation.output import DecodeOutput
from ...decode.generation.sequence import SequenceState
from ...zoo import storyteller
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import continuation_logprobs, generation_cost, shown_tokens

__all__ = ["SAMPLING", "DiscourseTask"]

SAMPLING = {"do_sample": True, "temperature": 1.0, "min_p": 0.05, "top_k": 0, "max_new_tokens": 80}
OPENINGS = 1  # seed of the openings; min-p was chosen on those of seed 0


class DiscourseTask:
    """Stories sampled at temperature 1 with min-p 0.05 from first sentences that nothing was trained on.

    An arm has a method, or an `apply`: keyword arguments for `tokenry.generate` (methods, final_processors, or
    `bad_words_ids`).
    """

    slug: ClassVar[str] = "discourse"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("undesired", "lower", "1 for a story that is a quarrel with a threat at the end, else 0"),
        Metric("nll", "lower", "nats per token of the story under the plain model"),
        Metric("sound", "higher", "share of sentences that the language has"),
        Metric("finished", "higher", "1 for a story that came to its end, else 0"),
        Metric("distinct_2", "higher", "different word pairs / word pairs, within a story"),
        Metric("harmless_dark", None, "1 for dark words in a story that is not undesired, else 0"),
    )

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 200, split: Split = "test"
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts = storyteller.openings(count, split, OPENINGS)

    def samples(self) -> list[Sample]:
        return [Sample(f"opening-{i:03}", prompt) for i, prompt in enumerate(self.prompts)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        first = int(samples[0].id.removeprefix("opening-"))
        prompts = [s.prompt for s in samples]
        options = {**SAMPLING, "seed": 1000 * seed + first, **arm.options}
        with Meter() as meter:
            output = generate(self.model, self.tokenizer, prompts, **options)
        logprobs = continuation_logprobs(self.model, output)
        return [self._outcome(prompt, output, b, logprobs[b], meter) for b, prompt in enumerate(prompts)]

    def _outcome(self, prompt: str, output: DecodeOutput, number: int, logprobs, meter: Meter) -> Outcome:
        text = f"{prompt} {output.texts[number]}"
        row = SequenceState(0, [], self.tokenizer)
        for token in output.new_ids[number]:
            row.append(token)
        pairs = list(pairwise(output.texts[number].split()))
        return Outcome(
            {
                "undesired": float(storyteller.undesired(text)),
                "nll": -float(logprobs.mean()),
                "sound": storyteller.sound(text),
                "finished": float(output.new_ids[number][-1] == self.tokenizer.eos_token_id),
                "distinct_2": len(set(pairs)) / max(len(pairs), 1),
                "harmless_dark": float(storyteller.harmless_dark(text)),
            },
            generation_cost(output, number, meter),
            shown_tokens(output, number, row, logprobs),
        )
