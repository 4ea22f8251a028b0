"""A transformer over Ragged ids: padding, chunks and precision live here and nowhere else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.batch import Ragged
from distill.errors import RecipeError
from distill.hub.checkpoint import position_limit
from distill.nn.attention import (
    InPlace,
    by_place,
    can_listen,
    listening,
    side_by_side,
    use_attention,
)
from distill.nn.cpu_serving import serving_copy
from distill.nn.cpu_streams import in_streams, learn_in_streams, stream_count
from distill.nn.cpu_training import prepare_for_cpu
from distill.nn.packed import Packing, first_position, takes_packed
from distill.nn.precision import native_bf16
from distill.nn.tokenizer import TextTokenizer

CHUNK_TOKENS = 2048  # of a chunk on a CPU: its activations stay near the core

NOT_ITS_ANSWERS = ("dtype", "torch_dtype", "transformers_version")  # of a configuration

# (output of the transformer for a chunk, mask [n, T]) -> [n, ...], or of each token -> [n, T, ...]
Head = Callable[[Any, Tensor], Tensor]


def check_sizes(**sizes: int | None) -> None:
    """Refuse lengths and dimensions that are given and below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")


class TextEncoder(nn.Module):
    """Runs a ``transformers`` model over texts of all lengths without wasting work on padding.

    Texts are sorted by length and cut into chunks of about ``chunk_tokens`` padded ids, so that a chunk
    holds texts of nearly one length; the results come back in the order of the texts. With gradient, the
    word embeddings of all chunks are looked up at once (one dense gradient of the table per step, not one
    per chunk); on a CPU, a transformer that can learns from texts without any padding (``packed.py``).
    Without gradient and on a device with native bf16, a bf16 copy of the weights answers, made again when
    the weights change.

    Args:
        backbone: A ``PreTrainedModel``.
        tokenizer: Its tokenizer.
        chunk_tokens: Padded ids per chunk; None chooses 2,048 on a CPU, 65,536 on a GPU.
    """

    def __init__(self, backbone: nn.Module, tokenizer: TextTokenizer, chunk_tokens: int | None = None):
        super().__init__()
        use_attention(backbone)
        prepare_for_cpu(backbone)
        self.backbone: Any = backbone
        self.tokenizer = tokenizer
        self.chunk_tokens = chunk_tokens
        self._half: tuple[tuple[int, ...], nn.Module] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its answers besides the weights: tokenizer, and settings of the architecture."""
        settings = json.loads(self.backbone.config.to_json_string(use_diff=False))
        kept = {k: v for k, v in settings.items() if k not in NOT_ITS_ANSWERS and "dropout" not in k}
        kept = {key: value for key, value in kept.items() if not key.startswith("_")}
        return {"tokenizer": self.tokenizer.fingerprint, "config": kept}

    def check_length(self, name: str, length: int, markers: int = 0) -> None:
        """Refuse more ids than the transformer has positions, or none beside the special ones and markers."""
        least = self.tokenizer.specials + markers + 1
        most = position_limit(self.backbone.config.to_dict())
        if length < least or (most is not None and length > most):
            allowed = f"at least {least}" if most is None else f"between {least} and {most}"
            raise ValueError(
                f"{name} must be {allowed} ids for this checkpoint, special ones included; got {length}."
            )

    @property
    def attention_sizes(self) -> dict[str, int]:
        """How many ``layers``, and ``heads`` in each, can be listened to; empty: none."""
        config = self.backbone.config
        if not can_listen(self.backbone):
            return {}
        return {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}

    def no_attention(self, layers: Sequence[int]) -> Tensor:
        """The attention of no token: [0, l, 2, H, d]."""
        config, device = self.backbone.config, next(self.backbone.parameters()).device
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        dtype = self.backbone.dtype  # as of queries and keys: processes put their parts together
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return torch.zeros(0, len(layers), 2, heads, size, device=device, dtype=dtype)

    def check_whole_maps(self, layers: Sequence[int], longest: int) -> None:
        """Refuse layers in which a token does not see all others: queries and keys do not say their maps.

        Raises:
            RecipeError: The transformer reads from left to right, or a layer sees less than ``longest`` ids.
        """
        config = self.backbone.config
        if any(getattr(module, "is_causal", False) for module in self.backbone.modules()):
            raise RecipeError(
                f"{type(self.backbone).__name__} reads from left to right, so no token of the query attends "
                f"to the candidate behind it: its attention cannot teach."
            )
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        if kinds is None or window is None or longest <= window + 1:
            return
        local = [layer for layer in layers if kinds[layer] == "sliding_attention"]
        if local:
            whole = [place for place, kind in enumerate(kinds) if kind != "sliding_attention"]
            raise RecipeError(
                f"layer {local[0]} of {type(self.backbone).__name__} attends to the {window} nearest ids on "
                f"each side alone, and a pair here has {longest}. Teach by layers that see all ({whole}), or "
                f"lower the teacher's max_length to {window + 1}."
            )

    def forward(self, ids: Ragged, types: Ragged | None, head: Head) -> Tensor:
        """What ``head`` makes of each text: [n, ...] float32.

        Args:
            ids: Framed ids, n > 0 texts of at least one id each.
            types: Segments, aligned with ids; None where the model has none.
            head: From the transformer's output for a chunk of m texts, and its mask [m, T], to [m, ...].
        """
        return self.read(ids, types, rows={"said": head})["said"]

    def read(
        self,
        ids: Ragged,
        types: Ragged | None = None,
        rows: Mapping[str, Head] | None = None,
        tokens: Mapping[str, Head] | None = None,
        layers: Sequence[int] = (),
        attended: Tensor | None = None,
        hidden: bool = False,
    ) -> dict[str, Tensor]:
        """Several answers from one forward, by name.

        Args:
            ids: Framed ids, n > 0 texts of at least one id each, T in all.
            types: Segments, aligned with ids; None where the model has none.
            rows: Heads that answer for a text: [n, ...] float32.
            tokens: Heads that answer for each token: [T, ...] float32, aligned with ids.
            layers: Whose queries and keys are answered as ``attention``: [T, l, 2, H, d], aligned with ids.
            attended: How many ids of each text, from the first, are attended to [n]; None: all.
            hidden: Heads find all layers in ``hidden_states``; of a classifier, the last one only there.
        """
        device = next(self.backbone.parameters()).device
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        training = (learning or self.training) and device.type == "cpu"
        if training and not (hidden or attended is not None) and takes_packed(self.backbone):
            return self._packed(ids, types, rows or {}, tokens or {}, layers)
        chunks = self.cut(ids.lengths, self.chunk_tokens or (CHUNK_TOKENS if device.type == "cpu" else 65536))
        backbone = self.backbone if learning or self.training else self._serving(device)
        embedded = self._embedded(ids.to(device)) if learning else None
        tokens_of = Ragged(torch.arange(len(ids.values), device=ids.offsets.device), ids.offsets)
        placed = InPlace(len(ids.values), len(layers)) if layers and not torch.is_grad_enabled() else None

        def answer(chunk: tuple[Tensor, int]) -> dict[str, Any]:
            given, mask = self._given(ids, types, chunk, embedded, attended)
            if hidden:
                given["output_hidden_states"] = True
            said: dict[str, Any] = {}
            if not layers:
                output = backbone(**given)
            elif placed is not None:
                to = placed.rows_of(mask, tokens_of.select(chunk[0]).values.to(device))
                with listening(backbone, layers, partial(placed.put, to=to)):
                    output = backbone(**given)
            else:
                with listening(backbone, layers) as heard:
                    output = backbone(**given)
                said["attention"] = side_by_side(heard, mask.flatten().nonzero()[:, 0])
            with torch.autocast(mask.device.type, enabled=False):
                said |= {name: head(output, mask).float() for name, head in (rows or {}).items()}
                said |= {name: head(output, mask)[mask].float() for name, head in (tokens or {}).items()}
            return said

        if device.type == "cpu" and not torch.is_grad_enabled() and not self.training:
            parts = in_streams(answer, chunks)
        else:
            parts = [answer(chunk) for chunk in chunks]
        order = torch.cat([rows for rows, _ in chunks])
        back = {name: order.argsort().to(device) for name in rows or {}}
        if layers or tokens:
            by_text = tokens_of.select(order).values.argsort().to(device)
            back |= {name: by_text for name in (*(tokens or {}), *(["attention"] if layers else []))}
        found = {} if placed is None else {"attention": placed.said()}
        return found | {
            name: torch.cat([p[name] for p in parts]).index_select(0, at)
            for name, at in back.items()
            if name not in found
        }

    def _packed(
        self,
        ids: Ragged,
        types: Ragged | None,
        of_texts: Mapping[str, Head],
        of_tokens: Mapping[str, Head],
        layers: Sequence[int],
    ) -> dict[str, Tensor]:
        """``read`` while learning on a CPU: texts end to end, in chunks of equal work."""
        backbone = self.backbone
        order = torch.argsort(ids.lengths, stable=True, descending=True)
        chunks = min(chunk_count(len(ids.values), self.chunk_tokens or CHUNK_TOKENS), len(ids))
        rows = [order[place::chunks] for place in range(chunks)]  # each has long and short ones
        packings = [Packing(ids.lengths[chosen]) for chosen in rows]
        self._half = None  # the weights are about to change; a fused optimiser does not mark them
        shuffled = Ragged.stack([ids.select(chosen) for chosen in rows]).values.long()
        words = backbone.get_input_embeddings()(shuffled)  # of all chunks: one gradient of the table
        first = first_position(backbone)

        def run(chunk: int, words: Tensor) -> Tensor:
            packing = packings[chunk]
            positions = packing.rounded(packing.positions + first)
            given = {"inputs_embeds": packing.rounded(words)[None], "position_ids": positions[None]}
            if types is not None:
                given["token_type_ids"] = packing.rounded(types.select(rows[chunk]).values.long())[None]
            if not layers:
                return backbone(**given, packing=packing).last_hidden_state[0]
            with listening(backbone, layers) as heard:
                output = backbone(**given, packing=packing).last_hidden_state[0]
            return torch.cat([output, *(x.flatten(1) for one in heard for x in by_place(one))], dim=1)

        sizes = [int(packing.lengths.sum()) for packing in packings]
        said = learn_in_streams(run, words.split(sizes), backbone)
        parts: dict[str, list[Tensor]] = {name: [] for name in (*of_texts, *of_tokens)}
        size = words.shape[-1]
        with torch.autocast("cpu", enabled=False):
            for packing, packed in zip(packings, said, strict=True):
                for bucket, padded in zip(packing.buckets, packing.padded(packed[:, :size]), strict=True):
                    for name, head in of_texts.items():
                        parts[name].append(head(Hidden(padded), bucket.mask).float())
                    for name, head in of_tokens.items():
                        parts[name].append(head(Hidden(padded), bucket.mask)[bucket.mask].float())
        order = torch.cat(rows)
        back = {name: order.argsort() for name in of_texts}
        if layers or of_tokens:
            tokens = Ragged(torch.arange(len(ids.values)), ids.offsets).select(order).values.argsort()
            back |= {name: tokens for name in of_tokens}
        found = {name: torch.cat(part).index_select(0, back[name]) for name, part in parts.items()}
        if layers:
            none = self.no_attention(layers)
            heard = torch.cat([packed[:n, size:] for packed, n in zip(said, sizes, strict=True)])
            found["attention"] = heard.index_select(0, tokens).view(-1, *none.shape[1:]).to(none.dtype)
        return found

    def _embedded(self, ids: Ragged) -> Tensor:
        """The word embeddings of all ids, and a last row of zeros, which pads."""
        self._half = None  # the weights are about to change; a fused optimiser does not mark them
        words = self.backbone.get_input_embeddings()(ids.values)
        return torch.cat([words, words.new_zeros(1, words.shape[-1])])

    def _given(
        self,
        ids: Ragged,
        types: Ragged | None,
        chunk: tuple[Tensor, int],
        embedded: Tensor | None,
        attended: Tensor | None,
    ) -> tuple[dict[str, Any], Tensor]:
        """What the transformer is given of the texts of a chunk, and which of it are real ids: [m, T]."""
        rows, length = chunk
        device = next(self.backbone.parameters()).device
        padded, mask = ids.select(rows).to(device).padded(self.tokenizer.pad_id, length)
        seen = mask
        if attended is not None:
            seen = torch.arange(length, device=device) < attended[rows].to(device)[:, None]
        given: dict[str, Any] = {"attention_mask": seen.long()}
        if embedded is None:
            given["input_ids"] = padded.long()
        else:
            places = Ragged(torch.arange(len(ids.values), device=ids.values.device), ids.offsets)
            given["inputs_embeds"] = embedded[
                places.select(rows).to(device).padded(len(ids.values), length)[0]
            ]
        if types is not None:
            given["token_type_ids"] = types.select(rows).to(device).padded(0, length)[0].long()
        return given, mask

    def cut(self, lengths: Tensor, budget: int) -> list[tuple[Tensor, int]]:
        """Rows of each chunk, longest texts first, and the length they are padded to.

        Lengths are rounded up to a multiple of 8 and every chunk of one length has as many rows, so that few
        shapes occur: kernels are made once per shape, and memory fits when it is used again.
        """
        order = torch.argsort(lengths, stable=True, descending=True)
        ordered = lengths[order].tolist()
        most = position_limit(self.backbone.config.to_dict())
        chunks, start = [], 0
        while start < len(ordered):
            length = max(-(-ordered[start] // 8) * 8, 8)
            if most is not None:
                length = max(min(length, most), ordered[start])
            end = min(start + max(1, budget // length), len(ordered))
            chunks.append((order[start:end], length))
            start = end
        return chunks

    def _serving(self, device: torch.device) -> nn.Module:
        """The weights to answer with when nothing is learnt: a bf16 copy where that is faster."""
        parameters = list(self.backbone.parameters())
        if parameters[0].dtype != torch.float32 or not torch.is_autocast_enabled(device.type):
            return self.backbone
        if torch.get_autocast_dtype(device.type) != torch.bfloat16 or not native_bf16(device):
            return self.backbone
        state = tuple(p._version for p in parameters) + (parameters[0].data_ptr(),)
        if self._half is None or self._half[0] != state:
            self._half = (state, serving_copy(self.backbone, self.chunk_tokens or CHUNK_TOKENS))
        return self._half[1]


@dataclass(frozen=True)
class Hidden:
    """What a transformer says of padded texts, as a head reads it."""

    last_hidden_state: Tensor  # [n, T, D]


def chunk_count(ids: int, budget: int) -> int:
    """Into how many equal chunks so many ids go: about ``budget`` each, and as many for each stream."""
    chunks, most = round(ids / budget), max(1, 2 * ids // budget)
    streams = stream_count(most)
    return max(1, min(-(-max(chunks, 1) // streams) * streams, most))


def keep_layers(backbone: Any, layers: int | Sequence[int]) -> None:
    """Keep the first n, or the listed, layers of a transformer, in place; -1 is the last."""
    config = backbone.config
    total = config.num_hidden_layers
    listed = range(layers) if isinstance(layers, int) else layers
    wanted = [i + total if -total <= i < 0 else i for i in listed]
    if not wanted or min(wanted) < 0 or max(wanted) >= total or len({*wanted}) < len(wanted):
        raise RecipeError(
            f"layers: {layers} cannot be kept, the checkpoint has {total} layers (0 to {total - 1})."
        )
    stacks = [
        (parent, name, child)
        for parent in backbone.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1:
        raise RecipeError(
            f"layers: cannot tell which modules of {type(backbone).__name__} are its {total} layers "
            f"({len(stacks)} lists have that length); leave `layers` out for this checkpoint."
        )
    parent, name, stack = stacks[0]
    kept = nn.ModuleList(stack[i] for i in wanted)
    for place, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its place in a cache
                module.layer_idx = place  # type: ignore[assignment]
    setattr(parent, name, kept)
    config.num_hidden_layers = len(wanted)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in wanted]
    with torch.device("meta"):
        new = type(backbone)(copy.deepcopy(config))
    if new.state_dict().keys() != backbone.state_dict().keys():
        raise RecipeError(
            f"layers: {layers} cannot be kept, the layers of {type(backbone).__name__} differ by their "
            f"place; begin with layer 0 and keep the order."
        )


def checkpoint_activations(backbone: Any) -> None:
    """Let a transformer compute its activations again in the backward, by the name its release has for it."""
    enable = (
        getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    )
    enable()


_WITHOUT_WEIGHTS: ContextVar[bool] = ContextVar("without_weights", default=False)


@contextmanager
def without_weights(so: bool = True) -> Iterator[None]:
    """Inside, transformers are made from their configuration alone, to check a graph before it is loaded; or,
    inside that again, with weights (``so=False``)."""
    token = _WITHOUT_WEIGHTS.set(so)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def load_backbone(auto_class: Any, checkpoint: str | Path, **arguments) -> Any:
    """A ``transformers`` model in float32, without its loading report; remote code is never run."""
    from transformers import AutoConfig
    from transformers.utils import logging

    if _WITHOUT_WEIGHTS.get():
        with torch.device("meta"):
            return auto_class.from_config(AutoConfig.from_pretrained(checkpoint, **arguments))
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True, **arguments)
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def in_slices(n: int, size: int, progress: bool, what: str) -> Iterator[slice]:
    """Slices of n rows, with a progress bar on a terminal when asked."""
    from tqdm import tqdm

    with tqdm(total=n, unit=what, disable=None if progress else True, leave=False) as bar:
        for start in range(0, n, size):
            yield slice(start, start + size)
            bar.update(min(size, n - start))


def dropout_arguments(checkpoint: str | Path, dropout: float | None) -> dict[str, float]:
    """The configuration's own names of its dropout probabilities, all set to one value; none for None."""
    if dropout is None:
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint).to_dict()
    return {name: dropout for name, value in config.items() if "dropout" in name and isinstance(value, float)}
