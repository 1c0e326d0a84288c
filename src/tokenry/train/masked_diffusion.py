"""`MaskedDiffusionTrainer`, which trains masked-diffusion language models, and its loss, that of LLaDA.

Paper: Large Language Diffusion Models (LLaDA), arXiv 2502.09992. Every token of the answer is hidden with a
probability p that is drawn for each sequence, and the model guesses the hidden ones from what is left on both sides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..core.errors import InputError
from ..models.masks import check_bidirectional, check_mask_token, make_bidirectional, own_position

__all__ = ["MaskedDiffusionTrainer", "hide_tokens", "masked_diffusion_loss"]


class MaskedDiffusionTrainer(Trainer):
    """`transformers.Trainer` with `masked_diffusion_loss`; the model is made bidirectional first.

    Batches have `input_ids`, and `attention_mask` and `labels` where there are padding and prompts: what has the label
    -100 at the start of a row is its prompt. Use a collator that leaves the ids alone.

    Args:
        mask_token_id: a token that never occurs in the data.
        shift, eps: see `masked_diffusion_loss`.

    Raises:
        InputError: a mask token outside the vocabulary, or a model whose attention stays causal.
    """

    def __init__(
        self, model: PreTrainedModel, *args: Any, mask_token_id: int, shift: bool = False, eps: float = 1e-3, **kw: Any
    ) -> None:
        check_mask_token(model, mask_token_id)
        check_bidirectional(make_bidirectional(model))
        super().__init__(model, *args, **kw)
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its own, whatever the accumulation
        self.mask_token_id, self.shift, self.eps = mask_token_id, shift, eps
        self.add_callback(_OwnNoise())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
        present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        # The prompt of a row is what stands before its first label.
        prompts = None if labels is None else (present & ((labels != -100).cumsum(1) == 0)).sum(1)
        loss = masked_diffusion_loss(
            model,
            ids,
            self.mask_token_id,
            prompt_lengths=prompts,
            attention_mask=mask,
            eps=self.eps,
            shift=self.shift,
        )
        return (loss, {"loss": loss}) if return_outputs else loss


class _OwnNoise(TrainerCallback):
    """Has every process hide tokens of its own: all were given one seed, and would hide the same places."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)


def hide_tokens(learned: Tensor, eps: float = 1e-3, stratified: bool = False) -> tuple[Tensor, Tensor]:
    """Which of the tokens (batch, time) are hidden, and with which probability (batch, 1): (1 - eps) t + eps.

    Args:
        learned: the tokens that may be hidden.
        stratified: the t of a batch are spread evenly over (0, 1) instead of drawn one by one; each of them is still
            uniform, and the loss has less variance.
    """
    batch = learned.shape[0]
    t = torch.rand(1 if stratified else batch, 1, device=learned.device)
    if stratified:
        t = (t + torch.arange(batch, device=learned.device)[:, None] / batch) % 1
    p = (1 - eps) * t + eps
    return learned & (torch.rand(learned.shape, device=learned.device) < p), p


def masked_diffusion_loss(
    model: PreTrainedModel | nn.Module,
    input_ids: Tensor,
    mask_token_id: int,
    *,
    prompt_lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eps: float = 1e-3,
    shift: bool = False,
    stratified: bool = False,
) -> Tensor:
    """The mean over sequences of `sum over hidden tokens of CE / p` / number of tokens that may be hidden.

    Without prompts and padding this is `sum CE / p / (batch * time)`, LLaDA's pre-training loss; with prompts it is its
    fine-tuning loss, where the end-of-text tokens that fill an answer count as tokens of it.

    Args:
        model: one whose attention sees both sides (see `tokenry.models.masks.make_bidirectional`).
        prompt_lengths: tokens at the start of each row (batch,) that are never hidden; None: there is no prompt.
        attention_mask: 0 at padding, which is never hidden.
        eps: the smallest probability of hiding a token.
        shift: a token is read from the logits of the position before it (Dream), not of its own (LLaDA).
        stratified: see `hide_tokens`.

    Raises:
        InputError: eps outside (0, 1), ids that contain the mask token, or a row without a token to learn.
    """
    if not 0 < eps < 1:
        raise InputError(f"eps={eps} is not allowed; give a probability in (0, 1)")
    if (input_ids == mask_token_id).any():
        raise InputError(f"input_ids contain the mask token {mask_token_id}; give clean text, it is masked here")
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    given = torch.zeros(len(input_ids), dtype=torch.long) if prompt_lengths is None else prompt_lengths
    given = given.to(input_ids.device).clamp(min=int(shift))  # nothing is before the first token
    learned = present & (present.cumsum(1) > given[:, None])  # counted after any padding on the left
    if not learned.any(1).all():
        raise InputError("a row has no token to learn; give rows that are longer than their prompt")
    hidden, p = hide_tokens(learned, eps, stratified)
    logits = model(input_ids=input_ids.masked_fill(hidden, mask_token_id), attention_mask=attention_mask).logits
    losses = nn.functional.cross_entropy(
        own_position(logits, shift)[hidden].float(), input_ids[hidden], reduction="none"
    )
    weights = (1 / (p * learned.sum(1, keepdim=True))).expand_as(hidden)[hidden]
    return (losses * weights).sum() / len(input_ids)
