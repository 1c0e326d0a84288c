"""zoo/drafter: a small copy of zoo/reasoner that drafts for it.

It learns the reasoner's distribution of the next token, from the texts that the reasoner learned from and from what the
reasoner itself writes at temperature 1, which is where drafts are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..core.progress import Progress
from ..data.problems import Arithmetic, Problem, draw_problems
from ..decode.api import generate
from ..models.load import load
from .reasoner import DIRECT, LEVELS, examples
from .training import batches_by_length, fit

__all__ = ["measure", "train"]

TEACHER = "zoo/reasoner"
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 176,
}
SAMPLED, TAUGHT, DIRECT_SHARE = 400, 6_000, 0.15  # texts of the teacher, and of those that it learned from
STEPS, BATCH_TOKENS = 3500, 2500
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 400}


def teacher_texts(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    seed: int,
    size: int = 250,
) -> list[tuple[list[int], int]]:
    """What the teacher writes at temperature 1: token ids, and how many of them are the prompt."""
    rng, found = random.Random(seed), []
    for start in range(0, len(problems), size):
        batch = [p.question + (DIRECT if rng.random() < DIRECT_SHARE else "") for p in problems[start : start + size]]
        out = generate(teacher, tokenizer, batch, seed=seed + start, **SAMPLING)
        prompts, written = cast(tuple[list[list[int]], list[list[int]]], (out.prompt_ids, out.new_ids))
        found += [(prompt + new, len(prompt)) for prompt, new in zip(prompts, written)]
    return found


@torch.no_grad()
def with_targets(teacher: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with `wanted`, the teacher's log-probabilities (learned tokens, vocabulary)."""
    logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return {**batch, "wanted": logits[:, :-1][batch["labels"][:, 1:] >= 0].log_softmax(-1)}


def distillation_loss(student: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """KL divergence of the student's next-token distribution from the teacher's, in nats per token."""
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    found = logits[:, :-1][batch["labels"][:, 1:] >= 0].log_softmax(-1)
    return (batch["wanted"].exp() * (batch["wanted"] - found)).sum(-1).mean()


def shuffled(batches: list[dict[str, Tensor]], seed: int) -> Iterator[dict[str, Tensor]]:
    """The batches again and again, each time in another order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(batches, len(batches))


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Collect texts and what the teacher says about them, then distil it, from the seed."""
    teacher, tokenizer = load(TEACHER, device="cpu")
    problems = draw_problems(Arithmetic(), SAMPLED, seed, "train", LEVELS)
    own = teacher_texts(teacher, tokenizer, problems, seed)
    texts = chain(own, islice(examples(tokenizer, seed + 1), TAUGHT))
    batches = batches_by_length(texts, BATCH_TOKENS, cast(int, tokenizer.pad_token_id), seed)
    known = [with_targets(teacher, batch) for batch in batches]
    torch.manual_seed(seed)
    shape = type(teacher.config).from_dict({**teacher.config.to_dict(), **SHAPE})
    student = LlamaForCausalLM(cast(LlamaConfig, shape))
    fit(student, shuffled(known, seed), STEPS, learning_rate=3e-3, loss=distillation_loss, progress=progress)
    return student, tokenizer


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """On 120 test problems: `agreement`, the mean over the teacher's own texts at temperature 1 of sum min(p, q), which
    is the acceptance rate of one draft; `same`, how often both think the same token the likeliest; `accuracy`, the
    share of problems that the model solves by itself at temperature 0.8."""
    teacher, _ = load(TEACHER, device="cpu")
    task = Arithmetic()
    problems = draw_problems(task, 20 * len(LEVELS), levels=LEVELS)
    shared, same = [], []
    for ids, prompt in teacher_texts(teacher, tokenizer, problems, seed=0):
        whole = torch.tensor([ids])
        p, q = (m(whole, use_cache=False).logits[0, prompt - 1 : -1].softmax(-1) for m in (teacher, model))
        shared.append(torch.minimum(p, q).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    options = {**SAMPLING, "temperature": 0.8, "seed": 0}
    texts = generate(model, tokenizer, [problem.question for problem in problems], **options).texts
    return {
        "agreement": float(torch.cat(shared).mean()),
        "same": float(torch.cat(same).mean()),
        "accuracy": sum(task.check(p, text) for p, text in zip(problems, cast(list[str], texts))) / len(problems),
    }
