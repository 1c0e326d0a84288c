"""What `capture` runs inside a model: collects per forward, and makes the tensors and header of each sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.hashes import digest
from ..hooks.attention import AttentionCall, allowed, is_edited
from ..hooks.residual import Feed
from ..models.anatomy import fingerprint, head_mixer, output_head
from ..text.spans import find_spans, text_offsets
from .reducers import Reducer

__all__ = ["Recorder", "head_logits", "identity"]

FORMAT = 1
ROWS = 128  # attention rows rebuilt at a time for reducers
LOGITS = 2**22  # elements of a chunk of logits (16 MiB in float32)


class Recorder:
    """Collects per forward; everything in `columns` is {name: [(batch, new, ...), ...]}, time second."""

    def __init__(self, model: PreTrainedModel, qk: set[int], positions: list[int], reducers: Sequence[Reducer]) -> None:
        self.model, self.qk, self.positions, self.reducers = model, qk, torch.tensor(positions), reducers
        self.columns: dict[str, list[Tensor]] = {}
        self.heads: dict[int, list[Tensor]] = {}  # (batch, wanted, heads * head_dim)
        self.wanted: list[Tensor] = []  # per forward: columns whose head outputs some row wants
        self.live: list[list[Reducer]] = []  # per row
        self.settings: dict[str, dict] = {}  # how to rebuild the maps of a layer
        self.valid = torch.zeros(0, 0, dtype=torch.bool)  # (batch, columns): not padding
        self.prompt = 0
        self.feed = Feed(ids=None, mask=None, positions=None, start=0, new=0)  # the newest; this one stands for none
        self.unfinished = False  # a forward has begun; still so afterwards if it was refused or failed on its way

    # --- during a forward ------------------------------------------------------------------------------------

    def begin(self, feed: Feed) -> None:
        if feed.ids is None:
            raise InputError("a forward with inputs_embeds has no token ids; call the model with input_ids")
        self._forget_unfinished()
        held, device = self.valid.shape[1], feed.ids.device
        if feed.start > held:
            raise InputError(f"the cache holds {feed.start} tokens, {held} were traced; capture from the first forward")
        if feed.start < held:
            self._take_back(feed, len(feed.ids), held)
        if self.valid.shape[1] == 0:
            self.settings, self.prompt = {}, feed.new
            self.live = [copy.deepcopy(list(self.reducers)) for _ in feed.ids]
        self.feed, self.unfinished = feed, True
        self.start, self.stop = self.valid.shape[1], self.valid.shape[1] + feed.new
        self.valid = self._valid(feed, feed.ids)
        positions = torch.arange(self.start, self.stop, device=device) if feed.positions is None else feed.positions
        self._add("ids", feed.ids)
        self._add("position_ids", positions.expand(len(feed.ids), -1))
        order = self.valid.cumsum(1)[:, self.start :] - 1
        wanted = torch.isin(order, self.positions.to(device)) & self.valid[:, self.start :]
        self.wanted.append(wanted.any(0).nonzero().squeeze(1) + self.start)

    def _valid(self, feed: Feed, ids: Tensor) -> Tensor:
        """Which of all columns so far are tokens; a mask with a column for each may also hide older ones."""
        new = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        if isinstance(feed.mask, Tensor) and feed.mask.dim() == 2:
            if feed.mask.shape[1] == self.stop:
                return feed.mask.bool()
            new = feed.mask[:, -feed.new :].bool()
        elif feed.mask is not None and len(ids) > 1:
            raise InputError("a mask prepared for attention does not tell which columns are padding; pass a 2-D mask")
        return new if self.start == 0 else torch.cat([self.valid, new], 1)

    def _take_back(self, feed: Feed, rows: int, held: int) -> None:
        keep = feed.start
        if feed.start > 0:
            if rows > 1:
                raise InputError(
                    f"the cache holds {feed.start} columns after {held} were fed; "
                    "trace one sequence at a time where tokens are taken back"
                )
            if feed.positions is not None:  # a compressed cache has fewer columns than tokens
                keep = int(feed.positions[0, 0]) + int((~self.valid).sum())
            if keep == held:
                return  # compressed, not rewound: the sequence goes on
            if keep > held:
                raise InputError(f"the next token stands at {keep}, {held} were traced; capture from the first forward")
            if self.reducers or len(self.positions):
                raise InputError("tokens were taken back, which reducers and head_outputs cannot follow; trace without")
        self._shorten(keep)
        self.heads, self.wanted = {}, []

    def _forget_unfinished(self) -> None:
        """Take out what a forward has left that came to no end."""
        if not self.unfinished:
            return
        if self.reducers:
            raise InputError("a forward came to no end, which reducers cannot take back; capture anew, or without them")
        self.unfinished = False
        self._shorten(self.start)
        del self.wanted[-1:]
        for parts in self.heads.values():
            del parts[len(self.wanted) :]

    def _shorten(self, keep: int) -> None:
        """Keep the first columns."""
        for parts in self.columns.values():
            parts[:] = [torch.cat(parts, 1)[:, :keep]] if keep and parts else []
        self.valid = self.valid[:, :keep]

    def _add(self, name: str, part: Tensor) -> None:
        self.columns.setdefault(name, []).append(part.detach())

    def keep(self, name: str) -> Callable[[Tensor], Tensor]:
        """An edit that stores its input and changes nothing."""

        def store(x: Tensor) -> Tensor:
            self._add(name, x)
            return x

        return store

    def keep_heads(self, layer: int) -> Callable[[Tensor], Tensor]:
        """An edit that stores the wanted positions of the heads' outputs and changes nothing."""

        def store(x: Tensor) -> Tensor:
            self.heads.setdefault(layer, []).append(x[:, self.wanted[-1] - self.start].detach())
            return x

        return store

    def attention(self, call: AttentionCall) -> None:
        """The observer: stores queries and keys, feeds the reducers."""
        if call.layer not in self.qk and not self.reducers:
            return
        window = _window(self.model.config.get_text_config(), call.layer)
        keys, least = call.key.shape[2], self.stop if window is None else min(self.stop, window - 1 + self.feed.new)
        if not least <= keys <= self.stop:  # then a key's column says nothing about its token
            raise InputError(f"layer {call.layer} holds {keys} keys for {self.stop} tokens; use a plain dynamic cache")
        if call.layer in self.qk:
            self._check_mask(call, window)
            setting = self.settings.setdefault(str(call.layer), {"edited": False})
            own_mask = isinstance(self.feed.mask, Tensor) and self.feed.mask.dim() > 2
            setting["edited"] |= own_mask or is_edited(call.module)
            setting |= {"scaling": call.scaling, "window": window}
            self._add(f"q.{call.layer}", call.query.transpose(1, 2))
            self._add(f"k.{call.layer}", call.key[:, :, -self.feed.new :].transpose(1, 2).clone())
        if self.reducers:
            self._reduce(call)

    def _check_mask(self, call: AttentionCall, window: int | None) -> None:
        """Refuse a layer whose newest token sees other keys than `Trace.attention` will think."""
        if (
            call.mask is None
            or is_edited(call.module)
            or (isinstance(self.feed.mask, Tensor) and self.feed.mask.dim() > 2)
        ):
            return
        keys, sees = call.key.shape[2], allowed(call)[:, 0, -1]
        expected = self.valid[:, self.stop - keys :] & (
            torch.arange(keys, device=sees.device) >= keys - (window or keys)
        )
        if not torch.equal(sees.expand_as(expected) & self.valid[:, -1:], expected & self.valid[:, -1:]):
            raise InputError(
                f"layer {call.layer} sees other tokens than its configuration says, so its maps cannot be rebuilt; "
                "leave it out of qk, or record rows with a reducer"
            )

    def _reduce(self, call: AttentionCall) -> None:
        dropped = self.stop - call.key.shape[2]
        for start in range(0, self.feed.new, ROWS):
            rows = slice(start, start + ROWS)
            maps = _maps(call, rows)
            columns = dropped + maps.shape[-1]
            for valid, block, reducers in zip(self.valid, maps, self.live):
                block = _picked(_picked(block, 1, valid[self.start :][rows]), 2, valid[dropped:columns])
                first_row, first_key = int(valid[: self.start + start].sum()), int(valid[:dropped].sum())
                for reducer in reducers if block.shape[1] else ():
                    reducer.update(call.layer, first_row, first_key, block)

    def final(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self._add("final", output[0])
        self.unfinished = False

    def check_logits(self, module: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        """Refuse a model that changes its logits after the head in a way `head_logits` does not know."""
        chosen = isinstance(kwargs.get("logits_to_keep"), Tensor)  # then the last row may be any column
        if chosen or len(self.columns["final"]) > 1 or getattr(output, "logits", None) is None:
            return
        theirs = output.logits[:, -1].detach().float()
        ours = head_logits(module, self.columns["final"][0][:, -1])
        if (theirs - ours).abs().max() > 0.02 * theirs.abs().max():
            raise InputError(
                f"the logits of {type(module).__name__} are not its output embeddings times the final hidden states; "
                "it cannot be traced"
            )

    # --- afterwards ------------------------------------------------------------------------------------------

    def sequences(self, tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[dict[str, Tensor], dict]]:
        """Tensors and header of every row."""
        self._forget_unfinished()
        whole = {name: _join(parts) for name, parts in self.columns.items() if parts}
        if self.qk and not self.settings and self.feed.ids is not None:
            raise InputError(
                f"the attention of {type(self.model).__name__} does not go through transformers' attention functions, "
                "so it cannot be observed; leave qk out"
            )
        for name, columns in sorted(whole.items()):
            if name[:2] in ("q.", "k.") and columns.shape[1] < self.valid.shape[1]:
                raise InputError(
                    f"layer {name[2:]} ran for {columns.shape[1]} of {self.valid.shape[1]} tokens, so its attention "
                    "cannot be rebuilt; leave it out of qk, or trace without skipping layers"
                )
            if columns.shape[:2] != self.valid.shape:
                raise InputError(
                    f"{name} has shape {tuple(columns.shape)} for {tuple(self.valid.shape)} tokens: "
                    f"{type(self.model).__name__} arranges its states otherwise and cannot be traced"
                )
        heads = {name: _join(parts) for name, parts in self.heads.items()}
        weights, config = identity(self.model)
        header = {
            "format": FORMAT,
            "model": self.model.config._name_or_path or type(self.model).__name__,
            "config": config,
            "fingerprint": weights,
            "tokenizer": None if tokenizer is None else digest(tokenizer.get_vocab(), 16),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "depth": self.model.config.get_text_config().num_hidden_layers,
            "attention": self.settings,
        }
        made = []
        for row, valid in enumerate(self.valid):
            tensors = {name: columns[row, valid] for name, columns in whole.items()}
            tensors |= self._head_outputs(row, valid, heads)
            for reducer in self.live[row]:
                tensors |= {f"reduced.{name}": result for name, result in reducer.result().items()}
            stats = statistics(self.model, tensors["ids"], tensors["final"])
            tensors |= dict(zip(("logprob", "entropy", "lse"), stats))
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            text, starts = "", None
            if tokenizer is not None:
                text, tensors["offsets"] = text_offsets(tokenizer, tensors["ids"].tolist())
                starts = tensors["offsets"][:, 0].contiguous()
            # what one forward was given and nothing followed is not known to be a prompt
            prompt = int(valid[: self.prompt].sum()) if self.prompt < len(valid) else 0
            made.append((tensors, header | {"text": text, "spans": find_spans(text, starts, int(valid.sum()), prompt)}))
        return made

    def _head_outputs(self, row: int, valid: Tensor, heads: dict[int, Tensor]) -> dict[str, Tensor]:
        if not heads:
            return {}
        columns = torch.cat(self.wanted)
        order = valid.cumsum(0)[columns] - 1
        mine = valid[columns] & torch.isin(order, self.positions.to(valid.device))
        split = {
            f"heads.{layer}": outputs[row, mine].unflatten(-1, (-1, head_mixer(self.model, layer)[1]))
            for layer, outputs in heads.items()
        }
        return {"positions": order[mine], **split}


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (n, vocab) in float32 from final hidden states (n, width), scaled and capped as the config says."""
    config = model.config.get_text_config()
    with torch.no_grad():
        logits = output_head(model)(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma
    return logits if cap is None else torch.tanh(logits / cap) * cap


def statistics(model: PreTrainedModel, ids: Tensor, final: Tensor) -> Tensor:
    """(3, T): log-probability of each token, entropy and log-sum-exp of its distribution. Column 0 is nan."""
    out = torch.full((3, len(ids)), torch.nan, device=final.device)
    rows = max(1, LOGITS // model.config.get_text_config().vocab_size)
    for start in range(0, len(ids) - 1, rows):
        stop = min(start + rows, len(ids) - 1)
        logits = head_logits(model, final[start:stop])
        lse = logits.logsumexp(-1)
        logprobs = logits.sub_(lse[:, None])
        drawn = ids[start + 1 : stop + 1, None]
        out[0, start + 1 : stop + 1] = logprobs.gather(1, drawn).squeeze(1)
        out[1, start + 1 : stop + 1] = torch.special.entr(logprobs.exp()).sum(-1)
        out[2, start + 1 : stop + 1] = lse
    return out


def identity(model: PreTrainedModel) -> list[str]:
    """[hash of a sample of the weights, hash of the config without what a copy may change]."""
    config = model.config.to_dict()
    written = {"architectures", "dtype", "transformers_version"}  # what save_pretrained changes
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in written}
    return [fingerprint(model), digest(kept, 16)]


def _maps(call: AttentionCall, rows: slice) -> Tensor:
    """Attention of chosen rows (batch, heads, rows, keys), without the keys behind the last of them if it is causal."""
    if call.mask is not None:
        return call.rows(rows)
    new, keys = call.query.shape[2], call.key.shape[2]
    behind = max(0, new - rows.stop)
    return replace(call, query=call.query[:, :, rows], key=call.key[:, :, : keys - behind]).rows()


def _picked(block: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Where `kept` (n,) is true along a dimension; the same tensor where all of it is."""
    return block if bool(kept.all()) else block.index_select(dim, kept.nonzero().squeeze(1))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _window(config: PreTrainedConfig, layer: int) -> int | None:
    """How many tokens a layer sees, itself included; None for all."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] == "full_attention":
        return None
    if types is not None and types[layer] != "sliding_attention":
        raise InputError(f"layer {layer} has {types[layer]}, whose maps cannot be rebuilt; leave it out of qk")
    return getattr(config, "sliding_window", None)
