"""Settings of small models of transformers, for the tests that go through its families."""

from __future__ import annotations

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
# Of families without grouped queries, whose heads share hidden_size.
HEADS = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
# T5 v1.1, whose MLPs are gated.
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-silu",
    "decoder_start_token_id": 0,
}
