"""Shared fixtures: small random models, the bundled model, and the rule that nothing is skipped in
silence.
"""

from __future__ import annotations

import importlib.util
import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # read when triton and specdec_kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_emulated
from byte_model import save_byte_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from specdec_kernels.registry import INTERPRETS_TRITON

_CORES = len(os.sched_getaffinity(0))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if INTERPRETS_TRITON and importlib.util.find_spec("triton") is not None:
    import triton_checks

    triton_checks.install()

cuda_emulated.install()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Two threads, since kernels deal their work to them, where there are as many cores: more would
    spin. The bundled model has hundreds of parallel regions a step, and workers that share cores
    would wait for each other in each of them.
    """
    threads = 2
    if "smollm2" in getattr(item, "fixturenames", ()):
        threads = max(1, min(2, _CORES // _WORKERS))
    torch.set_num_threads(min(threads, _CORES))


def make_tiny_model(num_layers: int = 3, **options: object) -> PreTrainedModel:
    """A random Llama whose greedy text does not repeat itself."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
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
def bytes_model(tmp_path_factory: pytest.TempPathFactory):
    """A small model that repeats itself, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    save_byte_model(path)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def smollm2():
    """The bundled model in float32, and its tokenizer."""
    from specdec_kernels.hf import load_model

    return load_model("smollm2", dtype=torch.float32)


@pytest.fixture
def report(record_property):
    """Add a line of measured facts to the end of the test run."""
    return partial(record_property, "measured")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests reported, and every skip with its reason: nothing is skipped in silence."""
    done = [r for name in ("passed", "failed") for r in terminalreporter.stats.get(name, [])]
    lines = [value for r in done for key, value in r.user_properties if key == "measured"]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
    for skipped in terminalreporter.stats.get("skipped", []):
        terminalreporter.write_line(f"SKIPPED {skipped.nodeid}: {skipped.longrepr[-1]}", red=True)
