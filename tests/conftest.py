"""Shared fixtures: small random models, the bundled model, and the rule that nothing is skipped in
silence.
"""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # read when triton and specdec_kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specdec_kernels.registry import INTERPRETS_TRITON

torch.set_num_threads(min(2, len(os.sched_getaffinity(0))))  # more than cores would spin

if INTERPRETS_TRITON and importlib.util.find_spec("triton") is not None:
    import triton_checks

    triton_checks.install()


def make_tiny_model(**options: object) -> PreTrainedModel:
    """A random Llama whose greedy text does not repeat itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def tiny_model() -> PreTrainedModel:
    """The random Llama, in float32."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def smollm2():
    """The bundled model in float32, and its tokenizer."""
    from specdec_kernels.hf import load_model

    return load_model("smollm2", dtype=torch.float32)


_REPORTS: list[str] = []


@pytest.fixture
def report():
    """Add a line of measured facts to the end of the test run."""
    return _REPORTS.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests reported, and every skip with its reason: nothing is skipped in silence."""
    if _REPORTS:
        terminalreporter.section("measured")
        for line in _REPORTS:
            terminalreporter.write_line(line)
    for skipped in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED {skipped.nodeid}: {skipped.longrepr[-1]}", red=True)
