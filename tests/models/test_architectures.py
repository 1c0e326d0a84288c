"""Every causal architecture of transformers times everything that touches a model: as plain `generate`, or refused."""

import copy
import functools
import inspect
import re
from dataclasses import dataclass

import pytest
import torch
from support import architectures
from support.families import own_hooks
from transformers import DynamicCache

from tokenry.core.errors import InputError
from tokenry.decode import SkipDecode, Violation, loop, skip_forward, speculative
from tokenry.models.anatomy import decoder_layers
from tokenry.represent import TokenPrepending
from tokenry.select import CompressKV
from tokenry.trace.trace import capture

NEW = 8  # tokens written
PROMPT = 14


@dataclass
class Case:
    """A model with two prompts, the second one padded on the left, and what plain `generate` makes of them."""

    model: torch.nn.Module
    ids: torch.Tensor  # (1, PROMPT)
    both: dict[str, torch.Tensor]

    @functools.cached_property
    def plain(self):
        """Of the first prompt alone."""
        return generate(self.model, self.ids)

    @functools.cached_property
    def plain_batch(self):
        """Of both, in one batch."""
        return generate(self.model, self.both)


def takes(model, name):
    return name in inspect.signature(model.forward).parameters


def generate(model, inputs, **options):
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    return model.generate(**inputs, do_sample=False, max_new_tokens=NEW, pad_token_id=1, **options)


@functools.lru_cache(maxsize=2)  # tests of a kind follow each other
def case(kind):
    model = architectures.tiny_model(kind)
    return max((Case(model, *prompts(seed)) for seed in range(4)), key=margin)


def prompts(seed):
    ids = torch.randint(2, 250, (2, PROMPT), generator=torch.Generator().manual_seed(seed))
    ids[:, -5:] = ids[:, :5]  # something to look up
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 1
    return ids[:1], {"input_ids": ids, "attention_mask": mask}


def margin(case):
    """How far the second token of all choices is behind the first one: rounding must not decide."""
    out = generate(case.model, case.both, output_scores=True, return_dict_in_generate=True)
    first, second = torch.stack(out.scores).float().topk(2, -1).values.unbind(-1)
    return float((first - second).min())


class Banned:
    """A logits processor: token `where[row][1]` cannot stand at new token `where[row][0]`."""

    def __init__(self, where):
        self.where = where

    def __call__(self, ids, scores):
        scores = scores.clone()
        for row, (index, token) in enumerate(self.where):
            if ids.shape[1] == PROMPT + index:
                scores[row, token] = -torch.inf
        return scores


class TakenBack:
    """A monitor that notices the same only when two more tokens were written."""

    def __init__(self, where):
        self.where = where

    def check(self, row):
        index, token = self.where[row.number]
        if len(row.ids) < index + 3 or row.ids[index] != token or (index, "taken back") in row.ignored:
            return None
        return Violation(index, "taken back", {token: 0.0})

    def hold(self, row):
        return 3


class Guesses:
    """A drafter that is right with its first guess, its second, or not at all, by turns."""

    def __init__(self, texts, size):
        self.texts, self.size = texts, size

    def begin(self, target, rows, distinct):
        pass

    def root(self, contexts):
        self.contexts = contexts
        return torch.stack([self.scores([] if ids is None else ids) for ids in contexts])

    def extend(self, trees, nodes):
        found = []
        for ids, tree, new in zip(self.contexts, trees, nodes):
            found.append(torch.stack([self.scores([*ids, *tree.path(n)]) for n in new]) if new else torch.empty(0))
        return found

    def scores(self, ids):
        scores = torch.full((self.size,), -torch.inf)
        for text in self.texts:
            if text[: len(ids)] == ids and len(ids) < len(text):
                right, turn = text[len(ids)], len(ids) % 4
                scores[(right + 1) % self.size] = 1.0
                scores[right] = -torch.inf if turn == 3 else 2.0 - 1.5 * (turn == 1)
                return scores
        return scores


# --- the checks ------------------------------------------------------------------------------------------------------


def check_loop(case):
    assert torch.equal(generate(case.model, case.ids, custom_generate=loop), case.plain)


def check_batch(case):
    assert torch.equal(generate(case.model, case.both, custom_generate=loop), case.plain_batch)


def ban(case, inputs, plain, tokenizer, indices, **options):
    where = [(index, int(row[PROMPT + index])) for index, row in zip(indices, plain)]
    expected = generate(case.model, inputs, logits_processor=[Banned(where)])
    monitors = {"monitors": [TakenBack(where)], "processing_class": tokenizer, **options}
    assert not torch.equal(plain, expected)
    assert torch.equal(generate(case.model, inputs, custom_generate=loop, **monitors), expected)


def check_ban(case, tokenizer):
    ban(case, case.ids, case.plain, tokenizer, [2])


def check_ban_batch(case, tokenizer):
    ban(case, case.both, case.plain_batch, tokenizer, [3, 1])


def speculate(case, inputs, plain, drafter=None, num_drafts=1):
    mask = inputs["attention_mask"] if isinstance(inputs, dict) else torch.ones_like(inputs)
    texts = [[t for t, m in zip(row.tolist(), [*m.tolist(), *[1] * NEW]) if m] for row, m in zip(plain, mask)]
    size = case.model.config.get_text_config().vocab_size
    drafter = drafter or Guesses(texts, size)
    options = {"drafter": drafter, "num_drafts": num_drafts, "draft_length": 3}
    if num_drafts == 1:
        options["verifier"] = "single"
    assert torch.equal(generate(case.model, inputs, custom_generate=speculative, **options), plain)


def check_speculation(case):
    speculate(case, case.ids, case.plain)


def check_drafts(case):
    speculate(case, case.ids, case.plain, num_drafts=3)


def check_drafts_batch(case):
    speculate(case, case.both, case.plain_batch, num_drafts=3)


def check_lookup(case):
    speculate(case, case.ids, case.plain, "prompt-lookup")


def check_early_exit(case):
    speculate(case, case.ids, case.plain, "early-exit")


def check_early_exit_batch(case):
    speculate(case, case.both, case.plain_batch, "early-exit", 2)


DEPTHS = (4, 4, 3, 3, 3)


def check_skipdecode(case):
    """The cached text is the one that a whole forward writes, with the columns masked that skip a layer."""
    method = SkipDecode(depths=DEPTHS, planned_new_tokens=NEW)
    expected = skipped_text(case, method)
    with method(case.model):
        assert generate(case.model, case.ids)[0].tolist() == expected


def check_layer_policy(case, tokenizer):
    method = SkipDecode(depths=DEPTHS, planned_new_tokens=NEW)
    policy = method.plugins(case.model, tokenizer).layer_policy
    written = generate(case.model, case.ids, custom_generate=loop, layer_policy=policy)
    assert written[0].tolist() == skipped_text(case, method)


def skipped_text(case, method):
    depth = len(decoder_layers(case.model))
    ids = case.ids
    with torch.no_grad():
        for _ in range(NEW):
            mask = method.schedule_for(depth, PROMPT, NEW).mask(ids.shape[1])
            positions = {"position_ids": torch.arange(ids.shape[1])[None]} if takes(case.model, "position_ids") else {}
            logits = skip_forward(case.model, ids, mask, **positions).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0].tolist()


def check_compresskv(case):
    press = dict(window=2, adaptive=False, heads="all", min_tokens=3)
    with CompressKV(budget=PROMPT, **press)(case.model):
        assert torch.equal(generate(case.model, case.both), case.plain_batch)
    with CompressKV(budget=6, **press)(case.model) as cutter:
        out = generate(case.model, case.ids, return_dict_in_generate=True)
    assert cutter.trace.counts() and set(cutter.trace.counts().values()) == {6}
    held = [out.past_key_values.layers[i].keys.shape[-2] for i in cutter.trace.counts()]
    assert set(held) == {6 + NEW - 1}


def check_capture(case):
    model = case.model
    with torch.no_grad():
        logits = model(case.ids, use_cache=False).logits.float()
        with capture(model, hidden=[-1, 1]) as cap:
            inside = model(case.ids, use_cache=False).logits.float()
        torch.testing.assert_close(inside, logits)
        with capture(model) as written:
            text = generate(model, case.ids)
    torch.testing.assert_close(cap.trace.logits(), logits[0], atol=1e-3, rtol=1e-3)
    logprobs = logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, case.ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(cap.trace.logprob[1:], expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(text, case.plain)
    assert written.trace.ids.tolist()[: PROMPT + NEW - 1] == text[0, :-1].tolist()


def check_attention_maps(case):
    with torch.no_grad(), capture(case.model, qk="all") as cap:
        case.model(case.ids, use_cache=False)
    layers = sorted(int(name[2:]) for name in cap.trace.tensors if name.startswith("q."))
    assert layers
    eager = copy.deepcopy(case.model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(case.ids, use_cache=False, output_attentions=True).attentions
    maps = [m for m in maps if m is not None]
    for layer, expected in zip(layers, maps, strict=True):
        torch.testing.assert_close(cap.trace.attention(layer), expected[0].float(), atol=1e-3, rtol=1e-3)


def check_token_prepending(case):
    """The slot as an ordinary token is the plain model; overwritten it changes what follows."""
    model = case.model
    embedding = model.get_input_embeddings()
    ids = case.ids.clone()
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        vector = embedding(ids[0, 1:2])[0].float()
        ids[0, 1] = 10_000
        off, on = TokenPrepending(overwrite=False), TokenPrepending(exit_layer=3)
        with off(model, 10_000) as run:
            run.vector = vector
            same = model(ids, use_cache=False).logits
        torch.testing.assert_close(same, plain)
        with on(model, 10_000) as run:
            run.vector = vector
            other = model(ids, use_cache=False).logits
    torch.testing.assert_close(other[:, 0], plain[:, 0])
    assert not torch.allclose(other[:, 2], plain[:, 2], atol=1e-3)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


# --- true reasons ----------------------------------------------------------------------------------------------------
# Words of a refusal, and what the test itself finds out about the model to believe them.


def text_config(case):
    return case.model.config.get_text_config()


def kinds_of_layers(case):
    return set(getattr(text_config(case), "layer_types", None) or ())


def cache_layers(case):
    return {type(layer).__name__ for layer in DynamicCache(config=case.model.config).layers}


def padding_counts(case):
    """Whether the scores of two cached steps change with padding, in transformers' own `generate`."""
    text = case.both["input_ids"][1:, 3:7]
    options = {"output_scores": True, "return_dict_in_generate": True}
    padded = {name: tensor[1:, :7].clone() for name, tensor in case.both.items()}
    padded["input_ids"][:, :3] = 7  # the padding token itself has an embedding of zeros
    alone, behind = (torch.stack(generate(case.model, x, **options).scores[:2]) for x in (text, padded))
    return not torch.allclose(alone, behind, atol=1e-3 * float(alone.abs().max()))


def head_alone(case):
    """Whether the head is one matrix on the final hidden states."""
    with torch.no_grad():
        out = case.model(case.ids, output_hidden_states=True, use_cache=False)
        return torch.allclose(case.model.get_output_embeddings()(out.hidden_states[-1]), out.logits, atol=1e-3)


def lists_of_layers(case):
    count = text_config(case).num_hidden_layers
    return [m for m in case.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]


def residual_stream(case):
    """Whether every layer gives one tensor (batch, time, width)."""
    shapes = []
    for layers in lists_of_layers(case):
        layers[0].register_forward_hook(lambda module, args, output: shapes.append(shape_of(output)))
    with torch.no_grad():
        case.model(case.ids, use_cache=False)
    for layers in lists_of_layers(case):
        layers[0]._forward_hooks.clear()
    return shapes[0] == (1, PROMPT, 32)


def shape_of(output):
    return tuple(output.shape) if isinstance(output, torch.Tensor) else None


def hands_on(case):
    """Whether the first layer returns tensors beside its hidden states that are no attention weights."""
    rests = []
    layer = decoder_layers(case.model)[0]
    handle = layer.register_forward_hook(lambda module, args, output: rests.append(output[1:]))
    with torch.no_grad():
        case.model(case.ids)
    handle.remove()
    return any(part is not None and getattr(part, "dim", lambda: 0)() != 4 for part in rests[0])


def has_q_proj(case):
    return any(hasattr(m, "q_proj") and hasattr(m, "layer_idx") for m in case.model.modules())


def own_argument(case, name):
    return name in inspect.signature(case.model.forward).parameters


def some_forward_lacks_positions(case):
    return not all(
        "position_ids" in inspect.signature(m.forward).parameters for m in (case.model, case.model.base_model)
    )


PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
WITH_MASKS_OF_THEIR_OWN = {"minimax"}  # a window in layers that are called full
TRUE = {
    "keeps a state that cannot be taken back": lambda c: not cache_layers(c) <= PLAIN_LAYERS,
    "makes a cache of its own|fills no cache of": lambda c: (
        not (own_argument(c, "past_key_values") and c.model._supports_default_dynamic_cache())
    ),
    "rewind='reprefill' feeds|keeps no cache": lambda c: not own_argument(c, "past_key_values"),
    "keeps its state in cache_params": lambda c: own_argument(c, "cache_params"),
    "keeps its state in state": lambda c: own_argument(c, "state"),
    "keeps its state in mems": lambda c: own_argument(c, "mems"),
    "keeps its state in past_buckets_states": lambda c: own_argument(c, "past_buckets_states"),
    "takes no position_ids": some_forward_lacks_positions,
    "has local attention": lambda c: "local" in c.model.config.attention_layers,
    "widens every mask": lambda c: c.model.config.model_type == "git",
    "padding before a text changes": padding_counts,
    "with others beside it": lambda c: "prepare_inputs_for_generation" in vars(type(c.model)),
    "has layers of '": lambda c: kinds_of_layers(c) - {"full_attention", "sliding_attention"},
    "no attention layers with q_proj": lambda c: not has_q_proj(c),
    "keeps only a window or a state": lambda c: "DynamicLayer" not in cache_layers(c),
    "are not its output embeddings times": lambda c: not head_alone(c),
    "sees both sides": lambda c: not getattr(c.model.config, "causal", True),
    "is bidirectional": lambda c: not getattr(c.model.config, "causal", True) or c.model.config.model_type == "git",
    "before it calls its language model": lambda c: text_config(c) is not c.model.config,
    "read token ids": lambda c: (
        getattr(text_config(c), "hidden_size_per_layer_input", 0) or "hash_moe" in text_config(c).mlp_layer_types
    ),
    "return .* and not hidden states|take states of shape|arranges its states otherwise": lambda c: (
        not residual_stream(c) or c.model.config.model_type == "diffllama"
    ),
    "embeddings of .* have shape|the mask has": lambda c: not residual_stream(c),
    "(no|several) lists? of": lambda c: len(lists_of_layers(c)) != 1,
    "caps its attention scores": lambda c: text_config(c).attn_logit_softcapping,
    "share keys and values|read the keys of others": lambda c: text_config(c).num_kv_shared_layers,
    "hand more than hidden states on": hands_on,
    "warmup=2 is not enough": lambda c: any(text_config(c).layer_types.index(kind) > 1 for kind in kinds_of_layers(c)),
    "there is none; leave use_cache on": lambda c: (
        not own_argument(c, "past_key_values") or not c.model.config.use_cache
    ),
    "implementation 'eager'": lambda c: text_config(c)._attn_implementation == "eager",
    "do not know their number": lambda c: any((getattr(m, "layer_idx", 0) or -1) < 0 for m in c.model.modules()),
    "whose maps cannot be rebuilt; leave": lambda c: kinds_of_layers(c) - {"full_attention", "sliding_attention"},
    "sees other tokens than its configuration": lambda c: c.model.config.model_type in WITH_MASKS_OF_THEIR_OWN,
    "does not go through transformers' attention": lambda c: c.model.config.model_type == "zaya",
    "does not get its cache as past_key_values": lambda c: any(
        "layer_past" in inspect.signature(m.forward).parameters for m in c.model.modules()
    ),
}

# What cannot be built from its configuration alone, or what transformers' own `generate` does not run.
ABSENT = {
    "blt": "num_hidden_layers",  # generate asks for it to make the cache
    "dots3_note": "text hidden size",  # its towers have sizes of their own; the text model is dots3_note_text
    "gemma3n": "timm|PIL",  # its vision tower comes from timm; the text model is gemma3n_text
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # they draft from the states of a Gemma 4
    "gemma4_unified_assistant": "set of layer types",
    "musicgen": "dropout",  # three models in one, fed with code books
    "musicgen_melody": "dropout",
    "prophetnet": "position_ids",  # refuses the left padding of a batch
    "xlstm": "matC_old",  # its fallback without kernels writes shapes that it does not read
}


@pytest.mark.parametrize("kind", sorted(ABSENT))
def test_what_is_absent_fails_without_us(kind):
    with pytest.raises(Exception, match=ABSENT[kind]):
        case(kind)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", [kind for kind in architectures.ARCHITECTURES if kind not in ABSENT])
def test_as_plain_or_refused_with_a_true_reason(kind, check, tokenizer):
    cell, run = case(kind), CHECKS[check]
    try:
        run(cell, **({"tokenizer": tokenizer} if "tokenizer" in inspect.signature(run).parameters else {}))
    except InputError as refusal:
        reasons = [true for words, true in TRUE.items() if re.search(words, str(refusal))]
        assert reasons, f"no known reason: {refusal}"
        assert all(true(cell) for true in reasons), f"not true: {refusal}"
    assert not own_hooks(cell.model)
