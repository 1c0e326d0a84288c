"""Does a token that sums the text up make better embeddings of a decoder, and is it the text that it sums up?

A small decoder and a small encoder, trained from nothing on pairs of STS-B: a trained encoder would carry the result
by itself. Whether it does is asked beside it: the given model is put behind all-MiniLM-L6-v2, both as they are, and the
projector between them is trained; MiniLM alone stands next to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..measure.build_cache import built_folder, digest
from ..measure.claims import Finding
from ..measure.compare import beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
from ..measure.tasks.sts import STSTask, load_pairs, spread
from ..represent.causal2vec import Causal2Vec
from ..represent.contextual.embedder import ContextEmbedder
from ..represent.contextual.files import read_folder

if TYPE_CHECKING:
    from ..measure.compare import Comparison

__all__ = ["build"]

PLAIN, CONSTANT, CONTEXT, ALONE, METHOD = (
    "causal last token",
    "constant learned token",
    "context only",
    "encoder and projector alone",
    "causal2vec",
)
REAL, READER_ALONE = "the model behind MiniLM, projector trained", "MiniLM alone"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {"context": "none", "pooling": "eos"},
    CONSTANT: {"context": "constant"},
    CONTEXT: {"pooling": "context"},
    METHOD: {},
}
STEPS, BATCH, LR, TEMPERATURE, POSITIVE = 120, 32, 1e-3, 0.05, 4.0
VOCABULARY, WIDTH, READER = 4096, 128, 64
REAL_STEPS, REAL_BATCH = 60, 16


@experiment("causal2vec", Causal2Vec, batch=64, seeds=(0, 1, 2), quick=8)
def build(run: Run[Causal2Vec]) -> Design:
    """STS-B test pairs; samples are pairs, evenly spread, by default all 1379. Trains five models for each seed, and
    one projector for the given model, kept in the cache folder. `method` sets the encoder's pooling, the projector and
    the place of the token.
    """
    method, steps = run.settings(Causal2Vec), run.size(STEPS, 2)
    folder = run.folder("causal2vec")
    sizes = [steps, BATCH, LR, TEMPERATURE, POSITIVE, VOCABULARY, WIDTH, READER]
    test = load_pairs("test")

    @cache
    def embeds(name: str, seed: int) -> Any:
        one = method.model_copy(update={**SETTINGS.get(name, {}), "trained": None, "seed": seed})
        path = folder / digest([one.model_dump(mode="json"), sizes, name == ALONE])
        embedder = read_folder(built_folder(path, partial(trained, one, steps, name == ALONE)))
        return partial(alone, embedder) if name == ALONE else partial(embedder.encode, batch_size=64)

    def arm(name: str, role: Any = "control") -> Arm:
        setting = {**SETTINGS.get(name, {"decoder": False}), "steps": steps}
        return Arm(name, role=role, setting=setting, apply=lambda texts, seed: embeds(name, seed)(texts)[:, None])

    real = cache(lambda: behind_minilm(run, method, folder))
    kept: dict[str, Any] = {
        REAL: cache(lambda texts: real().encode(texts, batch_size=64)),
        READER_ALONE: cache(lambda texts: alone(real(), texts, summaries)),
    }

    def once(name: str, role: Any) -> Arm:
        """Trained once, so that it is measured once, too."""
        setting = {"steps": run.size(REAL_STEPS, 1), "batch": REAL_BATCH, "reader": "MiniLM"}
        return Arm(name, role=role, setting=setting, apply=lambda texts, seed: kept[name](tuple(texts))[:, None])

    return Design(
        task=STSTask(spread(test, run.samples) if run.samples else test),
        arms=[
            *(arm(PLAIN, "plain"), arm(CONSTANT), arm(CONTEXT), arm(ALONE), arm(METHOD, "method")),
            *(once(READER_ALONE, "control"), once(REAL, "method")),
        ],
        baseline=PLAIN,
        on="a Llama of 2 layers, trained here",
        statistics=STSTask.statistics,
        notes=f"A Llama of 2 layers, {WIDTH} wide, and a BERT of 2 layers, {READER} wide, from random weights, with "
        f"one vocabulary of {VOCABULARY} entries; {steps} steps of {BATCH} pairs of STS-B train that people give "
        f"{POSITIVE:g} of 5 or more, InfoNCE at temperature {TEMPERATURE}, learning rate {LR}, everything trained, the "
        "same pairs in every arm. A seed is that of weights and order. The arms with the encoder have more weights. "
        f"`{REAL}`: the given model and all-MiniLM-L6-v2, both frozen, with a projector that is trained on the same "
        f"pairs, {run.size(REAL_STEPS, 1)} steps of {REAL_BATCH}. It is trained, and it and MiniLM embed, once for all "
        "seeds, so that their seconds are divided by the number of seeds. MiniLM was made to embed sentences.",
        tried="300 steps of 64 pairs were begun and stopped for their time, before anything was scored; at step 100 "
        "the loss of training was near 0 already.",
    )


def trained(method: Causal2Vec, steps: int, by_encoder: bool) -> Any:
    """Train an arm; the function that saves it."""
    from sentence_transformers import SentenceTransformer

    from ..represent.contextual.sentence_transformer import Causal2VecTransformer, train_contrastive

    words = vocabulary([text for pair in load_pairs("train") for text in pair[:2]])
    embedder = untrained(method, words)
    module = Causal2VecTransformer(embedder)
    if by_encoder:
        module.embedder.forward = partial(context_tokens, embedder)
    sentences = SentenceTransformer(modules=[module], device="cpu", trust_remote_code=False)
    options = {"batch_size": BATCH, "lr": LR, "temperature": TEMPERATURE, "seed": method.seed}
    train_contrastive(sentences, positives(), steps=steps, **options)
    return embedder.write


def positives() -> list[tuple[str, str]]:
    """Pairs of the training split that mean the same."""
    return [pair[:2] for pair in load_pairs("train") if pair.score >= POSITIVE and pair.first != pair.second]


def behind_minilm(run: Run[Causal2Vec], method: Causal2Vec, folder: Path) -> ContextEmbedder:
    """The given model behind MiniLM, with a projector that is trained where it is not kept yet."""
    from sentence_transformers import SentenceTransformer

    from ..represent.contextual.sentence_transformer import Causal2VecTransformer, train_contrastive

    one = method.model_copy(update={"trained": None, "encoder_name": "minilm", "seed": 0})
    embedder = one.untrained(run.model, run.tokenizer)
    projector, steps = cast(torch.nn.Module, embedder.model.projector), run.size(REAL_STEPS, 1)

    def make() -> Any:
        embedder.model.requires_grad_(False)
        projector.requires_grad_(True)
        device, module = str(run.model.device), Causal2VecTransformer(embedder)
        sentences = SentenceTransformer(modules=[module], device=device, trust_remote_code=False)
        train_contrastive(sentences, positives(), steps=steps, batch_size=REAL_BATCH, lr=LR, temperature=TEMPERATURE)
        return lambda place: save_file(projector.state_dict(), place / "projector.safetensors")

    path = folder / digest([one.model_dump(mode="json"), steps, REAL_BATCH, LR, TEMPERATURE, POSITIVE])
    projector.load_state_dict(load_file(built_folder(path, make) / "projector.safetensors"))
    return embedder.eval()


def untrained(method: Causal2Vec, words: PreTrainedTokenizerBase) -> ContextEmbedder:
    """The models of an arm; the same decoder and encoder in every arm of a seed."""
    shared: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": len(words)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.seed)
        llama = LlamaConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4, **shared)
        bert = BertConfig(hidden_size=READER, intermediate_size=4 * READER, num_attention_heads=4, **shared)
        return method.untrained(LlamaModel(llama), words, (BertModel(bert), words))


def vocabulary(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of the training texts, for both models."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def context_tokens(embedder: ContextEmbedder, **features: Tensor) -> Tensor:
    """(texts, width): what the encoder says, without a decoder."""
    model: Any = embedder.model
    made = model.context_token(features["encoder_input_ids"], features["encoder_attention_mask"])
    return torch.nn.functional.normalize(made.float(), dim=-1)


def summaries(embedder: ContextEmbedder, **features: Tensor) -> Tensor:
    """(texts, encoder width): the encoder's vectors."""
    model: Any = embedder.model
    made = model.summary(features["encoder_input_ids"], features["encoder_attention_mask"])
    return torch.nn.functional.normalize(made.float(), dim=-1)


@torch.no_grad()
def alone(embedder: ContextEmbedder, texts: Sequence[str], what: Callable[..., Tensor] = context_tokens) -> Tensor:
    """(texts, width): `context_tokens` of texts, or `summaries`."""
    parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    tokenized = [{name: t.to(embedder.model.device) for name, t in embedder.tokenize(part).items()} for part in parts]
    return torch.cat([what(embedder, **features).cpu() for features in tokenized])


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """The claim against the last token, and what else could explain a gain."""
    better = partial(beats, c, "spearman", form="+.2f")
    scores = "; ".join(f"{arm} {c.mean(arm, 'spearman'):.2f}" for arm in c.arms)
    return [
        Finding("Causal2Vec beats the causal last token.", better(METHOD, [PLAIN]), main=True, note=scores),
        Finding("It beats a constant learned token in the same place.", better(METHOD, [CONSTANT])),
        Finding("It beats the encoder and projector without the decoder.", better(METHOD, [ALONE])),
        Finding("It beats the state at the Contextual token alone.", better(METHOD, [CONTEXT])),
        Finding(
            "The given model behind MiniLM, of which the projector was trained, beats MiniLM alone.",
            better(REAL, [READER_ALONE]),
        ),
    ]
