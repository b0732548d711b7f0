"""A checkpoint's config.json, read once into one frozen dataclass.

    config.json -> registry: whose model_type is it -> the family's reader (`common.models.specs`) -> ModelSpec

No torch. Anything in the config that this build would compute wrongly is a ConfigError here, before a byte of
weights is read. What all families share is read by `base_spec`; a family adds its parts and declares its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import ConfigError
from common.layers.compress_spec import CompressSpec, StreamSpec
from common.layers.delta_spec import DeltaSpec
from common.layers.media_spec import MediaSpec
from common.layers.mla_spec import IndexerSpec, MLASpec
from common.layers.moe_spec import MoESpec
from common.layers.quant_spec import QuantSpec
from common.layers.rope_spec import RopeSpec
from common.models.cache_spec import INDEXER_REGION, CacheSpec
from common.models.checkpoint import DTYPE_NAMES, TensorInfo, content_hash, read_index, read_json
from common.models.config_reader import ConfigReader
from common.models.pooling import PoolingSpec
from common.models.quant_config import read_quant
from common.models.registry import spec_reader
from common.models.rope_config import read_rope

_NOT_HASHED = {"transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype"}
_DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 10_000  # a spec lists something for each


@dataclass(frozen=True)
class ModelSpec:
    """`dtype`: the checkpoint's own. `model_hash`: 16 bytes, see `common.models.checkpoint.content_hash`.

    `media`: None for a model that takes no images. `streams`: None for one residual stream. `zero_centred_norm`: see
    `common.layers.rms_norm`. `mtp_layers`: multi-token-prediction layers that the checkpoint holds; `has_drafts`: the
    first of them is a part of the model. `pooling`: how it makes vectors; None where it generates.

    `head_dim` is the width that rotates and that attention is scaled by; families with several widths say so in
    their own part.
    """

    folder: Path
    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str
    model_hash: bytes
    cache: CacheSpec
    media: MediaSpec | None = None
    moe: MoESpec | None = None
    quant: QuantSpec | None = None
    mla: MLASpec | None = None
    indexer: IndexerSpec | None = None
    compress: CompressSpec | None = None
    streams: StreamSpec | None = None
    delta: DeltaSpec | None = None
    zero_centred_norm: bool = False
    mtp_layers: int = 0
    has_drafts: bool = False
    pooling: PoolingSpec | None = None

    @classmethod
    def from_folder(cls, path: str | Path, *, weights: bool = True) -> ModelSpec:
        """Read a Hugging Face folder. `weights=False` needs no weight files (load_format dummy).

        ConfigError names the file and the field at fault.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"model folder {folder} does not exist", param="model")
        config = ConfigReader(folder / "config.json", read_json(folder / "config.json"))
        tensors = read_index(folder) if weights else {}
        model_type = config.values.get("model_type")
        if not isinstance(model_type, str):
            raise config.error("model_type", "is missing")
        try:
            return spec_reader(model_type)(SpecSource(folder, config, tensors))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
            # of a field whose type its reader took for granted
            raise ConfigError(f"{config.path} cannot be read: {type(e).__name__}: {e}") from e

    def with_dense_attention(self) -> ModelSpec:
        """The same model where every query sees all positions: no indexers and no keys of theirs in the cache."""
        if self.indexer is None:
            return self
        regions = tuple(r for r in self.cache.regions if r.name != INDEXER_REGION)
        return replace(self, indexer=replace(self.indexer, dense=True), cache=replace(self.cache, regions=regions))

    def with_drafts(self) -> ModelSpec:
        """The same model with its first multi-token-prediction layer (`common.models.mtp`), behind the others."""
        assert self.mtp_layers
        moe = self.moe
        if moe is not None:
            moe = replace(moe, is_moe_layer=(*moe.is_moe_layer, True))
        delta = self.delta
        if delta is not None:
            delta = replace(delta, is_delta_layer=(*delta.is_delta_layer, False))
        cache = self.cache.with_drafts(self.num_layers, self.hidden_size)
        return replace(self, has_drafts=True, moe=moe, delta=delta, cache=cache)


@dataclass(frozen=True)
class SpecSource:
    """What a family's reader reads: the whole config.json, and the headers of the weights (empty without them)."""

    folder: Path
    config: ConfigReader
    tensors: Mapping[str, TensorInfo]


def base_spec(source: SpecSource, text: ConfigReader | None = None) -> ModelSpec:
    """What all families share, with an empty cache. `text`: the nested config of a multimodal model's text tower."""
    top, config = source.config, text or source.config
    _refuse_unknown(config)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", max(hidden_size // num_heads, 1))
    if head_dim % 2:
        raise config.error("head_dim", f"must be even, got {head_dim}")
    architectures = top.values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        architectures = [top.values["model_type"]]
    hashed = {k: v for k, v in top.values.items() if k not in _NOT_HASHED}
    model_type = str(top.values["model_type"])
    return ModelSpec(
        folder=source.folder,
        model_type=model_type,
        architecture=str(architectures[0]),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", config.values.get("moe_intermediate_size")),
        num_layers=config.integer("num_hidden_layers", most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config),
        tie_word_embeddings=(top if "tie_word_embeddings" in top.values else config).flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
        eos_token_ids=_eos(source.folder, (top, config)),
        bos_token_id=config.values.get("bos_token_id", top.values.get("bos_token_id")),
        dtype=_dtype(top, config, source.tensors),
        model_hash=content_hash(hashed, source.tensors),
        cache=CacheSpec((), ()),
        quant=read_quant(config, top),
    )


def _refuse_unknown(config: ConfigReader) -> None:
    """Features that change the numbers and that no family here has."""
    config.choice("hidden_act", "silu", ("silu",))


def _eos(folder: Path, configs: tuple[ConfigReader, ...]) -> tuple[int, ...]:
    """Every id that ends a text, by config.json, generation_config.json or the tokenizer: fine-tunes often have a new
    token for it, and say so in one place only.
    """
    path = folder / "generation_config.json"
    found: set[int] = set()
    for config in (*configs, ConfigReader(path, read_json(path) if path.is_file() else {})):
        ids = config.values.get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is None:
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise config.error("eos_token_id", f"must be an integer or a list of them, got {ids!r}")
            found.add(token_id)
    return tuple(sorted(found | _eos_of_tokenizer(folder)))


def _eos_of_tokenizer(folder: Path) -> set[int]:
    """Without a tokenizer here, or a token of that name in it, none: texts are then somebody else's business."""
    config, files = folder / "tokenizer_config.json", folder / "tokenizer.json"
    named = read_json(config).get("eos_token") if config.is_file() else None
    text = named.get("content") if isinstance(named, dict) else named
    added = read_json(files).get("added_tokens") if text and files.is_file() else None
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {token["id"] for token in tokens if token.get("content") == text and isinstance(token.get("id"), int)}


def _dtype(top: ConfigReader, config: ConfigReader, tensors: Mapping[str, TensorInfo]) -> str:
    """The config's word, else the type that most of the weights have that are not quantised."""
    named = next((c.values[k] for c in (top, config) for k in ("dtype", "torch_dtype") if c.values.get(k)), None)
    if named is None:
        count: Counter[str] = Counter()
        for t in tensors.values():
            if t.dtype in DTYPE_NAMES:
                count[DTYPE_NAMES[t.dtype]] += t.nbytes
        named = count.most_common(1)[0][0] if count else "float32"
    name = str(named).removeprefix("torch.")
    if name not in _DTYPES:
        raise config.error("dtype", f"{name} is not supported; supported are: {', '.join(_DTYPES)}")
    return name
