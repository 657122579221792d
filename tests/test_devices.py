"""Several devices: tensor-parallel ranks decide alike; device maps work or are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import make_tiny_model
from prompts import greedy, left_pad, random_prompts
from tensor_parallel import END, LENGTHS, NEW, SEEDS, VOCAB

import specdec_kernels
from specdec_kernels import OracleDrafter, SpeculativeDecoder


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plan", "mesh"])
def test_two_ranks_of_a_tensor_parallel_model_write_the_same(tmp_path: Path, how: str) -> None:
    """Whatever differs between them: drafts, failures, clocks, criteria."""
    model = make_tiny_model()
    rows = random_prompts(LENGTHS, VOCAB)
    truth = [greedy(model, r, NEW + 8) for r in rows]
    model.save_pretrained(tmp_path)
    make_tiny_model(1).save_pretrained(tmp_path / "draft")
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    script = Path(__file__).with_name("tensor_parallel.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*run, str(script), str(tmp_path), how],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{how}{r}.json").read_text()) for r in range(2))
    assert first["is_split"] and first == second
    texts = {k: [t[max(LENGTHS) :] for t in rows] for k, rows in first["texts"].items()}
    want = [t[len(r) : len(r) + NEW] for t, r in zip(truth, rows, strict=True)]
    for name in ("greedy", "contrary", "assistant", "budget"):
        assert texts[name] == want, name
    assert texts["criteria"] == [t[:END] for t in want]
    options = {**left_pad(rows), "max_new_tokens": NEW, "pad_token_id": 0}
    decoder = SpeculativeDecoder(None, seed=SEEDS)
    plain = model.generate(**options, do_sample=True, custom_generate=decoder)
    assert texts["contrary, sampled"] == plain[:, max(LENGTHS) :].tolist()
    penalized = model.generate(**options, do_sample=False, repetition_penalty=1.3)
    assert texts["contrary, processed"] == penalized[:, max(LENGTHS) :].tolist()


def test_weights_shared_by_processes_with_texts_of_their_own_are_refused(
    tiny_model, monkeypatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(tiny_model, "_is_fsdp_managed_module", True, raising=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is sharded by FSDP or ZeRO-3"):
        specdec_kernels.generate(tiny_model, torch.tensor([[5]]), max_new_tokens=3)


def test_a_model_spread_over_two_devices_is_refused(tiny_model, monkeypatch) -> None:
    inputs = left_pad(random_prompts((5,), VOCAB))
    # a PyTorch without CUDA does not know what their numbers mean
    first, second = (0, 1) if torch.backends.cuda.is_built() else ("cuda:0", "cuda:1")
    spread = {"model.layers.0": first, "model.layers.1": second}
    monkeypatch.setattr(tiny_model, "hf_device_map", spread, raising=False)
    with pytest.raises(ValueError, match="spread over 2 devices by device_map"):
        tiny_model.generate(**inputs, max_new_tokens=3, custom_generate=SpeculativeDecoder())
    monkeypatch.setattr(
        tiny_model, "hf_device_map", {"model": first, "lm_head": "cpu"}, raising=False
    )
    tiny_model.generate(**inputs, max_new_tokens=3, custom_generate=SpeculativeDecoder())


def test_weights_on_disk_work(tmp_path: Path) -> None:
    model = make_tiny_model()
    rows = random_prompts((9, 5), VOCAB)
    truth = [greedy(model, r, 16) for r in rows]
    layers = {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    placed = {**dict.fromkeys(parts, "cpu"), **layers}
    model = accelerate.dispatch_model(
        model, placed, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    decoder = SpeculativeDecoder(OracleDrafter(truth, VOCAB, max_nodes=12))
    output = model.generate(
        **left_pad(rows), max_new_tokens=8, do_sample=False, custom_generate=decoder
    )
    want = [t[len(r) : len(r) + 8] for t, r in zip(truth, rows, strict=True)]
    assert output[:, 9:].tolist() == want
