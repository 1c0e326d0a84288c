"""`TiDARTrainer` and its loss: one model that continues text token by token, and guesses whole blocks of it at once.

Paper: TiDAR: Think in Diffusion, Talk in Autoregression, arXiv 2511.08923. Behind the text stands a mask for each of
its tokens. The text is read causally and predicts next tokens. The masks of a block see the text before their block,
and each other, and predict the tokens at their own places: a block is hidden as a whole, as it will be when drafted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Trainer

from ..core.errors import InputError
from ..models.masks import as_attention_mask, block_diffusion_mask, check_full_attention, check_mask, check_mask_token

__all__ = ["TiDARLoss", "TiDARTrainer", "tidar_loss"]


class TiDARTrainer(Trainer):
    """`transformers.Trainer` with `tidar_loss`; the config remembers block size and mask token for decoding.

    Batches have `input_ids`, and `attention_mask` and `labels` where there are padding and prompts. Use a collator with
    `pad_to_multiple_of` that leaves the ids alone; texts must not be packed into one row.

    Args:
        mask_token_id: a token that never occurs in the data.
        block_size, alpha: see `tidar_loss`.

    Raises:
        InputError: a block size or mask token out of range, or a model that cannot follow the mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        mask_token_id: int,
        block_size: int = 8,
        alpha: float = 1.0,
        **kw: Any,
    ) -> None:
        check_mask_token(model, mask_token_id)
        check_full_attention(model)
        check_mask(model, block_diffusion_mask(2 * block_size, block_size))
        super().__init__(model, *args, **kw)
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its own, whatever the accumulation
        self.mask_token_id, self.block_size, self.alpha = mask_token_id, block_size, alpha
        model.config.mask_token_id, model.config.tidar_block_size = mask_token_id, block_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = tidar_loss(
            model,
            inputs["input_ids"],
            self.mask_token_id,
            self.block_size,
            alpha=self.alpha,
            attention_mask=inputs.get("attention_mask"),
            labels=inputs.get("labels"),
        )
        return (losses.loss, losses._asdict()) if return_outputs else losses.loss


class TiDARLoss(NamedTuple):
    """The loss, and the two means it is made of, in nats per token."""

    loss: Tensor
    autoregressive: Tensor
    diffusion: Tensor


def tidar_loss(
    model: PreTrainedModel | nn.Module,
    input_ids: Tensor,
    mask_token_id: int,
    block_size: int,
    *,
    alpha: float = 1.0,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> TiDARLoss:
    """(alpha * cross-entropy of next tokens + cross-entropy of masked tokens) / (alpha + 1).

    The masks of the first block have no text before them, so nothing is asked of them.

    Args:
        input_ids: clean text (batch, time), padded on the right to a multiple of `block_size`.
        alpha: weight of the next tokens; with a large one the masks do not count.
        attention_mask: 0 at padding, which is not learned.
        labels: -100 at tokens (batch, time) that are not learned, such as those of a prompt; others are not read.

    Raises:
        InputError: alpha < 0, a length that is no multiple of the block size, padding on the left, text that contains
            the mask token, nothing to learn, or an attention implementation that takes no such mask.
    """
    length = input_ids.shape[1]
    learned = _learnt(input_ids, mask_token_id, block_size, attention_mask, labels)
    if not alpha >= 0:
        raise InputError(f"alpha={alpha} is not allowed; give a weight >= 0")
    inner = getattr(model, "module", model)  # what spreads a model over devices has no config
    outputs = model(
        input_ids=torch.cat([input_ids, torch.full_like(input_ids, mask_token_id)], 1),
        attention_mask=as_attention_mask(inner, block_diffusion_mask(length, block_size)),
        position_ids=torch.arange(length, device=input_ids.device).repeat(2)[None],
        use_cache=False,
    )
    wanted = input_ids.masked_fill(~learned, -100)
    following, own = outputs.logits[:, : length - 1], outputs.logits[:, length + block_size :]
    autoregressive = cross_entropy(following.flatten(0, 1).float(), wanted[:, 1:].flatten())
    diffusion = cross_entropy(own.flatten(0, 1).float(), wanted[:, block_size:].flatten())
    return TiDARLoss((alpha * autoregressive + diffusion) / (alpha + 1), autoregressive, diffusion)


def _learnt(
    input_ids: Tensor, mask_token_id: int, block_size: int, attention_mask: Tensor | None, labels: Tensor | None
) -> Tensor:
    """Which tokens (batch, time) count, after checks."""
    present = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if block_size >= 2 and input_ids.shape[1] % block_size:
        raise InputError(
            f"{input_ids.shape[1]} tokens are no multiple of block_size={block_size}; pad them on the right "
            f"(pad_to_multiple_of={block_size} in the collator) and give the attention mask"
        )
    if (present[:, 1:] & ~present[:, :-1]).any():
        raise InputError("rows are padded on the left, where the causal mask does not hide it; pad on the right")
    if (input_ids == mask_token_id).any():
        raise InputError(f"input_ids contain the mask token {mask_token_id}; give clean text, masks are added here")
    learned = present if labels is None else present & (labels != -100)
    if not learned[:, block_size:].any():
        raise InputError("there is no token to learn after the first block; give longer text, or a smaller block_size")
    return learned
