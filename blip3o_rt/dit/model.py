"""The SANA diffusion transformer (arXiv 2410.10629), token-major, its loop invariants computed ahead.

Three calls, from rare to frequent: `schedule_tables` once per number of steps, `condition` once per image,
`predict_each` once per step of the images that share it. They share its products and nothing else: every
other op is called for each image as for the image alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_rt import ops, trace
from blip3o_rt.config import DiTConfig
from blip3o_rt.dit.conditioning import Condition, ConditionTokens, ConstantNull, WeightedNull
from blip3o_rt.dit.layout import TIMESTEP_FEATURES
from blip3o_rt.dit.schedule import Schedule
from blip3o_rt.dit.workspace import Activations, Area, Workspace
from blip3o_rt.errors import ParameterError
from blip3o_rt.ops.layer import Linear
from blip3o_rt.weights import hoisted

QK_NORM_EPS = 1e-5
CAPTION_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


@dataclass(frozen=True)
class StepModulation:
    """What one step's timestep does to the activations, fp32: blocks [layers, 6, D], final [2, D]."""

    blocks: Tensor
    final: Tensor


@dataclass(frozen=True)
class ScheduleTables:
    """A schedule and the AdaLN modulation of its steps, fp32, stored as two addends.

    Per step: blocks [steps, 6, D] and final [steps, D]. Per layer, the same at every step: block_tables
    [layers, 6, D] and final_table [2, D].
    """

    schedule: Schedule
    blocks: Tensor
    final: Tensor
    block_tables: Tensor
    final_table: Tensor

    def step(self, index: int) -> StepModulation:
        """The modulation of one step."""
        return StepModulation(self.blocks[index] + self.block_tables, self.final[index] + self.final_table)

    def at(self, index: Tensor) -> StepModulation:
        """The modulation of the step that index, int64 [1] on the device of the tables, says at run time."""
        blocks = self.blocks.index_select(0, index) + self.block_tables
        return StepModulation(blocks, self.final.index_select(0, index) + self.final_table)


@dataclass(frozen=True)
class StepInput:
    """What an image brings to a step.

    Attributes:
        latent: [1, in_channels, H, W]; H and W are any multiples of the patch size.
        modulation: Of the step that the image is at.
        condition: Without an unconditional branch, the conditional one is predicted alone.
    """

    latent: Tensor
    modulation: StepModulation
    condition: Condition


@dataclass
class _Image:
    """An image between the first and the last projection.

    Attributes:
        x: [branches, N, D]; one branch till they part at the first cross-attention, as both see one latent.
        grid: Rows and columns of its N tokens.
    """

    x: Tensor
    grid: tuple[int, int]
    modulation: StepModulation
    condition: Condition

    @property
    def branches(self) -> int:
        return 1 if self.condition.null is None else 2


class DiT:
    """Noise prediction, both branches of classifier-free guidance at once.

    `weights` are the runtime tensors of part "dit", all of one dtype (fp32, bf16; float64 for tests) and on
    one device; matrices may be bf16 beside fp32. Activations have the dtype of the others; norms, attention,
    time embedding and the first and last projection are computed in fp32.
    """

    def __init__(self, config: DiTConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.dtype = weights["proj_out.bias"].dtype
        self.device = weights["proj_out.weight"].device
        self.compute_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.blocks = [_Block(config, weights, f"transformer_blocks.{i}.") for i in range(config.num_layers)]
        self.block_tables = hoisted(
            weights, lambda: torch.stack([block.table for block in self.blocks]).to(self.compute_dtype)
        )
        self.final_table = self._upcast("scale_shift_table")
        self.patch_embed = self._upcast("patch_embed.proj.weight"), self._upcast("patch_embed.proj.bias")
        self.proj_out = self._upcast("proj_out.weight"), self._upcast("proj_out.bias")

    @property
    def batch_invariant(self) -> bool:
        """Whether the products in use take the rows of several images at once, each with its bits alone."""
        row = torch.empty(1, self.config.width, dtype=self.dtype, device=self.device)
        return self.blocks[0].self_attention.to_qkv.batch_invariant(row, row.new_empty(1, 3 * row.shape[1]))

    @trace.spanned("dit.tables")
    def schedule_tables(self, schedule: Schedule) -> ScheduleTables:
        """Time embedding and modulation of every step."""
        return self.tables(Schedule(schedule.sigmas.to(self.device), schedule.timesteps.to(self.device)))

    def tables(self, schedule: Schedule) -> ScheduleTables:
        """Those of a schedule that is on the model's device already: work that a graph can hold."""
        timesteps = schedule.timesteps * self.config.timestep_scale
        features = timestep_features(timesteps).to(self.compute_dtype)
        hidden = F.silu(F.linear(features, *self._upcast_linear("time_embed.emb.timestep_embedder.linear_1")))
        embedding = F.linear(hidden, *self._upcast_linear("time_embed.emb.timestep_embedder.linear_2"))
        modulation = F.linear(F.silu(embedding), *self._upcast_linear("time_embed.linear"))
        return ScheduleTables(
            schedule, modulation.view(schedule.steps, 6, -1), embedding, self.block_tables, self.final_table
        )

    @trace.spanned("dit.condition")
    def condition(self, tokens: ConditionTokens, *, out: Condition | None = None) -> Condition:
        """Caption projection and norm, and the cross-attention keys and values of all layers.

        `out` is an earlier result for as many tokens and the same counts, to be overwritten. Raises
        ParameterError where the null tokens and their counts do not agree.
        """
        counts = tokens.null_counts
        if len(counts) != len(tokens.null) or min(counts, default=0) < 1:
            raise ParameterError(
                f"each of {len(tokens.null)} distinct null tokens needs a count of at least 1, got {counts}"
            )
        if out is None:
            out = self._empty_condition(len(tokens.conditional), counts)
        self._keys_values(tokens.conditional, out.keys, out.values)
        if isinstance(out.null, ConstantNull):
            captions = self._captions(tokens.null)
            for block, output in zip(self.blocks, out.null.outputs, strict=True):
                output.copy_(block.cross_attention.constant(captions)[0])
        elif out.null is not None:
            self._keys_values(tokens.null, out.null.keys, out.null.values)
        return out

    def predict(self, latent: Tensor, modulation: StepModulation, condition: Condition) -> Tensor:
        """`predict_each` of one image."""
        return self.predict_each([StepInput(latent, modulation, condition)])[0]

    def predict_each(self, inputs: Sequence[StepInput]) -> list[Tensor]:
        """The noise predictions of images, each bit for bit that of the image alone.

        Args:
            inputs: Images of any sizes and conditions, each at a step of its own.

        Returns:
            Of each image fp32 [2, out_channels, H, W], unconditional first; of a condition without an
            unconditional branch [1, out_channels, H, W].

        Raises:
            ParameterError: A latent of another shape.
        """
        images = [self._image(given) for given in inputs]
        workspace = self._workspace(sum(image.branches * image.x.shape[1] for image in images))
        normed = workspace.take(Area.NARROW, [image.x for image in images], self.config.width)
        outs = normed.images
        for image, out in zip(images, outs, strict=True):
            shift, scale = image.modulation.blocks[0, :2]
            ops.layer_norm_modulate(image.x, shift, scale, self.config.norm_eps, out=out)
        for layer, block in enumerate(self.blocks):
            found = block(images, layer, normed, workspace)
            last, eps = layer + 1 == len(self.blocks), self.config.norm_eps
            if last:
                outs = [x.new_empty(x.shape, dtype=self.compute_dtype) for x in found.images]
                eps = FINAL_NORM_EPS
            else:
                normed = workspace.take(Area.NARROW, found.images, self.config.width)
                outs = normed.images
            for image, added, out in zip(images, found.images, outs, strict=True):
                steps = image.modulation
                shift, scale = steps.final if last else steps.blocks[layer + 1, :2]
                gate = steps.blocks[layer, 5]
                ops.add_layer_norm_modulate(image.x, added, shift, scale, eps, gate=gate, out=out)
        return [self._prediction(image, out) for image, out in zip(images, outs, strict=True)]

    def _image(self, given: StepInput) -> _Image:
        channels, patch = self.config.in_channels, self.config.patch_size
        batch, found, height, width = given.latent.shape
        if batch != 1 or found != channels or height % patch or width % patch:
            raise ParameterError(
                f"the DiT takes a latent [1, {channels}, H, W] with sides that are multiples of {patch}, "
                f"got {list(given.latent.shape)}"
            )
        height, width = height // patch, width // patch
        patches = given.latent.to(self.compute_dtype).view(1, -1, height, patch, width, patch)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width, -1)
        x = F.linear(patches, *self.patch_embed).to(self.dtype)
        return _Image(x, (height, width), given.modulation, given.condition)

    def _prediction(self, image: _Image, normed: Tensor) -> Tensor:
        (height, width), patch = image.grid, self.config.patch_size
        patches = F.linear(normed, *self.proj_out)
        patches = patches.view(len(normed), height, width, patch, patch, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(normed), -1, height * patch, width * patch)

    def _workspace(self, tokens: int) -> Workspace:
        sizes = {area: tokens * width for area, width in area_widths(self.config).items()}
        return Workspace(self.dtype, self.device, sizes)

    def _upcast(self, name: str) -> Tensor:
        return hoisted(self.weights, lambda: self.weights[name].to(self.compute_dtype))

    def _upcast_linear(self, name: str) -> tuple[Tensor, Tensor]:
        dtype = self.compute_dtype
        return self.weights[f"{name}.weight"].to(dtype), self.weights[f"{name}.bias"].to(dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return ops.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _captions(self, tokens: Tensor) -> Tensor:
        hidden = self._linear("caption_projection.linear_1", tokens.to(self.dtype))
        hidden = self._linear("caption_projection.linear_2", F.gelu(hidden, approximate="tanh"))
        return ops.rms_norm(hidden, self.weights["caption_norm.weight"], CAPTION_NORM_EPS)

    def _empty_condition(self, tokens: int, null_counts: tuple[int, ...]) -> Condition:
        config = self.config

        def empty(*shape: int) -> Tensor:
            return torch.empty(config.num_layers, *shape, dtype=self.dtype, device=self.device)

        def heads(tokens: int) -> tuple[Tensor, Tensor]:
            shape = (config.num_cross_heads, tokens, config.cross_head_dim)
            return empty(*shape), empty(*shape)

        if len(null_counts) == 1:
            return Condition(*heads(tokens), ConstantNull(empty(config.width)))
        log_multiplicity = torch.tensor(null_counts, dtype=self.compute_dtype, device=self.device).log()
        return Condition(*heads(tokens), WeightedNull(*heads(len(null_counts)), log_multiplicity))

    def _keys_values(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        captions = self._captions(tokens)
        for layer, block in enumerate(self.blocks):
            key, value = block.cross_attention.keys_values(captions)
            keys[layer], values[layer] = key, value


def area_widths(config: DiTConfig) -> dict[Area, int]:
    """Elements of a token in each area of a step's workspace."""
    width, expanded = config.width, config.mlp_hidden
    return {
        Area.WIDE: max(3 * width, 2 * expanded),
        Area.MIDDLE: max(config.cross_width, width, expanded),
        Area.NARROW: max(config.cross_width, width),
    }


def timestep_features(timesteps: Tensor) -> Tensor:
    """[steps] -> [steps, 256] fp32: cosines, then sines, at frequencies 10000^(-i / 128).

    In fp32 as the published code computes it: at t = 1000 the rounding of the angle shows, and the model was
    trained with it.
    """
    half = TIMESTEP_FEATURES // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * exponents.exp()[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class _Block:
    """One transformer block: linear self-attention, cross-attention, convolutional feed-forward."""

    def __init__(self, config: DiTConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.norm_eps = config.norm_eps
        self.table = weights[prefix + "scale_shift_table"]
        self.self_attention = _SelfAttention(config, weights, prefix + "attn1.")
        self.cross_attention = _CrossAttention(config, weights, prefix + "attn2.")
        self.feed_forward = _FeedForward(weights, prefix + "ff.")

    def __call__(
        self, images: Sequence[_Image], layer: int, normed: Activations, workspace: Workspace
    ) -> Activations:
        """Move every image's x by both attentions, in place but where its branches part.

        Args:
            normed: Every x, normed and modulated for the self-attention.

        Returns:
            What the feed-forward found, which is still to be added to x.
        """
        self.self_attention(images, layer, normed, workspace)
        for image in images:
            if len(image.x) < image.branches:  # which part here, each with an x of its own
                image.x = image.x.repeat(image.branches, 1, 1)
        attended = self.cross_attention(images, layer, workspace)
        xs = [image.x for image in images]
        normed = workspace.take(Area.NARROW, xs, xs[0].shape[-1])
        for image, added, out in zip(images, attended.images, normed.images, strict=True):
            shift, scale = image.modulation.blocks[layer, 3:5]
            null = image.condition.null
            constant = null.outputs[layer] if isinstance(null, ConstantNull) else None
            ops.add_layer_norm_modulate(
                image.x, added, shift, scale, self.norm_eps, constant=constant, out=out
            )
        return self.feed_forward(normed, images, workspace)


class _SelfAttention:
    """ReLU linear attention among the image tokens."""

    def __init__(self, config: DiTConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.num_heads = config.num_heads
        self.to_qkv = Linear.of(weights, prefix + "to_qkv")
        self.to_out = Linear.of(weights, prefix + "to_out.0")
        self.q_norm = weights.get(prefix + "norm_q.weight")
        self.k_norm = weights.get(prefix + "norm_k.weight")

    def __call__(
        self, images: Sequence[_Image], layer: int, normed: Activations, workspace: Workspace
    ) -> None:
        """Add to every x, through its gate, what it attends to."""
        width = normed.rows.shape[1]
        qkv = normed.product(self.to_qkv, workspace.take(Area.WIDE, normed.images, 3 * width))
        attended = workspace.take(Area.MIDDLE, normed.images, width)
        for q_k_v, out in zip(qkv.images, attended.images, strict=True):
            ops.relu_linear_attention(q_k_v, self.q_norm, self.k_norm, self.num_heads, QK_NORM_EPS, out=out)
        products = workspace.take(Area.NARROW, normed.images, width)
        gates = [image.modulation.blocks[layer, 2] for image in images]
        if len(images) > 1 and self.to_out.batch_invariant(attended.rows, products.rows):
            attended.product(self.to_out, products)
            for image, product, gate in zip(images, products.images, gates, strict=True):
                ops.gated_add(image.x, product, gate)
            return
        for image, found, product, gate in zip(images, attended.images, products.images, gates, strict=True):
            self.to_out.gated_add(found, image.x, gate, product=product)


class _CrossAttention:
    """Softmax attention of the image tokens to the condition."""

    def __init__(self, config: DiTConfig, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.num_heads = config.num_cross_heads
        self.to_q = Linear.of(weights, prefix + "to_q")
        self.to_kv = Linear.of(weights, prefix + "to_kv")
        self.to_out = Linear.of(weights, prefix + "to_out.0")
        self.q_norm = weights.get(prefix + "norm_q.weight")
        self.k_norm = weights.get(prefix + "norm_k.weight")

    def keys_values(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """[M, D] -> keys (normed) and values, both [H, M, d]."""
        key, value = self.to_kv(captions).chunk(2, dim=-1)
        if self.k_norm is not None:
            key = ops.rms_norm(key.contiguous(), self.k_norm, QK_NORM_EPS)
        split = (t.unflatten(-1, (self.num_heads, -1)).transpose(0, 1) for t in (key, value))
        return next(split), next(split)

    def constant(self, caption: Tensor) -> Tensor:
        """[1, D]: the result for any query where all tokens are this one; softmax weights sum to one."""
        _, value = self.to_kv(caption).chunk(2, dim=-1)
        return self.to_out(value)

    def __call__(self, images: Sequence[_Image], layer: int, workspace: Workspace) -> Activations:
        """What the x [branches, N, D] of every image attend to.

        x[0] attends to the unconditional tokens, and x[-1] to the condition. Where the unconditional tokens
        are all alike, what x[0] would find is known, and left out.
        """
        xs = [image.x if isinstance(image.condition.null, WeightedNull) else image.x[-1:] for image in images]
        width = len(self.to_q.weight)
        asking = workspace.joined(Area.MIDDLE, xs)
        query = asking.product(self.to_q, workspace.take(Area.NARROW, xs, width))
        attended = workspace.take(Area.MIDDLE, xs, width)
        attend = partial(ops.cross_attention, query_weight=self.q_norm, eps=QK_NORM_EPS)
        for image, q, out in zip(images, query.images, attended.images, strict=True):
            condition, null = image.condition, image.condition.null
            attend(q[-1], condition.keys[layer], condition.values[layer], out=out[-1])
            if isinstance(null, WeightedNull):
                logs = null.log_multiplicity
                attend(q[0], null.keys[layer], null.values[layer], log_multiplicity=logs, out=out[0])
        return attended.product(self.to_out, workspace.take(Area.WIDE, xs, xs[0].shape[-1]))


class _FeedForward:
    """1x1 convolution, depthwise 3x3 gate, 1x1 convolution; the 1x1 ones are matrix products over tokens."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self.inverted = Linear.of(weights, prefix + "conv_inverted", bias=False)
        self.inverted_bias = weights[prefix + "conv_inverted.bias"]
        self.depth = weights[prefix + "conv_depth.weight"], weights[prefix + "conv_depth.bias"]
        self.point = Linear.of(weights, prefix + "conv_point")

    def __call__(self, x: Activations, images: Sequence[_Image], workspace: Workspace) -> Activations:
        expanded = len(self.inverted_bias)
        hidden = x.product(self.inverted, workspace.take(Area.WIDE, x.images, expanded))
        gated = workspace.take(Area.MIDDLE, x.images, expanded // 2)
        for image, values, out in zip(images, hidden.images, gated.images, strict=True):
            pixels, gated_pixels = values.unflatten(1, image.grid), out.unflatten(1, image.grid)
            ops.depthwise_glu(pixels, self.inverted_bias, *self.depth, out=gated_pixels)
        return gated.product(self.point, workspace.take(Area.NARROW, x.images, x.rows.shape[1]))
