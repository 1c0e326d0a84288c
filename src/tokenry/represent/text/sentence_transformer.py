"""Prompt embeddings, with or without Token Prepending, as a module of sentence-transformers (6.x).

module = TokenPrependingTransformer(TokenPrepending().encoder(model, tokenizer))
sentences = SentenceTransformer(modules=[module])
sentences.encode(["A dog runs."]); sentences.save("folder")
SentenceTransformer("folder", trust_remote_code=True)      # the flag allows modules of other packages
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor

from ...core.errors import InputError
from ...models.checkpoint_files import read_tokenizer, reading
from ...models.load import load_causal
from ...text.words import listed
from ..token_prepending import TokenPrepending
from .prompt_embedder import PromptEmbedder

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:
    raise InputError("sentence-transformers 6 is not installed; run `pip install 'tokenry[represent]'`") from None

__all__ = ["TokenPrependingTransformer"]


class TokenPrependingTransformer(InputModule):
    """Texts to `sentence_embedding`; needs no pooling module after it.

    Args:
        embedder: what makes the embeddings.
    """

    config_file_name: ClassVar[str] = "token_prepending.json"

    def __init__(self, embedder: PromptEmbedder) -> None:
        super().__init__()
        self.embedder, self.tokenizer = embedder, embedder.tokenizer

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Token ids of the texts, each in its template; a `prompt` goes before every text."""
        return self.embedder.tokenize([(prompt or "") + text for text in listed(inputs, "text")])

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        embedding = self.embedder(features["input_ids"], features["attention_mask"])
        return {**features, "sentence_embedding": embedding}

    def get_embedding_dimension(self) -> int:
        return self.embedder.model.config.get_text_config().hidden_size

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text at most, prompt included; longer ones are cut or refused (the embedder's `truncate`)."""
        return self.embedder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        self.embedder.max_seq_length = tokens

    def get_config_dict(self) -> dict[str, Any]:
        embedder, method = self.embedder, self.embedder.token_prepending
        names = ("prompt", "output_layer", "add_bos", "normalize", "max_seq_length", "truncate")
        own = {name: getattr(embedder, name) for name in names}
        return {**own, "token_prepending": method.model_dump(mode="json") if method else None}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Model, tokenizer and settings, all in `output_path`; weights always as safetensors."""
        self.embedder.model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read what `save` wrote; `model_kwargs` go to the model's `from_pretrained`.

        The `trust_remote_code` of `SentenceTransformer` is about this class; code in the folder needs it in
        `model_kwargs`.
        """
        place = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        config = cls.load_config(model_name_or_path, cache_folder=cache_folder, **place)
        if not config:
            raise InputError(f"{model_name_or_path!r} has no {cls.config_file_name}; give what this module has saved")
        place["cache_dir"] = cache_folder
        options = {"trust_remote_code": False, **(model_kwargs or {})}
        with reading(model_name_or_path):
            model = load_causal(model_name_or_path, **place, **options)
            tokenizer = read_tokenizer(model_name_or_path, options["trust_remote_code"], padding_side="left", **place)
        settings = config.pop("token_prepending")
        method = TokenPrepending(**settings) if settings else None
        return cls(PromptEmbedder(model.eval(), tokenizer, token_prepending=method, **config))
