"""Checkpoints of heads that are refused: what does not fit is named, and nothing in them is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import DRAFT_VOCAB, LAYERS, SIZE, VOCAB, save_all, save_eagle3, save_medusa
from prompts import left_pad, random_prompts
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from specdec_kernels import ModelDrafter, SpeculativeDecoder, load_heads


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_tiny_model(LAYERS)


@pytest.fixture(scope="module")
def saved(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return save_all(tmp_path_factory.mktemp("heads"), target)


def _rewritten(folder: Path, to: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy of a checkpoint with its config and tensors changed."""
    config = json.loads((folder / "config.json").read_text())
    (source,) = [path for path in folder.iterdir() if path.name != "config.json"]
    is_safe = source.suffix == ".safetensors"
    tensors = load_file(source) if is_safe else torch.load(source, weights_only=True)
    change(config, tensors)
    to.mkdir(exist_ok=True)
    (to / "config.json").write_text(json.dumps(config))
    if is_safe:
        save_file({k: v.contiguous() for k, v in tensors.items()}, to / source.name)
    else:
        torch.save(tensors, to / source.name)
    return to


def _drop(key: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.pop(key)


def _cut(key: str) -> Callable[[dict, dict], None]:
    def change(config: dict, tensors: dict) -> None:
        tensors[key] = tensors[key][:-1].clone()

    return change


def _set(key: str, value: object) -> Callable[[dict, dict], None]:
    return lambda config, tensors: config.update({key: value})


def _add(key: str) -> Callable[[dict, dict], None]:
    return lambda config, tensors: tensors.update({key: torch.zeros(64)})


def _shift_id(config: dict, tensors: dict) -> None:
    tensors["d2t"][0] = -1


def _repeat_id(config: dict, tensors: dict) -> None:
    tensors["d2t"][1] = tensors["d2t"][0] - 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medusa", _drop("1.0.linear.bias"),
         r"medusa_lm_head.pt: must have the tensor 1.0.linear.bias \[64\], found 14 others: 0.0"),
        ("medusa", _cut("0.1.linear.weight"),
         r"medusa_lm_head.pt: 0.1.linear.weight must be \[64, 64\], found \[63, 64\]"),
        ("medusa", _set("medusa_num_heads", 4),
         r"medusa_lm_head.pt: must have the tensor 3.0.linear.weight \[64, 64\]"),
        ("speculator", _drop("speculator.proj.2.weight"),
         r"model.safetensors: must have the tensor speculator.proj.2.weight \[24, 24\]"),
        ("speculator", _set("inner_dim", 23),
         r"speculator.emb.0.weight must be \[101, 23\], found \[101, 24\]"),
        ("speculator", _set("vocab_size", "many"),
         r"config.json: vocab_size must be a number >= 1, found 'many'"),
        ("eagle-1", _cut("fc.weight"),
         r"pytorch_model.bin: fc.weight must be \[64, 128\], found \[63, 128\]"),
        ("eagle-1", _drop("layers.0.mlp.up_proj.weight"),
         r"must have the tensor layers.0.mlp.up_proj.weight \[48, 64\]"),
        ("eagle-1", _set("num_hidden_layers", 2), r"num_hidden_layers must be 1, found 2"),
        ("eagle-1", _set("hidden_act", "gelu"), r"hidden_act must be silu, found 'gelu'"),
        ("eagle-1", _set("rope_scaling", {"rope_type": "yarn"}), r"must be one of .*found 'yarn'"),
        ("eagle-3", _drop("d2t"), r"must have the tensor d2t \[40\]"),
        ("eagle-3", _drop("midlayer.hidden_norm.weight"),
         r"must have the tensor midlayer.hidden_norm.weight \[64\]"),
        ("eagle-3", _set("draft_vocab_size", 41),
         r"lm_head.weight must be \[41, 64\], found \[40, 64\]"),
        ("medusa", _add("0.2.bias"), r"medusa_lm_head.pt: must have no tensor 0.2.bias, found"),
        ("speculator", _add("speculator.forget_ln.0.weight"), r"no tensor speculator.forget_ln"),
        ("eagle-1", _add("layers.0.input_layernorm.weight"),
         r"pytorch_model.bin: must have no tensor layers.0.input_layernorm.weight, found \[64\]"),
        ("eagle-3", _add("midlayer.mlp.up_proj.bias"), r"no tensor midlayer.mlp.up_proj.bias"),
        ("medusa-some", _shift_id, r"d2t must map draft ids to .* found \[-1, "),
        ("medusa-some", _drop("1.2.weight"), r"must have the tensor 1.2.weight \[40, 64\]"),
        ("medusa-rows", _cut("d2t"), r"medusa_lm_head.pt: d2t must be \[40\]"),
        ("speculator-some", _drop("speculator.d2t"), r"must have the tensor speculator.d2t \[40\]"),
        ("speculator-lent", _set("inner_dim", 24),
         r"must have the tensor speculator.emb.0.weight \[101, 24\]"),
        ("eagle-3", _repeat_id, r"d2t must map draft ids to distinct target ids in \[0, 101\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    saved, tmp_path: Path, name: str, change: Callable[[dict, dict], None], message: str
) -> None:
    folder = _rewritten(saved[name][0], tmp_path / "changed", change)
    with pytest.raises(ValueError, match=message) as error:
        load_heads(folder)
    assert str(error.value).startswith(str(folder))


def test_a_folder_that_holds_no_heads_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no such folder"):
        load_heads(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        load_heads(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (
        ("{", r"config.json: cannot be read"),
        ("[]", r"config.json: must be a JSON object, found list"),
        ("{}", r"must have \*.safetensors, \*.bin or \*.pt, found none"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_heads(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        load_heads(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config.json: must describe Medusa .*model_type None"):
        load_heads(tmp_path)
    index = {"weight_map": {"x": "model.safetensors", "y": "more.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json: must have the file more.safetensors"):
        load_heads(tmp_path)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('ran')",))

    (tmp_path / "config.json").write_text('{"medusa_num_heads": 1}')
    torch.save({"0.1.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_lm_head.pt: cannot be read"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((60, VOCAB), r"for a hidden size of 60, LlamaForCausalLM has 64"),
     ((SIZE, 99), r"for a vocabulary of 99, LlamaForCausalLM has 101")],
)  # fmt: skip
def test_heads_for_another_target_are_refused(
    target, tmp_path: Path, sizes: tuple[int, int], message: str
) -> None:
    save_medusa(tmp_path, *sizes)
    decoder = SpeculativeDecoder(ModelDrafter(load_heads(tmp_path)))
    (row,) = random_prompts((5,), VOCAB)
    with pytest.raises(ValueError, match=message):
        target.generate(**left_pad([row]), max_new_tokens=3, custom_generate=decoder)


def test_features_of_layers_that_the_target_lacks_are_refused(tmp_path: Path) -> None:
    save_eagle3(tmp_path, SIZE, VOCAB, DRAFT_VOCAB)
    decoder = SpeculativeDecoder(ModelDrafter(load_heads(tmp_path)))
    (row,) = random_prompts((5,), VOCAB)
    with pytest.raises(ValueError, match=r"come from the layers \[2, 1, -1\], it has 2"):
        make_tiny_model(2).generate(**left_pad([row]), max_new_tokens=3, custom_generate=decoder)
