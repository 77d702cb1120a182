"""Whether a published checkpoint holds what its configuration needs, and nothing that contradicts it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

import torch

from blip3o_rt.checkpoint.parts import HEAD, PREFIXES, PartSource, layouts, published_name
from blip3o_rt.checkpoint.tensor_file import WEIGHT_DTYPES, StoredTensor, Tensors
from blip3o_rt.config import MAX_LAYERS, ModelConfig
from blip3o_rt.errors import CheckpointError
from blip3o_rt.weights import SourceTensor

# Tensors that a published checkpoint has and inference does not use.
_TOWER = re.escape(PREFIXES["ta_tok"])
UNUSED = re.compile(
    rf"lm_head\.weight$|.*rotary_emb\.inv_freq$|model\.sana\.patch_embed\.pos_embed$|.*position_ids$"
    rf"|model\.(und_image_vae|und_image_vae_as_noise|tar_siglip_features)_connector\."
    rf"|(?:{_TOWER})?(decoder|decode_task_layer|bottleneck\.out_linear|scale_layer|teacher)\."
    rf"|(?:{_TOWER})?encoder\.(post_layernorm|head|encoder\.layers)\."
    rf"|(?:{_TOWER})?bottleneck\.regularizer\.stochastic_temperature_inv$"
)
# What training keeps beside weights; it says nothing of what is computed.
TRAINING = re.compile(
    r"(^|[._])(ema|swa|shadow|optim|optimizer|adam|exp_avg|momentum|master|grad|lr_scheduler|global_step|rng"
    r"|_extra_state)([._]|$)"
)
ADAPTER = re.compile(
    r"(^|\.)(lora_|base_layer\.|modules_to_save\.|hada_w|lokr_w|oft_|ia3_|vera_|boft_|dora_|adapter)"
)
SCALE = re.compile(r"\.(weight[._]scale|scale_weight|scale)\w*")  # of a module whose weight has 8 bits
NUMBER = re.compile(r"\.\d+\.")
BLOCK = re.compile(r".*?\.\d+\.")  # of a name, up to the first index
TOWER_LAYER = re.compile(rf"(?:{_TOWER})?encoder\.encoder\.layers\.(\d+)\.")
HEAD_SAMPLE = 13  # of so many pieces of a head, one is compared: text and image rows of the published one


def check_contents(model: ModelConfig, config: str, sources: Mapping[str, PartSource]) -> list[str]:
    """Check that every needed tensor is there, and no other that would change what is computed.

    Args:
        model: The configuration.
        config: Its file's name, for messages.
        sources: Where each part's tensors are.

    Returns:
        At most one warning, which sums up what is neither needed nor known to be unused.

    Raises:
        CheckpointError: A tensor that is missing, of another shape or type, or contradicts the configuration.
    """
    needed = {
        part: {source.name(n.name): n for spec in layouts(model)[part] for n in spec.sources}
        for part, source in sources.items()
    }
    files = {id(source.tensors): source.tensors for source in sources.values()}
    used = {
        key: {name for part, s in sources.items() if id(s.tensors) == key for name in needed[part]}
        for key in files
    }
    for tensors in files.values():
        _refuse_adapters(tensors)
    for part, source in sources.items():
        for name, tensor in needed[part].items():
            _check_tensor(source, name, tensor, used[id(source.tensors)])
    if model.ar.tie_word_embeddings:
        _check_tied_head(config, sources["ar"].tensors)
    inside = {part for part, source in sources.items() if source.prefixed}
    elsewhere = tuple(PREFIXES[part] for part in ("dit", "vae", "ta_tok") if part not in inside)
    left: list[str] = []
    for key, tensors in files.items():
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(elsewhere)}
        left += _left_over(model, config, own, used[key])
    if len(left) < 2:
        return [f"{name} is not known and was left out" for name in left]
    return [f"{len(left)} tensors are not known and were left out, as {left[0]}"]


def _refuse_adapters(tensors: Tensors) -> None:
    name = next((name for name in tensors if ADAPTER.search(name) and not TRAINING.search(name)), None)
    if name is not None:
        raise _contradiction(
            tensors[name], "an adapter is merged into its base first, as PEFT's merge_and_unload does"
        )


def _contradiction(tensor: StoredTensor, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.path}: tensor {tensor.name!r} would change what is computed, but {reason}; "
        "accepted: weights and a configuration that agree"
    )


def _check_tensor(source: PartSource, name: str, needed: SourceTensor, used: set[str]) -> None:
    if name not in source.tensors:
        spare = difflib.get_close_matches(name, sorted(set(source.tensors) - used), n=1, cutoff=0.8)
        hint = f"; the closest unused name there is {spare[0]!r}" if spare else ""
        tied = " (absent only where tie_word_embeddings is true)" if name == HEAD else ""
        raise CheckpointError(
            f"{source.where}: tensor {name!r} of shape {list(needed.shape)} is missing{tied}{hint}"
        )
    tensor = source.tensors[name]
    if tensor.shape != needed.shape:
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}; accepted: {list(needed.shape)}, "
            "as the configuration files say"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        module = name.removesuffix(".weight")
        beside = (other for other in source.tensors if other.startswith(module))
        scale = next((other for other in beside if SCALE.fullmatch(other, len(module))), None)
        scaled = f" with scales {scale!r}" if scale else ""
        raise CheckpointError(
            f"{tensor.path}: tensor {name!r} is stored as {tensor.dtype}{scaled}; accepted: floating point "
            "of 16, 32 or 64 bits"
        )


def _check_tied_head(config: str, tensors: Tensors) -> None:
    head, embedding = tensors.get(HEAD), tensors[published_name("ar", "embed_tokens.weight")]
    if head is not None and not _equal(head, embedding):
        raise CheckpointError(
            f"{config}: tie_word_embeddings is true but {head.path} has another {HEAD!r}; accepted: false, "
            "or a file without it"
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal, as far as every HEAD_SAMPLE-th piece of them shows."""
    if (one.shape, one.dtype) != (other.shape, other.dtype) or isinstance(one.dtype, str):
        return False
    pairs = zip(one.chunks(HEAD_SAMPLE), other.chunks(HEAD_SAMPLE), strict=True)
    return all(torch.equal(piece, same) for piece, same in pairs)


def _left_over(model: ModelConfig, config: str, tensors: Tensors, used: set[str]) -> Iterator[str]:
    """The names that are neither used nor known to be unused. Raises CheckpointError for a contradiction."""
    modules = {name.rpartition(".")[0] for name in (*used, HEAD)}
    blocks = {match[0] for name in used if (match := BLOCK.match(name))}
    patterns = {NUMBER.sub(".#.", name) for name in used}
    for name in sorted(set(tensors) - used):
        layer, block, reason = TOWER_LAYER.match(name), BLOCK.match(name), None
        if TRAINING.search(name):
            yield name
        elif layer:
            layers = model.ta_tok.num_layers if model.ta_tok else MAX_LAYERS
            reason = f"num_hidden_layers of its vision tower is {layers}" if int(layer[1]) >= layers else None
        elif UNUSED.match(name):
            continue
        elif NUMBER.sub(".#.", name) in patterns:
            reason = f"there are no more layers in {config}: {_layers(model, name)}"
        elif name.rpartition(".")[0] in modules or (block and block[0] in blocks):
            biased = name.endswith(".bias") and "att" in name
            reason = f"attention_bias is false in {config}" if biased else f"{config} asks for none such"
        else:
            yield name
        if reason:
            raise _contradiction(tensors[name], reason)


def _layers(model: ModelConfig, name: str) -> str:
    if "transformer_blocks." in name:
        return f"num_layers is {model.dit.num_layers}"
    return f"num_hidden_layers is {model.ar.num_layers}" if ".layers." in name else "layers_per_block"
