"""The table of torch and cuBLASLt versions, and what `fp8.info` says of the running pair."""

import re

import pytest
import torch

import fp8
from fp8._native import versions

WORDS = {"tested", "sampled", "builds", "unknown"}


def test_pairs_are_in_order_and_use_the_tables_words():
    numbers = [int(pair.torch.removeprefix("2.")) for pair in versions.PAIRS]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    for pair in versions.PAIRS:
        assert versions.minor(pair.release) == pair.torch
        assert {pair.cpu, pair.gpu} <= WORDS
        assert re.fullmatch(r"\d+\.\d+\.\d+", pair.cublaslt)


def test_pair_of_this_process_is_in_the_table():
    (pair,) = [pair for pair in versions.PAIRS if pair.torch == versions.minor(torch.__version__)]
    facts = fp8.info()
    assert facts["this pair"]["cpu"] == pair.cpu
    assert facts["pairs"] == versions.table()


@pytest.mark.parametrize(
    ("torch_version", "cublaslt", "gpu"),
    [
        ("2.11.0+cu130", "13.1.0", "tested"),
        ("2.11.0+cu130", "13.1.1", "unknown with cuBLASLt 13.1.1"),
        ("2.11.0+cpu", "none", "no CUDA here"),
        ("2.11.0+cu130", "unknown", "no CUDA here"),
        ("2.15.0+cu132", "13.4.1", "builds (guards were measured with cuBLASLt 13.1)"),
        ("2.12.1", "13.4.1", "unknown with cuBLASLt 13.4.1 (guards were measured with cuB"),
        ("2.99.0", "13.1.0", "unknown"),
    ],
)
def test_pair_status_says_no_more_than_was_done(torch_version, cublaslt, gpu):
    assert versions.status(torch_version, cublaslt)["gpu"].startswith(gpu)


def test_pair_status_is_tested_only_for_the_very_pair():
    for pair in versions.PAIRS:
        for cublaslt in ("13.0.0", "13.1.0", "13.1.1", "13.4.1", "14.0.0"):
            status = versions.status(pair.release, cublaslt)
            assert (status["gpu"] == "tested") == (
                pair.gpu == "tested" and cublaslt == pair.cublaslt
            )
