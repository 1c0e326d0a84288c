"""The words around a problem and its steps, as chat models or zoo/reasoner know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import explained, parse_json, read_json, shown
from ...models.folders import zoo_folders
from ...models.prompts import rendered
from ...text.token_text import check_encodable
from ...text.words import listed

__all__ = ["PRESETS", "Messages", "StepPrompts", "prompts_for", "read_prompts"]

Messages = str | Sequence[Mapping[str, str]]  # a problem, or a conversation whose last turn asks it
MARK = "(the steps stand here)"


@dataclass(frozen=True)
class StepPrompts:
    """The words around a problem and its steps.

    Attributes:
        instruction: what the user asks; "{problem}" stands for the problem.
        separator: what ends a step.
        think: opens the thinking, unless the chat template has done so.
        end_think: ends it.
        answers: a step that contains one of these is the last, and `end_think` is deleted from every other step, so
            that thinking goes on. Empty: the text ends with the end-of-text token; `end_think` is kept, and the model
            whose step it is in writes the rest, which nobody judges.
        judge: what the user asks about the last step.
        verdict: how the answer to that begins, up to the score.
        chat: use the chat template; without it the texts follow one another.
    """

    instruction: str = (
        "Think about the problem step by step, with an empty line between steps. Put the final answer in \\boxed{}; if "
        "there are options to choose from, its letter.\n\n{problem}"
    )
    separator: str = "\n\n"
    think: str = "<think>\n"
    end_think: str = "</think>"
    answers: tuple[str, ...] = ("boxed", "Answer:", "ANSWER:")
    judge: str = (
        "Look at the last step alone: are its facts and its logic right? Style does not matter. Give it a score from 0 "
        "(wrong) to 9 (right)."
    )
    verdict: str = "<think>I think the quality score is: "
    chat: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(listed(self.answers, "answer")))
        if not self.separator:
            raise InputError("the separator is empty, so no step would ever end; give some text, for example '\\n\\n'")
        if "{problem}" not in self.instruction:
            raise InputError(f"the instruction {self.instruction!r} has no '{{problem}}'; say where the problem stands")

    def begin(self, tokenizer: PreTrainedTokenizerBase, problem: Messages) -> str:
        """The text before the first step."""
        asked = self._asked(problem)
        if not self.chat:
            return asked[-1]["content"]
        text = _rendered(tokenizer, asked, add_generation_prompt=True)
        return text if text.rstrip().endswith(self.think.strip()) else text + self.think

    def turn(self, tokenizer: PreTrainedTokenizerBase, problem: Messages) -> str:
        """The text after the judged step and its separator, up to where the score stands.

        It is cut out of a rendered conversation: templates that drop or trim thoughts never see the steps.
        """
        if not self.chat:
            return f"{self.judge}\n{self.verdict}"
        turns = (("assistant", MARK), ("user", self.judge), ("assistant", self.verdict))
        talk = [*self._asked(problem), *({"role": role, "content": content} for role, content in turns)]
        _, mark, after = _rendered(tokenizer, talk).partition(MARK)
        before, verdict, _ = after.rpartition(self.verdict.strip())
        if not mark or not verdict:
            raise InputError("the chat template drops turns of the assistant, so no step can be judged; use chat=False")
        return before + self.verdict

    def judging(
        self, tokenizer: PreTrainedTokenizerBase, problem: Messages, steps: Sequence[str], candidate: str
    ) -> str:
        """The text after which the score of the candidate stands."""
        body = "".join(step + self.separator for step in (*listed(steps, "step"), candidate))
        return self.begin(tokenizer, problem) + body + self.turn(tokenizer, problem)

    def _asked(self, problem: Messages) -> list[dict[str, str]]:
        messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else [dict(m) for m in problem]
        for message in messages:
            check_encodable(message.get("content", ""), "the problem")
        if not messages or messages[-1].get("role") != "user" or not messages[-1]["content"].strip():
            raise InputError("the problem is empty; give a text, or messages of which the last is the user's")
        messages[-1]["content"] = self.instruction.replace("{problem}", messages[-1]["content"])
        return messages


PRESETS = {  # "lines" is how zoo/reasoner has learned it: a step a line, and scores of 0 or 9
    "chat": StepPrompts(),
    "lines": StepPrompts(
        instruction="{problem}", separator="\n", answers=(), judge="score", verdict="score=", think="<think>\n"
    ),
}


def prompts_for(model: PreTrainedModel) -> StepPrompts:
    """The words this model knows: the reasoners of the zoo have their own, others get those for chat models."""
    folder = Path(cast(str, model.name_or_path))
    ours = any(folder in zoo_folders(name) for name in ("reasoner", "reasoner-2"))
    return PRESETS["lines" if ours else "chat"]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use StepPrompts(chat=False), which "
            "puts the texts one after the other"
        )
    return rendered(tokenizer, messages, **options)


KINDS = "texts, for answers a list of texts, and for chat true or false"
FIELD_TYPES = {
    "answers": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
    "chat": lambda value: isinstance(value, bool),
}


def read_prompts(value: Any) -> Any:
    """Prompts from a name, or from JSON: a file, or an object with the fields of `StepPrompts`. Other values pass."""
    if not isinstance(value, str | Path):
        return value
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    with explained(f"{str(value)!r} is neither {' nor '.join(PRESETS)} nor JSON", "give a file or an object"):
        given = parse_json(str(value)) if str(value).lstrip().startswith("{") else read_json(value)
    known = [f.name for f in fields(StepPrompts)]
    unknown = [name for name in given if name not in known] if isinstance(given, dict) else [given]
    if unknown:
        raise ValueError(f"prompts have no field {unknown[0]!r}; the fields are {', '.join(known)}")
    wrong = [name for name, text in given.items() if not FIELD_TYPES.get(name, _is_text)(text)]
    if wrong:
        raise ValueError(f"the field {wrong[0]!r} of the prompts is {shown(given[wrong[0]])}; give {KINDS}")
    return StepPrompts(**given)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
