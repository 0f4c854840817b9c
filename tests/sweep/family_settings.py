"""What families.py cannot guess of a configuration, by family."""

from __future__ import annotations

from typing import Any

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_T5 = {"decoder_start_token_id": 0, "num_layers": 1}
_SOUND = {  # convolutions that leave a few frames of 1600 samples
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
_SWIN = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 4, "window_size": 4}

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "deepseek_v2": _MOE | {"topk_group": 1, "n_group": 1},
    "dots1": _MOE,
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": _SLIDING
    | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16}
    | {"activation_sparsity_pattern": [0.0, 0.0]},
    "granitemoehybrid": _MAMBA | _HYBRID | {"shared_intermediate_size": 96},
    "hrm_text": {"num_hidden_layers": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8}
    | {"use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2}
    | {"num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "data2vec-audio": _SOUND,
    "distilbert": {"dim": 64, "hidden_dim": 96},
    "donut-swin": _SWIN,
    "esm": {"vocab_size": 96, "mask_token_id": 3, "token_dropout": False},
    "esmc": {"num_key_value_heads": 4},
    "hubert": _SOUND,
    "longt5": _T5,
    "pop2piano": _T5,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "switch_transformers": _T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "t5": _T5,
    "unispeech": _SOUND,
    "unispeech-sat": _SOUND,
    "wav2vec2": _SOUND,
    "wavlm": _SOUND,
    "xmod": {"default_language": "en_XX"},
}
