"""Small models of transformers, with random weights, and a loss for each."""

from __future__ import annotations

import torch
import transformers
from converted import randomize
from torch import Tensor, nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WHISPER = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAV = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "vocab_size": 12,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}

CAUSAL = {
    "llama": SIZES,
    "qwen3": SIZES,
    "gemma": SIZES,
    "gemma3_text": SIZES
    | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": SIZES,
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES | MOE,
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": GPT2,
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
OTHERS = {
    "t5": ("AutoModelForSeq2SeqLM", T5),
    "bert": ("AutoModelForMaskedLM", SIZES | DROP),
    "vit": (
        "AutoModelForImageClassification",
        SIZES | DROP | {"image_size": 16, "patch_size": 4, "num_labels": 4},
    ),
    "whisper": ("AutoModelForSpeechSeq2Seq", WHISPER),
    "wavlm": ("AutoModelForCTC", WAV | {"num_buckets": 32}),
    "wav2vec2": ("AutoModelForCTC", WAV),
}
FAMILIES = (*CAUSAL, *OTHERS)
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


def make(family: str, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    """A new model of the family, the same weights each time. In training mode, no dropout."""
    auto, settings = OTHERS.get(family, ("AutoModelForCausalLM", CAUSAL.get(family, {})))
    config = transformers.AutoConfig.for_model(family, **(settings | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, auto).from_config(config)
    return randomize(model).to(dtype).train()


def inputs(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a training step hands the model, labels included."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int = 16, upper: int = 96) -> Tensor:
        return torch.randint(3, upper, (2, length), generator=generator)

    if family == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels.to(dtype), "labels": torch.tensor([0, 3])}
    if family == "whisper":
        mels = torch.randn(2, 8, 32, generator=generator)
        return {"input_features": mels.to(dtype), "labels": ids(8)}
    if family in ("wavlm", "wav2vec2"):
        sound = torch.randn(2, 800, generator=generator)
        return {"input_values": sound.to(dtype), "labels": ids(3, 12)}
    tokens = ids()
    return {"input_ids": tokens, "labels": ids(8) if family == "t5" else tokens}


def loss(family: str, dtype: torch.dtype = torch.float32):
    """For converted.step: model -> loss."""
    given = inputs(family, dtype)
    return lambda model: model(**given).loss.float()
