"""Causal2Vec as a module of sentence-transformers (6.x), and its training by their trainer.

sentences = SentenceTransformer(modules=[Causal2VecTransformer(Causal2Vec().untrained(model, tokenizer))])
train_contrastive(sentences, pairs, steps=300)
sentences.save("folder"); SentenceTransformer("folder", trust_remote_code=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from torch import Tensor

from ...core.errors import InputError
from ...text.words import listed
from .embedder import ContextEmbedder
from .files import read_folder

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError:
    raise InputError("sentence-transformers 6 is not installed; run `pip install 'tokenry[represent]'`") from None

__all__ = ["Causal2VecTransformer", "add_lora", "train_contrastive"]

# The trainer takes whatever ends in "_input_ids" for a column of its own: the encoder's ids go by other names there.
FEATURES = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "context_index": "context_index",
    "encoder_tokens": "encoder_input_ids",
    "encoder_mask": "encoder_attention_mask",
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]


class Causal2VecTransformer(InputModule):
    """Texts to `sentence_embedding`; needs no pooling module after it."""

    config_file_name: ClassVar[str] = "causal2vec.json"

    def __init__(self, embedder: ContextEmbedder) -> None:
        super().__init__()
        self.embedder, self.tokenizer = embedder, embedder.tokenizer

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Both tokenizations of the texts; `prompt` is the instruction, which the encoder does not see."""
        made = self.embedder.tokenize(listed(inputs, "text"), prompt or "")
        return {name: made[own] for name, own in FEATURES.items()}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        embedding = self.embedder(**{own: features[name] for name, own in FEATURES.items()})
        return {**features, "sentence_embedding": embedding}

    def get_embedding_dimension(self) -> int:
        return self.embedder.width

    @property
    def max_seq_length(self) -> int | None:
        return self.embedder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        self.embedder.max_seq_length = tokens

    def get_config_dict(self) -> dict[str, Any]:
        return {"max_seq_length": self.embedder._longest, "truncate": self.embedder.truncate}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """All of it, in `output_path`; weights always as safetensors, LoRA merged."""
        self.embedder.write(Path(output_path))
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Self:
        """Read what `save` wrote, from a folder."""
        config = cls.load_config(model_name_or_path, subfolder=subfolder)
        embedder = read_folder(Path(model_name_or_path) / subfolder)
        embedder.max_seq_length, embedder.truncate = config["max_seq_length"], config["truncate"]
        return cls(embedder)


def add_lora(embedder: ContextEmbedder, r: int = 16, alpha: int = 32) -> None:
    """Train the decoder by low-rank adapters: its own weights get no gradient any more.

    Raises:
        InputError: r or alpha below 1.
    """
    from peft import LoraConfig, get_peft_model

    if r < 1 or alpha < 1:
        raise InputError(f"r={r}, alpha={alpha} are not allowed; give numbers >= 1")
    config: Any = LoraConfig(r=r, lora_alpha=alpha, target_modules=LORA_TARGETS)
    embedder.model.decoder = get_peft_model(embedder.model.decoder, config)  # pyright: ignore


def train_contrastive(
    sentences: SentenceTransformer,
    rows: Sequence[Sequence[str]],
    *,
    steps: int = 1000,
    batch_size: int = 64,
    lr: float = 2e-4,
    temperature: float = 0.05,
    warmup: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """InfoNCE over the other texts of the batch, in place.

    No text stands twice in a batch, so that none is its own negative.

    Args:
        rows: (query, positive) or (query, positive, negative, ...) texts.
        warmup: part of the steps in which the learning rate rises.

    Returns:
        The loss of every step.

    Raises:
        InputError: rows of other lengths than the first, fewer than two rows or texts in one, or numbers out of range.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers.trainer_callback import PrinterCallback

    if (
        isinstance(rows, str)
        or len(rows) < 2
        or any(isinstance(row, str) or len(row) != len(rows[0]) or len(row) < 2 for row in rows)
    ):
        raise InputError(f"{len(rows)} rows cannot be trained on; give at least 2, all of the same 2 or more texts")
    if not 0.01 <= temperature <= 1:
        raise InputError(f"temperature={temperature} is not allowed; give a number in [0.01, 1]")
    if steps < 1 or batch_size < 2:
        raise InputError(f"steps={steps}, batch_size={batch_size} are not allowed; give steps >= 1, batch_size >= 2")
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(len(rows[0]) - 2))]
    data = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)})
    with TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=lr,
            warmup_steps=round(warmup * steps), seed=seed, data_seed=seed, batch_sampler="no_duplicates",
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=sentences.device.type == "cpu",
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(sentences, scale=1 / temperature)
        trainer = SentenceTransformerTrainer(model=sentences, args=arguments, train_dataset=data, loss=loss)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    sentences.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
