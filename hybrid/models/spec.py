"""ModelSpec: what a model is, as data. Families fill it from config.json; the planner and the packer read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Half, Mixer, NormKind, Place
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.products import norm_shapes, norm_tensors
from hybrid.models.rope import RopeSpec
from hybrid.models.streams import Streams
from hybrid.models.tensors import (
    ExpertForm,
    GatedNames,
    Shapes,
    Shard,
    Stacked,
    StoreTensor,
    bias_name,
    in_layer,
    inside,
)


@dataclass(frozen=True)
class LayerSpec:
    """A norm and a mixer, whose result is added to the residual stream; then the same with a feed-forward."""

    mixer: Mixer
    feed_forward: FeedForward

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.mixer, self.feed_forward


@dataclass(frozen=True)
class OuterNames:
    """Names in a checkpoint of what lies around the layers. final_norm: empty where the head reads no normed rows."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. eps, norm: of all norms, and their kind. tied: the output head is the embedding. head_bias:
    whether the logits have one. embedding_scale: of a token's embedding. logit_scale: of the logits. logit_cap: between
    which and less itself a tangent keeps them, after that; None: no bounds. module: that of another model which its
    layers are; "" if they are none. streams: those that the residual stream is made of, None where it is one.
    """

    model_type: str
    vocab: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    eps: float
    max_position: int
    tied: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    norm: NormKind = "rms"
    head_bias: bool = False
    module: str = ""
    names: OuterNames = field(default_factory=OuterNames)
    streams: Streams[Any] | None = None

    @cached_property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct ropes of all layers, each with one table a step."""
        return tuple(dict.fromkeys(half.rope for layer in self.layers for half in layer.halves if half.rope))

    @cached_property
    def length_limits(self) -> tuple[int, ...]:
        """Lengths above which a rope has other frequencies for all tokens of a sequence."""
        return tuple(sorted({rope.long_above for rope in self.ropes if rope.long_above}))

    def length_phase(self, length: int) -> int:
        """How many of `length_limits` a sequence has passed: its keys are others in every phase."""
        return sum(length > limit for limit in self.length_limits)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.feed_forward.is_moe)

    @property
    def top_k(self) -> int:
        """Largest number of experts per row in any layer; 0 without experts."""
        routers = (self.layers[index].feed_forward.router for index in self.moe_layers)
        return max((router.top_k for router in routers if router), default=0)

    def shares_head(self, mix: FormatMix) -> bool:
        """Whether one packed matrix serves as embedding and head: where they are tied and the head is bf16 too."""
        return self.tied and mix.head == "bf16"

    def head_weight(self, mix: FormatMix) -> str:
        """The name of the stored matrix that makes logits."""
        return "embedding" if self.shares_head(mix) else "head"

    def place(self, layer: int, mix: FormatMix) -> Place:
        streamed = self.streams is not None
        return Place(layer, self.hidden, self.eps, mix.of_layer(layer), self.ropes, self.norm, streamed)

    def places(self, mix: FormatMix) -> list[Place]:
        """Of all layers."""
        return [self.place(layer, mix) for layer in range(len(self.layers))]

    def halves(self, mix: FormatMix) -> Iterator[tuple[Place, Half]]:
        """The halves of all layers, in the order of a step."""
        for index, layer in enumerate(self.layers):
            place = self.place(index, mix)
            yield from ((place, half) for half in layer.halves)

    def store_tensors(self, mix: FormatMix) -> list[StoreTensor]:
        """Every tensor of the store, in store order: for the packer to write, the planner to count."""
        tensors = [*self._outer_tensors(mix)]
        for place, half in self.halves(mix):
            tensors += half.store_tensors(place, Shard(f"layer-{place.layer:05d}", f"layers.{place.layer}."))
        return tensors

    def expert_names(self) -> dict[int, GatedNames]:
        """Names of the experts in a checkpoint, by layer."""
        return {index: in_layer(self.layers[index].feed_forward.names.experts, index) for index in self.moe_layers}

    def checkpoint_shapes(self, form: ExpertForm | Mapping[int, ExpertForm] = "apart") -> Shapes:
        """Name and shape of every tensor that a checkpoint has, with all experts or those of each layer in this
        form.
        """
        yield self.names.embedding, (self.vocab, self.hidden)
        for place, half in self.halves(FormatMix.uniform("bf16")):
            of_layer = form if isinstance(form, str) else form.get(place.layer, "apart")
            yield from half.checkpoint_shapes(place, of_layer)
        if self.streams:
            yield from self.streams.checkpoint_shapes(self.places(FormatMix.uniform("bf16")))
        yield from norm_shapes(self.place(0, FormatMix.uniform("bf16")), self.names.final_norm)
        if not self.tied:
            yield self.names.head, (self.vocab, self.hidden)
        if self.head_bias:
            yield bias_name(self.names.head), (self.vocab,)

    def inside(self, module: str) -> ModelSpec:
        """A copy of a model that is a module of another: its layers are `model.module.x`, its head is as it was."""
        layers = tuple(
            LayerSpec(layer.mixer.inside(module), layer.feed_forward.inside(module)) for layer in self.layers
        )
        streams = self.streams and self.streams.inside(module)
        return replace(self, layers=layers, names=inside(self.names, module), module=module, streams=streams)

    def within(self, tokens: int) -> ModelSpec:
        """What computes the same where no sequence has more than so many tokens."""
        layers = tuple(replace(layer, mixer=layer.mixer.within(tokens)) for layer in self.layers)
        return replace(self, layers=layers)

    def with_fused_experts(self) -> ModelSpec:
        """A copy with the names of checkpoints with fused experts."""
        layers = tuple(replace(layer, feed_forward=layer.feed_forward.fused()) for layer in self.layers)
        return replace(self, layers=layers)

    def _outer_tensors(self, mix: FormatMix) -> Iterator[StoreTensor]:
        """A tied head of another format than the embedding is made from it."""
        shard, names = Shard("outer"), self.names
        embedding = Stacked((names.embedding,))
        yield shard.matrix("embedding", "embedding", embedding, "bf16", self.vocab, self.hidden)
        yield from norm_tensors(self.place(0, mix), shard, "final_norm", names.final_norm)
        if self.streams:
            yield from self.streams.store_tensors(self.places(mix))
        if not self.shares_head(mix):
            head = embedding if self.tied else Stacked((names.head,))
            yield shard.matrix("head", "head", head, mix.head, self.vocab, self.hidden)
        if self.head_bias:
            yield shard.bias(f"{self.head_weight(mix)}_bias", "head", (names.head,), self.vocab)
