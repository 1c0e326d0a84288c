"""Texts to vectors with a decoder that is given a summary first: two tokenizations of every text."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.outputs import write_folder
from ...core.progress import Progress
from ...models.batch import left_padded, pad_id, right_padded
from ...models.positions import context_window
from ...text.token_text import check_encodable
from ..text.batches import by_length, check_sentences
from ..text.prompt_embedder import leads_with_bos
from .model import Causal2VecModel

__all__ = ["ENCODER_FOLDER", "ContextEmbedder"]

ENCODER_FOLDER = "encoder_tokenizer"
Row = tuple[list[int], int, list[int]]  # ids of the decoder, those before the Contextual token, ids of the encoder


class ContextEmbedder(nn.Module):
    """`encode(texts)`: (texts, width), float32, of length 1.

    Args:
        encoder_tokenizer: the encoder's own.
        max_seq_length: tokens of a text at most, instruction, Contextual token and EOS included; None is what the
            decoder takes. Can be set later.
        truncate: cut a longer text at its end; else it is refused. What is too long for the encoder alone is cut for
            the encoder alone, with a warning that counts.

    Raises:
        InputError: a tokenizer without EOS token, or a max_seq_length out of range.
    """

    def __init__(
        self,
        model: Causal2VecModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.encoder_tokenizer = model, tokenizer, encoder_tokenizer
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos_token, at which the text is read; set tokenizer.eos_token")
        self.config = model.config
        self.limit = context_window(model.decoder)
        self.encoder_limit = context_window(model.encoder) or 512
        self.max_seq_length, self.truncate = max_seq_length, truncate

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        one = self.model.decoder.config.hidden_size
        return 2 * one if self.config.pooling == "context_eos" else one

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text at most; None where neither the decoder nor the user has a limit."""
        return self.limit if self._longest is None else self._longest

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        if tokens is not None and not 3 <= tokens <= (self.limit or tokens):
            raise InputError(
                f"max_seq_length={tokens} is not allowed; give 3 (the Contextual token, a token, EOS) to what the "
                f"decoder takes, {self.limit or 'which has no limit'}, or None for that"
            )
        self._longest = tokens

    # --- texts to ids ------------------------------------------------------------------------------------------

    def rows(self, texts: Sequence[str], instruction: str = "") -> list[Row]:
        """Ids of every text for both models."""
        texts = [texts] if isinstance(texts, str) else texts
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}; give a list of strings")
            check_encodable(text, f"text {i}")
            if not text.strip():
                raise InputError(f"text {i} is empty; remove it")
        check_encodable(instruction, "the instruction")
        start = [cast(int, self.tokenizer.bos_token_id)] if leads_with_bos(self.tokenizer) else []
        order = self._ids(self.tokenizer, [instruction])[0] if instruction else []
        before = len(start) + (len(order) if self.config.context_position == "after_instruction" else 0)
        most, eos = self.max_seq_length, cast(int, self.tokenizer.eos_token_id)
        fixed = len(start) + len(order) + 2  # the Contextual token and EOS survive whatever is cut
        made = []
        for i, ids in enumerate(self._ids(self.tokenizer, texts)):
            if most is not None and fixed + len(ids) > most:
                if not self.truncate or most <= fixed:
                    raise InputError(
                        f"text {i} has {fixed + len(ids)} tokens with its instruction, the most is {most}; shorten it, "
                        "or cut long texts with truncate=True (--truncate)"
                    )
                ids = ids[: most - fixed]
            made.append([*start, *order, *ids, eos])
        return [(ids, before, read) for ids, read in zip(made, self._encoder_rows(texts))]

    def _encoder_rows(self, texts: Sequence[str]) -> list[list[int]]:
        if self.config.context != "encoder":
            return [[0]] * len(texts)
        whole = self.encoder_tokenizer(list(texts), truncation=False, padding=False, verbose=False).input_ids
        long = sum(len(ids) > self.encoder_limit for ids in whole)
        if not long:
            return whole
        room = self.encoder_limit - self.encoder_tokenizer.num_special_tokens_to_add()
        warnings.warn(
            f"{long} of {len(texts)} texts have more than the {room} tokens that the encoder takes; its summary is of "
            "their beginnings",
            stacklevel=4,
        )
        return self.encoder_tokenizer(
            list(texts), truncation=True, max_length=self.encoder_limit, padding=False
        ).input_ids

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False, truncation=False).input_ids

    def tokenize(self, texts: Sequence[str], instruction: str = "") -> dict[str, Tensor]:
        """What `Causal2VecModel.forward` takes."""
        return self._pad(self.rows(texts, instruction))

    def _pad(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        ids, mask = left_padded([row[0] for row in rows], pad=pad_id(self.tokenizer))
        read, real = right_padded([row[2] for row in rows], pad=pad_id(self.encoder_tokenizer))
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "encoder_input_ids": read,
            "encoder_attention_mask": real.long(),
            "context_index": torch.tensor([row[1] for row in rows]),
        }

    # --- ids to vectors ----------------------------------------------------------------------------------------

    def forward(self, **features: Tensor) -> Tensor:
        """(texts, width) from what `tokenize` gives."""
        return self.model(**features).embedding

    @torch.no_grad()
    def encode(
        self,
        sentences: Sequence[str],
        batch_size: int = 16,
        progress: Progress | None = None,
        instruction: str = "",
    ) -> Tensor:
        """(sentences, width), float32 on the CPU, in the order given. `progress` gets (done, all) after a batch.

        Args:
            instruction: before every text, for queries; the encoder does not see it.

        Raises:
            InputError: a single string, no sentences, an empty one, a batch size below 1, or a text that does not fit.
        """
        check_sentences(sentences, batch_size)
        rows = self.rows(sentences, instruction)
        told = self._context_tokens([row[2] for row in rows], batch_size) if self.config.context == "encoder" else None

        def embed(places: list[int]) -> Tensor:
            batch = self._pad([rows[i] for i in places])
            if told is not None:
                batch["context_token"] = told[places]
            return self(**{name: t.to(self.model.device) for name, t in batch.items()}).cpu()

        return by_length([len(ids) for ids, _, _ in rows], batch_size, embed, progress)

    def _context_tokens(self, rows: Sequence[list[int]], batch_size: int) -> Tensor:
        """(rows, width): what the encoder says of all texts, in batches of its own: by its own lengths, and of as many
        tokens as a batch has on average, so that little of its work is padding."""
        model = self.model

        def tell(places: list[int]) -> Tensor:
            ids, real = right_padded([rows[i] for i in places], pad=pad_id(self.encoder_tokenizer))
            return model.context_token(ids.to(model.device), real.long().to(model.device))

        lengths = [len(row) for row in rows]
        return by_length(lengths, len(rows), tell, tokens=batch_size * math.ceil(sum(lengths) / len(rows)))

    def save(self, folder: str | Path) -> None:
        """Weights (LoRA merged), configuration and both tokenizers, for `Causal2Vec(trained=folder)`."""
        write_folder(Path(folder), self.write)

    def write(self, folder: Path) -> None:
        """The files of `save`, into a folder that is there."""
        decoder: Any = self.model.decoder
        state = {name: t for name, t in self.model.state_dict().items() if not name.startswith("decoder.")}
        if hasattr(decoder, "merge_adapter"):
            decoder.merge_adapter()
        try:
            own = decoder.get_base_model() if hasattr(decoder, "get_base_model") else decoder
            kept = {n.replace(".base_layer.", "."): t for n, t in own.state_dict().items() if ".lora_" not in n}
            state |= {f"decoder.{name}": tensor.clone() for name, tensor in kept.items()}
        finally:
            if hasattr(decoder, "unmerge_adapter"):
                decoder.unmerge_adapter()
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        self.encoder_tokenizer.save_pretrained(Path(folder) / ENCODER_FOLDER)
