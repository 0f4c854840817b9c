"""Registers the operators; tests that need Hugging Face transformers are skipped without it."""

import os

import fp8  # noqa: F401

# Nothing here needs a network, and nothing may wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
