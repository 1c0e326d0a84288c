"""Small denoisers, scripted ones whose predictions are known, and a tokenizer of single letters."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry.decode.denoising.loop import (
    LogitsTransform,
)
from tokenry.decode.denoising.state import DiffusionState, Prediction
from tokenry.learned.confidence_filter import ConfidenceFilter
from tokenry.models.masks import make_bidirectional

V, MASK, EOS, PAD = 20, 19, 18, 17


def small(layers=3, impl="sdpa", **more):
    """A random bidirectional Llama that is sharp enough not to have ties."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None, "mask_token_id": MASK}
    config = LlamaConfig(vocab_size=V, num_hidden_layers=layers, max_position_embeddings=96, **sizes, **ids, **more)
    model = LlamaForCausalLM._from_config(config, attn_implementation=impl)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    return make_bidirectional(model).eval()


def prompts(*lengths):
    """Left-padded prompts of these lengths: ids and attention mask."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, width - n :] = torch.randint(0, 16, (n,), generator=generator)
        mask[row, width - n :] = 1
    return ids, mask


class Scripted:
    """A predictor that says what it is told: token and confidence for each column of the window, per call."""

    shift, mask_token_id, eos_token_id, pad_token_id = False, MASK, EOS, PAD
    device = torch.device("cpu")

    def __init__(self, *calls):
        self.calls, self.seen = list(calls), []
        self.model = small()

    def predict(self, state, cache=None):
        state.count(0, state.x.shape[1], state.working)
        self.seen.append(state.x.clone())
        script = self.calls[min(len(self.seen), len(self.calls)) - 1]
        logits = torch.full((*state.x.shape, V), float("-inf"))
        logits[:, : state.start, 0] = 0.0
        for row in range(len(state.x)):
            for i, (token, p) in enumerate(script):
                # The rest of the probability goes to two tokens that are never the best.
                logits[row, state.start + i, token] = torch.tensor(p).log()
                logits[row, state.start + i, 14:16] = torch.tensor((1 - p) / 2 + 1e-30).log()
        return logits


def state_of(window, prompt=(1, 2), block_length=None, model=None, seed=None):
    """A state with this window, None being a mask."""
    ids = torch.tensor([prompt])
    state = DiffusionState.begin(
        model or Scripted(), ids, torch.ones_like(ids, dtype=torch.bool), len(window), block_length, seed
    )
    state.x[0, len(prompt) :] = torch.tensor([MASK if token is None else token for token in window])
    return state


def predicted(state, confidence):
    """A prediction of token 7 everywhere with these confidences in the window."""
    whole = torch.zeros(state.x.shape)
    whole[0, state.start :] = torch.tensor(confidence)
    return Prediction(torch.zeros(*state.x.shape, V), torch.full_like(state.x, 7), whole)


def chosen(policy, state, confidence):
    policy.reset(state)
    return policy.select(predicted(state, confidence), state)[0, state.start :].nonzero().flatten().tolist()


class Remember(LogitsTransform):
    """Keeps the ids it has seen at each column: they must move with the columns."""

    def reset(self, state):
        self.kept = state.x.clone()

    def __call__(self, logits, state):
        before = self.kept != MASK
        assert torch.equal(self.kept[before], state.x[before])
        self.kept = state.x.clone()
        return logits

    def reindex(self, edit):
        self.kept = edit.take(self.kept, MASK)


class Characters:
    """A tokenizer of single characters, 'a' being 0."""

    chat_template = None
    pad_token_id, eos_token_id, mask_token_id = PAD, EOS, MASK

    def __call__(self, texts, **_):
        from transformers import BatchEncoding

        width = max(map(len, texts))
        rows = [[PAD] * (width - len(t)) + [ord(c) - ord("a") for c in t] for t in texts]
        mask = [[0] * (width - len(t)) + [1] * len(t) for t in texts]
        return BatchEncoding({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)})

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + i) for i in ids)


def sharp(ends=None):
    """A random model that is sure of some predictions, and predicts the end of the text in place of a token."""
    model = small()
    with torch.no_grad():
        head = model.lm_head.weight
        if ends is not None:
            head[EOS] = 1.1 * head[ends]
        head.mul_(6.0)
    return model


def random_filter(length, seed=0, scale=6.0):
    """One that looks at the whole block, and accepts some."""
    torch.manual_seed(seed)
    made = ConfidenceFilter(length)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made
