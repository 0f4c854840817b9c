"""The families of transformers as models of two narrow layers, with random weights, and inputs.

A family is a `model_type` with an auto class. Its configuration is made from the class's own
defaults: every number is made small by what its field is called (`_rules`), lists that have an
entry for each layer are cut, and configurations inside are treated alike. What this cannot guess is
in family_settings.py. No family is written down as one that works: what cannot be made small says
why.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import transformers
from converted import randomize
from family_settings import SETTINGS
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEATURES, LAYERS = 64, 4, 2, 16, 96, 2
VOCABULARY, TOKENS, POSITIONS, PIXELS = 96, 12, 64, 32
MOST_PARAMETERS = 4_000_000  # what is larger was not made small

# Which auto class a family is made with: the first that knows it. "decoder" is what issue trackers
# call a causal language model; encoders that can be told to be one are not counted among them.
_TASKS = (
    ("other", "MaskedLM", "MASKED_LM"),
    ("other", "Seq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("other", "SpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    ("decoder", "CausalLM", "CAUSAL_LM"),
    ("other", "CTC", "CTC"),
    ("other", "ImageClassification", "IMAGE_CLASSIFICATION"),
)

# Field names, whole, and the number that belongs there; the first that matches.
_RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r".*(drop|jitter).*", 0.0),
    (r"mask_(time|feature)_prob", 0.0),
    (r"(num_key_value_heads|num_kv_heads|.*_key_value_heads|num_query_groups)", KV_HEADS),
    (r"(.*num_attention_heads|.*attention_heads|n_heads?|num_heads|linear_num_\w+_heads)", HEADS),
    (r"(.*num_hidden_layers|n_layers?|num_layers|.*(encoder|decoder)_layers|num_blocks)", LAYERS),
    (r"num_layers_per_stack", 1),
    (r"(moe_)?(num_|n_)(local_|routed_)?experts", 4),
    (r"(num_experts_per_tok(en)?|moe_k|moe_topk|num_selected_experts|top_k_experts)", 2),
    (r"(n_group|topk_group|num_expert_group|topk_groups)", 1),
    (r".*(shared_experts?)", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(qk_rope_head_dim|qk_nope_head_dim)", HEAD_DIM // 2),
    (r"(.*head_dim|d_kv|d_head|kv_channels|attention_head_size)", HEAD_DIM),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank)", 32),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|d_ff|dff|d_inner|n_inner)", FEATURES),
    (r"(hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size)", HIDDEN),
    (r"(.*_hidden_size|word_embed_proj_dim|lru_width)", HIDDEN),
    (r"(.*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)", POSITIONS),
    (r"max_(source|target)_positions", POSITIONS),
    (r"(.*sliding_window|local_attention|.*window_size|attention_chunk_size)", 8),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"image_size", PIXELS),
    (r"patch_size", 8),
    (r"num_mel_bins", 16),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"decoder_start_token_id|forced_\w+_token_id", 1),
    (r"pad_token_id", 0),
    (r"\w+_token_(id|index)", 3),
)
_LISTS = {"depths": 1, "hidden_sizes": 32, "num_attention_heads": 2, "num_heads": 2}  # by stage
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Family(NamedTuple):
    """One model_type, and how it is made."""

    name: str
    kind: str  # "decoder" or "other"
    task: str  # of AutoModelFor...


class Unfit(Exception):
    """Why a family has no small model here."""


def families() -> list[Family]:
    """All that are looked at, decoders first."""
    found: dict[str, Family] = {}
    for kind, task, mapping in _TASKS:
        for name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            found.setdefault(name, Family(name, kind, task))
    return sorted(found.values(), key=lambda f: (f.kind != "decoder", f.name))


def named(names: Iterable[str]) -> list[Family]:
    """These alone. Raises ValueError for a name that transformers does not know."""
    known = {f.name: f for f in families()}
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"no such families: {', '.join(unknown)}")
    return [known[name] for name in names]


def _number(field: str) -> Any:
    for pattern, value in _RULES:
        if re.fullmatch(pattern, field):
            return value
    return None


def _is_per_layer(value: Any, layers: int | None) -> bool:
    return isinstance(value, list | tuple) and layers is not None and len(value) == layers > LAYERS


def small_settings(config: Any) -> dict[str, Any]:
    """What makes a configuration of this one's class small."""
    layers = next((getattr(config, n) for n in _LAYER_COUNTS if hasattr(config, n)), None)
    small: dict[str, Any] = {}
    for field, value in vars(config).items():
        if field.startswith("_") and field != "_sliding_window_pattern":
            continue
        if isinstance(value, transformers.PreTrainedConfig):
            small[field] = small_settings(value)
        elif _is_per_layer(value, layers):
            small[field] = _cut(value)
        elif field in _LISTS and isinstance(value, list | tuple):
            small[field] = type(value)([_LISTS[field]] * len(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            number = _number(field)
            if number is not None:
                small[field] = type(value)(number)
        elif value is None and field in ("pad_token_id", "head_dim"):
            small[field] = _number(field)
    if "qk_rope_head_dim" in small:  # latent attention: every head has keys, and rotates that part
        small |= {"num_key_value_heads": HEADS, "head_dim": small["qk_rope_head_dim"]}
    return small


def _cut(values: list[Any] | tuple[Any, ...]) -> Any:
    """An entry for each of the layers that are left: of different kinds where there are any."""
    first = values[0]
    other = next((v for v in values if v != first), first)
    return type(values)([first, other])


def make_config(family: Family, **more: Any) -> Any:
    """A small configuration, the same each time."""
    kind = transformers.CONFIG_MAPPING[family.name]
    settings = small_settings(kind()) | SETTINGS.get(family.name, {}) | more
    return kind(**settings)


def make(family: Family, dtype: torch.dtype) -> nn.Module:
    """A new model, the same weights each time; in training mode, without dropout.

    Raises Unfit where there is none.
    """
    try:
        config = make_config(family)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            auto = getattr(transformers, f"AutoModelFor{family.task}")
            with torch.device("meta"):
                size = sum(p.numel() for p in auto.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise Unfit(f"{size / 1e6:.0f} million parameters: not made small")
            model = randomize(auto.from_config(config, attn_implementation="eager"))
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"no small model: {type(error).__name__}: {_first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(dtype).train()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:120]


def inputs(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """What a training step hands the model, labels included; in its dtype."""
    generator = torch.Generator().manual_seed(3)
    parameter = next(model.parameters())
    config: Any = model.config

    def ids(length: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (2, length), generator=generator)

    name = "input_ids" if family.kind == "decoder" else model.main_input_name
    given: dict[str, Tensor] = {}
    if name == "pixel_values":
        channels = getattr(config, "num_channels", 3)
        given[name] = torch.randn(2, channels, PIXELS, PIXELS, generator=generator)
    elif name == "input_values":
        given[name] = torch.randn(2, 1600, generator=generator)
    elif name == "input_features":
        bins = getattr(config, "num_mel_bins", 16)
        given[name] = torch.randn(2, bins, 2 * POSITIONS, generator=generator)
        if family.task == "CTC":
            given[name] = given[name].transpose(1, 2)
    else:
        given[name] = ids(TOKENS)
    if family.task == "ImageClassification":
        given["labels"] = torch.tensor([0, 1])
    elif name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        given["labels"] = given[name]
    else:
        given["labels"] = ids(4)
    return {
        n: t.to(parameter.device, parameter.dtype if t.is_floating_point() else t.dtype)
        for n, t in given.items()
    }
