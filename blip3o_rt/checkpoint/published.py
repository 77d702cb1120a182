"""Opening a checkpoint in the published layout: its configuration, and where each tensor of the model is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip3o_rt.checkpoint.contents import check_contents
from blip3o_rt.checkpoint.parts import HEAD, PREFIXES, PartSource, published_name
from blip3o_rt.checkpoint.published_config import ConfigFile, parse_model, parse_ta_tok
from blip3o_rt.checkpoint.source import (
    KNOWN,
    SANA_NAME,
    SIGLIP_NAME,
    Source,
    checkpoint_folder,
    is_file,
    known_folder,
    local_path,
    refuse_stand_in,
)
from blip3o_rt.checkpoint.tensor_file import (
    StoredTensor,
    Tensors,
    read_safetensors,
    read_torch_file,
    torch_tensors,
)
from blip3o_rt.config import ModelConfig, TATokConfig
from blip3o_rt.errors import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPONENTS = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
STOCK_WEIGHTS = "diffusion_pytorch_model"  # how files of a diffusers component begin
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,5})-of-(?P<total>\d{1,5})\.safetensors")
# What wrappers put before a name: torch.compile, data-parallel models, PEFT, FSDP, a model within a model;
# and within it, around a part of the model.
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|base_model|model|_fsdp_wrapped_module|_forward_module)\.)*")
OUTER_WRAPPER = re.compile(
    r"(?:(?:_orig_mod|module|base_model\.model|_fsdp_wrapped_module|_forward_module)\.)+(?=(?P<own>.*))"
)
INNER_WRAPPERS = re.compile(
    r"(?<=\.)(?:(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
ANCHORS = {  # the end of a name that every file of a part has
    "ar": "embed_tokens.weight",
    "dit": "patch_embed.proj.weight",
    "vae": "decoder.conv_in.weight",
    "ta_tok": "bottleneck.regularizer.embedding.weight",
}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint, opened: everything is known and checked except the tensors' values.

    Attributes:
        path: Its folder.
        config: The model's configuration.
        sources: Where each part's tensors are, by part.
        files: Every file that was read or will be, each once.
        tokenizer_files: The tokenizer's files.
        stored_dtype: bfloat16 where the checkpoint stores that, else float32.
        warnings: What is left out.
    """

    path: Path
    config: ModelConfig
    sources: dict[str, PartSource]
    files: list[Path]
    tokenizer_files: list[Path]
    stored_dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)


def open_published(source: Source) -> PublishedCheckpoint:
    """Find and check everything of a published checkpoint except the tensors' values.

    Raises:
        ConfigError: A configuration that this runtime does not compute.
        CheckpointError: Files or tensors that are missing, damaged, or of another shape or type.
    """
    root = checkpoint_folder(source.path)
    if is_file(root / "adapter_config.json"):  # with or without a model in it
        raise CheckpointError(
            f"{root}: a LoRA adapter (adapter_config.json), which is merged into its base first: "
            "blip3o-rt convert BASE DST --lora DIR"
        )
    config = ConfigFile.read(root / "config.json")
    tensors = unwrapped(read_tensors(root, "model", source.variant), "ar", PREFIXES["ar"])
    folder = _diffusion_folder(root, config, source)
    ta_tok, tower, tower_files = _find_tower(root, config, tensors, source)
    parts = {name: ConfigFile.read(folder / file) for name, file in COMPONENTS.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    tokens = _tokens_without_tower(root) if ta_tok is None else ta_tok.tokens
    model = parse_model(config, parts, shapes, ta_tok, tokens)
    sources = {part: PartSource(part, tensors, str(root), True) for part in ("ar", "connector")}
    sources["dit"] = _diffusion_source("dit", tensors, root, folder / "transformer", source)
    sources["vae"] = _diffusion_source("vae", tensors, root, folder / "vae", source)
    if tower is not None:
        sources["ta_tok"] = tower
    read = [root / "config.json", *(folder / file for file in COMPONENTS.values()), *tower_files]
    read += [tensor.path for part in sources.values() for tensor in part.tensors.values()]
    warnings = [*_notes(model, sources), *check_contents(model, config.name, sources)]
    embedding = tensors[published_name("ar", "embed_tokens.weight")]
    return PublishedCheckpoint(
        path=root,
        config=model,
        sources=sources,
        files=[path for path in dict.fromkeys(read) if KNOWN not in path.parents],
        tokenizer_files=_tokenizer_files(root),
        stored_dtype=torch.bfloat16 if embedding.dtype == torch.bfloat16 else torch.float32,
        warnings=warnings,
    )


def _notes(model: ModelConfig, sources: Mapping[str, PartSource]) -> Iterator[str]:
    """What a user of the opened checkpoint should know."""
    if not sources["dit"].prefixed:
        yield f"the diffusion transformer's weights are the untrained ones of {sources['dit'].where}"
    if model.ta_tok is None and model.edit.use_tar_siglip_features:
        yield "use_tar_siglip_features is set but there is no vision tower: editing is not possible"


def read_tensors(folder: Path, stem: str, variant: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of the safetensors files of one name (and variant), by name."""
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder, stem, variant):
        for name, tensor in read_safetensors(path).items():
            if name in found:
                raise CheckpointError(
                    f"{name} is in both {found[name].path} and {path}; remove one of the files"
                )
            found[name] = tensor
    return found


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """One whole file, or the shards that an index lists, or all of a numbered set."""
    name = f"{stem}.{variant}" if variant else stem
    whole, indexes = folder / f"{name}.safetensors", [folder / f"{name}.safetensors.index.json"]
    if variant:
        indexes.append(folder / f"{stem}.safetensors.index.{variant}.json")
    for index in filter(is_file, indexes):
        shards = _shard_names(index)
        if is_file(whole) and shards != [whole.name]:
            raise CheckpointError(
                f"{index}: lists other files beside a whole {whole.name}; remove what is left over"
            )
        return [folder / shard for shard in shards]
    if is_file(whole):
        return [whole]
    numbered = {path: SHARD.fullmatch(path.name) for path in sorted(folder.glob(f"{name}-*.safetensors"))}
    found = {path: match for path, match in numbered.items() if match and match["stem"] == name}
    if not found:
        raise CheckpointError(f"{folder}: no weights{_other_weights(folder, stem)}")
    total = max(int(match["total"]) for match in found.values())
    for number in range(1, total + 1):
        if number not in {int(match["number"]) for match in found.values()}:
            first = next(iter(found)).name
            raise CheckpointError(
                f"{folder}: shard {number} of {total} is missing beside {first}; copy it again"
            )
    return list(found)


def _other_weights(folder: Path, stem: str) -> str:
    """What is there in place of weights, for a message."""
    accepted = f"accepted: {stem}.safetensors, or shards with {stem}.safetensors.index.json"
    for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")):
        return f" ({path.name} is a pickle; save it as safetensors); {accepted}"
    for path in sorted(folder.glob("*.incomplete")) + sorted(folder.glob("*.aria2")):
        return f" ({path.name} is an unfinished download; finish it); {accepted}"
    for path in sorted(folder.glob(f"{stem}.*.safetensors*")):
        variant = re.split(r"[.-]", path.name.removeprefix(f"{stem}."))[0]
        return f" but those of variant {variant} ({path.name}); {accepted}, or --variant {variant}"
    for path in sorted(folder.glob("*.gguf")) + sorted(folder.glob("*.safetensors")):
        return f" under the names that are read, only {path.name}; {accepted}"
    return f"; {accepted}"


def unwrapped(tensors: Tensors, part: str, prefix: str = "") -> Tensors:
    """The tensors by their own names, without what wraps the name of every one of them.

    Args:
        tensors: As stored, perhaps by a compiled, distributed or adapted model, or by a part of one.
        part: One that is among them, whose anchor shows how names are wrapped.
        prefix: What stands before that anchor in a plain file.
    """
    outer = _without_inner_wrappers(tensors)
    before = [name.removesuffix(ANCHORS[part]) for name in outer if name.endswith(ANCHORS[part])]
    anchored = prefix if prefix in before else min(before, key=len, default=prefix)
    wrapper, added = anchored.removesuffix(prefix), "" if anchored.endswith(prefix) else prefix
    bare = next((name for name in outer if not name.startswith(wrapper)), None)
    if not wrapper:  # and yet other names may have one
        for found in filter(None, map(OUTER_WRAPPER.match, outer)):
            if found["own"].startswith(prefix) and found["own"] not in outer:
                wrapper, bare = found[0], anchored + ANCHORS[part]
    if bare is None:
        own = {name.removeprefix(wrapper): tensor for name, tensor in outer.items()}
        return {name if name == HEAD else added + name: tensor for name, tensor in own.items()}
    if WRAPPERS.fullmatch(wrapper):
        wrapped = next(name for name in outer if name.startswith(wrapper))
        raise CheckpointError(
            f"{outer[wrapped].path}: names as {wrapped!r} begin with {wrapper!r} but {bare!r} does not; "
            "accepted: all or none"
        )
    return outer


def _without_inner_wrappers(tensors: Tensors) -> Tensors:
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        other = found.setdefault(INNER_WRAPPERS.sub("", name), tensor)
        if other is not tensor:
            raise CheckpointError(f"{tensor.path}: {name!r} and {other.name!r} are one tensor; remove one")
    return found


def _shard_names(index_path: Path) -> list[str]:
    weight_map = ConfigFile.read(index_path).data.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index_path}: no weight_map; accepted: an index of tensor names to shard files"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path}: shard {name!r} is not a plain file name in the same folder")
    return names


def _diffusion_folder(root: Path, config: ConfigFile, source: Source) -> Path:
    """The diffusers folder: the one given, else the one that config.json names, else a known one.

    Known ones are configurations without weights.
    """
    if source.diffusion is not None:
        given = checkpoint_folder(source.diffusion)
        if not is_file(given / COMPONENTS["transformer"]):
            raise CheckpointError(
                f"{given}: no transformer/config.json in it; accepted: a diffusers folder with "
                "transformer/, vae/ and scheduler/"
            )
        return given
    name = config.text("diffusion_name_or_path")
    if is_file(root / name / COMPONENTS["transformer"]):
        return root / name
    known = known_folder(name, SANA_NAME)
    if known is None:
        accepted = f"a diffusers folder on this machine (give yours with --diffusion), or {SANA_NAME}"
        raise config.error("diffusion_name_or_path", accepted)
    return known


def _diffusion_source(part: str, tensors: Tensors, root: Path, stock: Path, source: Source) -> PartSource:
    """The checkpoint's own tensors where it has the part (trained further), else the diffusers folder's."""
    if any(name.startswith(PREFIXES[part]) for name in tensors):
        return PartSource(part, tensors, str(root), True)
    missing = f"{root}: no tensors under {PREFIXES[part]}"
    if part == "dit" and not source.allow_base_weights:
        raise CheckpointError(
            f"{missing}, the trained diffusion transformer; accepted: a complete copy of the checkpoint "
            f"(--allow-base-weights takes the untrained ones of the diffusers folder)"
        )
    if KNOWN in stock.parents:
        raise CheckpointError(
            f"{missing} and no diffusers folder to take them from; give one with --diffusion"
        )
    named = source.variant and any(stock.glob(f"{STOCK_WEIGHTS}.{source.variant}*"))
    found = read_tensors(stock, STOCK_WEIGHTS, source.variant if named else None)
    return PartSource(part, unwrapped(found, part), str(stock), False)


def _find_tower(
    root: Path, config: ConfigFile, tensors: Tensors, given: Source
) -> tuple[TATokConfig | None, PartSource | None, list[Path]]:
    """The vision tower's numbers and weights, None in a text-to-image-only checkpoint, and files of both.

    Weights are those of the file given, else of the checkpoint, else of a ta_tok.pth that it names or has
    beside it. Settings are those of the ta_tok.pth, else what the shapes of the weights tell.
    """
    file = _ta_tok_file(root, config) if given.ta_tok is None else local_path(given.ta_tok, "ta_tok")
    settings, loose = (None, None) if file is None else _read_ta_tok(file)
    inside = any(name.startswith(PREFIXES["ta_tok"]) for name in tensors)
    if not inside and loose is None:
        return None, None, []
    if loose is not None and (given.ta_tok is not None or not inside):
        source = PartSource("ta_tok", loose, str(file), False)
    else:
        source = PartSource("ta_tok", tensors, str(root), True)
    settings = settings or _settings_from_shapes(root, tensors)
    vision = _vision_config(root, file, settings)
    files = [vision] if file is None else [file, vision]
    return parse_ta_tok(settings, _vision_section(vision)), source, files


def _ta_tok_file(root: Path, config: ConfigFile) -> Path | None:
    named = config.text("mm_vision_tower", "ta_tok.pth")
    return next(filter(is_file, (root / named, root / "ta_tok.pth")), None)


def _read_ta_tok(path: Path) -> tuple[ConfigFile, Tensors]:
    """Settings and tensors of a ta_tok.pth, {"model": {"args": settings, "sd": tensors}}."""
    match read_torch_file(path):
        case {"model": {"args": dict(arguments), "sd": dict(state)}}:
            tensors = unwrapped(torch_tensors(path, state), "ta_tok")
            return ConfigFile(f"{path}: args", arguments), tensors
    raise CheckpointError(
        f'{path}: not a TA-Tok file; accepted: {{"model": {{"args": settings, "sd": tensors}}}}'
    )


def _tokens_without_tower(root: Path) -> int:
    """Tokens per image of a checkpoint that has no tower: its SigLIP configuration's patches, or 729."""
    vision = _vision_section(_vision_config(root, None, ConfigFile(str(root), {})))
    return (vision.integer("image_size", 224) // vision.integer("patch_size", 16)) ** 2


def _vision_section(path: Path) -> ConfigFile:
    """The vision part of a SigLIP configuration, which is either all of the file or a section of it."""
    config = ConfigFile.read(path)
    return config.section("vision_config") if "vision_config" in config.data else config


def _settings_from_shapes(root: Path, tensors: Tensors) -> ConfigFile:
    """TA-Tok's settings as its weights show them, for a checkpoint that has the tower but no ta_tok.pth."""
    name = published_name("ta_tok", "bottleneck.regularizer.embedding.weight")
    if name not in tensors or len(tensors[name].shape) != 2:
        raise CheckpointError(f"{root}: {name} is missing or not a matrix; accepted: a complete vision tower")
    codes, width = tensors[name].shape
    regularizer = {"name": "simvq", "args": {"codebook_size": codes, "l2_normalized": True}}
    bottleneck = {"args": {"bottleneck_dim": width, "regularizer": regularizer}}
    return ConfigFile(f"{root}: vision tower", {"bottleneck": bottleneck})


def _vision_config(root: Path, ta_tok: Path | None, settings: ConfigFile) -> Path:
    """SigLIP's configuration: the teacher's folder, else siglip2/ beside, else the one known by name."""
    teacher = settings.text("teacher", SIGLIP_NAME)
    parents = [root] if ta_tok is None else [ta_tok.parent, root]
    for path in (parent / name / "config.json" for name in (teacher, "siglip2") for parent in parents):
        if is_file(path):
            return path
    known = known_folder(teacher, SIGLIP_NAME)
    if known is None:
        accepted = f"{SIGLIP_NAME}, or a folder with SigLIP's config.json named siglip2"
        raise settings.error("teacher", accepted)
    return known / "config.json"


def _tokenizer_files(root: Path) -> list[Path]:
    found = [root / name for name in TOKENIZER_FILES if is_file(root / name)]
    if not {"tokenizer_config.json", "tokenizer.json"} <= {path.name for path in found}:
        raise CheckpointError(f"{root}: no tokenizer; accepted: tokenizer.json with tokenizer_config.json")
    for path in found:
        refuse_stand_in(path)
    return found
