"""A small random model on disk with a tokenizer of bytes, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_kernels.hf.text import TextModel

POSITIONS = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def save_byte_model(path: Path, *, num_layers: int = 2, positions: int = POSITIONS) -> None:
    """A random model that soon repeats itself, with one token per byte."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {s: i for i, s in enumerate(["<pad>", "<user>", "<model>", *symbols])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<model>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def greedy_tokens(subject: TextModel, text: str, num_tokens: int) -> list[int]:
    """What `generate` alone writes after a raw text."""
    ids = subject.tokenizer(text, return_tensors="pt")
    output = subject.model.generate(**ids, max_new_tokens=num_tokens, do_sample=False)
    return output[0, ids["input_ids"].shape[1] :].tolist()
