"""Speculative streaming: the formula, that the target keeps nothing of it, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from head_checkpoints import write
from prompts import greedy, left_pad, random_prompts
from torch import Tensor
from torch.nn.functional import silu
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec_kernels import (
    AutoDrafter,
    DraftContext,
    ModelDrafter,
    SampledTree,
    SpeculativeDecoder,
    TopKTree,
    load_heads,
)
from specdec_kernels.drafting import GREEDY
from specdec_kernels.hf.attention import tree_attention_in
from specdec_kernels.hf.features import HFTargetView
from specdec_kernels.hf.target import HFTarget
from specdec_kernels.shapes import PAD
from specdec_kernels.tree import TokenTree

VOCAB, SIZE, INNER, STREAMS, RANK = 101, 64, 128, 3, 4
NEW = 20
ADAPTERS = {
    "self_attn.q_proj": (SIZE, SIZE),
    "self_attn.k_proj": (SIZE // 2, SIZE),
    "self_attn.v_proj": (SIZE // 2, SIZE),
    "self_attn.o_proj": (SIZE, SIZE),
    "mlp.gate_proj": (INNER, SIZE),
    "mlp.up_proj": (INNER, SIZE),
    "mlp.down_proj": (SIZE, INNER),
}
CONFIG = {
    "model_type": "speculative_streaming",
    "num_streams": STREAMS,
    "num_layers": 2,
    "hidden_size": SIZE,
    "vocab_size": VOCAB,
    "draft_vocab_size": 40,
}
IDS = torch.arange(1, 80, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model().requires_grad_(False)


@pytest.fixture(scope="module")
def rows() -> list[Tensor]:
    return random_prompts((13, 22, 18), VOCAB, seed=4)


def _tensors(num_layers: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {
        "streams": random(STREAMS, SIZE),
        "enter.down": random(RANK, SIZE),
        "enter.up": random(SIZE, RANK),
        "d2t": (IDS - torch.arange(len(IDS))).int(),
    }
    for i in range(num_layers):
        for name, (out, into) in ADAPTERS.items():
            tensors[f"{i}.{name}.down"] = random(RANK, into)
            tensors[f"{i}.{name}.up"] = random(out, RANK)
    return tensors


def _saved(folder: Path, *, without: Sequence[str] = (), **changes: Any) -> Path:
    tensors = {name: t for name, t in _tensors().items() if name not in without}
    tensors |= {name: t for name, t in changes.items() if isinstance(t, Tensor)}
    config = CONFIG | {name: v for name, v in changes.items() if not isinstance(v, Tensor)}
    write(folder, config, tensors, "model.safetensors")
    return folder


def _context(rows: Sequence[Sequence[int]]) -> DraftContext:
    num = len(rows)
    return DraftContext(rows, [True] * num, [60] * num, torch.device("cpu"), VOCAB, GREEDY)


def _reference(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits [J, U] of the streams behind the last token, row by row from the paper's formula."""
    w, decoder = _tensors(), model.get_decoder()
    out = model(torch.tensor([tokens]), output_hidden_states=True)
    base = out.hidden_states[1][0]
    last, num = len(tokens) - 1, len(tokens)
    h = base[last] + w["enter.up"] @ (w["enter.down"] @ base[last]) + w["streams"]
    for i, layer in enumerate(decoder.layers[1:]):

        def product(name: str, x: Tensor, i: int = i, layer: Any = layer) -> Tensor:
            weight = layer.get_submodule(name).weight
            return x @ (weight + w[f"{i}.{name}.up"] @ w[f"{i}.{name}.down"]).T

        normed_base, normed = layer.input_layernorm(base), layer.input_layernorm(h)
        attention = layer.self_attn
        keys = [attention.k_proj(normed_base), product("self_attn.k_proj", normed)]
        values = [attention.v_proj(normed_base), product("self_attn.v_proj", normed)]
        q = product("self_attn.q_proj", normed).view(STREAMS, 4, 16).transpose(0, 1)
        k = torch.cat(keys).view(-1, 2, 16).transpose(0, 1).repeat_interleave(2, 0)
        v = torch.cat(values).view(-1, 2, 16).transpose(0, 1).repeat_interleave(2, 0)
        positions = torch.cat([torch.arange(num), last + 1 + torch.arange(STREAMS)])
        cos, sin = decoder.rotary_emb(k, positions[None])
        k = apply_rotary_pos_emb(k[None], k[None], cos, sin)[0][0]
        q = apply_rotary_pos_emb(q[None], q[None], cos[:, num:], sin[:, num:])[0][0]
        mask = torch.ones(STREAMS, num + STREAMS, dtype=torch.bool).tril(num)
        scores = (q @ k.transpose(1, 2) / 4).masked_fill(~mask, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        h = h + product("self_attn.o_proj", mixed)
        x = layer.post_attention_layernorm(h)
        h = h + product(
            "mlp.down_proj", silu(product("mlp.gate_proj", x)) * product("mlp.up_proj", x)
        )
        base = layer(
            base[None], position_embeddings=decoder.rotary_emb(base, torch.arange(num)[None])
        )[0]
    return decoder.norm(h) @ model.lm_head.weight[IDS].T


def test_streams_behind_the_last_kept_node_compute_the_papers_formula(
    model: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    network = load_heads(_saved(tmp_path))
    target = HFTarget(model, capacity=120)
    sequences = [row.tolist() for row in rows]
    kept = [2, 0, 3]  # the second row has ended, and keeps no streams
    with torch.no_grad(), tree_attention_in(model), network.attach(HFTargetView(target)):
        target.prefill(sequences)
        assert not network.start(_context(sequences)).any()  # no streams yet: all tokens alike
        trees = [([5, 9, 7, 6], [PAD, 0, 0, 2]), ([], []), ([8, 3, 4], [PAD, 0, 1])]
        plain_tree = TokenTree.from_rows(trees, "cpu")
        target.forward(plain_tree)
        path = torch.tensor([[0, 2, 3, PAD], [PAD] * 4, [0, 1, 2, PAD]], dtype=torch.int32)
        target.commit(path, torch.tensor(kept, dtype=torch.int32))
        logits = [network.start(_context(sequences))]
        logits += [network.extend([[(1, PAD)]] * 3)[:, 0] for _ in range(STREAMS - 1)]
    want = {0: [*sequences[0], 5, 7], 2: [*sequences[2], 8, 3, 4]}
    for b, tokens in want.items():
        reference = _reference(model, tokens)
        own = torch.stack([level[b] for level in logits])
        torch.testing.assert_close(own, reference, atol=2e-4, rtol=1e-4)
        assert float(reference.std()) > 0.5
        assert float((reference[0] - reference[1]).abs().max()) > 0.5
    assert not torch.stack([level[1] for level in logits]).any()


def test_what_the_target_computes_and_keeps_is_its_own(
    model: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    """Logits and committed keys and values with streams, and without."""
    network = load_heads(_saved(tmp_path))
    sequences = [row.tolist() for row in rows]
    trees = [([5, 9, 7, 6], [PAD, 0, 0, 2]), ([4], [PAD]), ([8, 3, 4], [PAD, 0, 1])]
    path = torch.tensor([[0, 2, 3, PAD], [0, PAD, PAD, PAD], [0, 1, PAD, PAD]], dtype=torch.int32)
    num_kept = torch.tensor([3, 1, 2], dtype=torch.int32)
    results = []
    for is_attached in (False, True):
        target = HFTarget(model, capacity=120)
        attached = network.attach(HFTargetView(target)) if is_attached else nullcontext()
        logits = []
        with torch.no_grad(), tree_attention_in(model), attached:
            target.prefill(sequences)
            for _ in range(3):
                logits.append(target.forward(TokenTree.from_rows(trees, "cpu")))
                target.commit(path, num_kept)
        cache = target.cache
        assert cache.lengths is not None
        kept = [
            buffer[b, :, :length]
            for layer in cache.tree_layers
            for buffer in (layer.keys, layer.values)
            for b, length in enumerate(cache.lengths.tolist())
        ]
        own = [level[b, : len(tree[0])] for level in logits for b, tree in enumerate(trees)]
        results.append([*own, *kept])
    for plain, streaming in zip(*results, strict=True):
        torch.testing.assert_close(streaming, plain, atol=1e-5, rtol=1e-5)


def test_rotary_embeddings_that_change_with_the_largest_position_stay_the_target_s(
    rows: list[Tensor], tmp_path: Path
) -> None:
    """Streams lie beyond the last position, where these would be scaled."""
    config = make_tiny_model().config
    config.max_position_embeddings = 24
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    text = rows[1].tolist()[:21]
    results = []
    for network in (None, load_heads(_saved(tmp_path))):
        target = HFTarget(model, capacity=40)
        attached = network.attach(HFTargetView(target)) if network else nullcontext()
        with torch.no_grad(), tree_attention_in(model), attached:
            target.prefill([text])
            tree = TokenTree.from_rows([([5, 9, 7], [PAD, 0, 1])], "cpu")
            results.append([target.forward(tree) for _ in range(2)])
    for plain, streaming in zip(*results, strict=True):
        torch.testing.assert_close(streaming, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tree", [SampledTree((2, 1)), SampledTree((2, 2), greedy_drafts=True)])
def test_sampled_trees_draw_from_streams_from_the_first_step_on(
    model: Any, rows: list[Tensor], tmp_path: Path, tree: SampledTree
) -> None:
    decoder = SpeculativeDecoder(
        ModelDrafter(load_heads(_saved(tmp_path)), tree), seed=3, budget=False
    )
    model.generate(**left_pad(rows), do_sample=True, max_new_tokens=9, custom_generate=decoder)
    assert decoder.stats is not None and not decoder.stats.num_failures
    assert sum(decoder.stats.num_drafted) > 20


def test_layers_with_other_embeddings_are_refused(
    model: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    def without(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": [cos, sin]}

    hook = model.get_decoder().layers[1].register_forward_pre_hook(without, with_kwargs=True)
    decoder = SpeculativeDecoder(ModelDrafter(load_heads(_saved(tmp_path))), budget=False)
    with pytest.raises(ValueError, match=r"rotary embeddings as cos and sin \[B, N, D\], got list"):
        model.generate(**left_pad(rows), max_new_tokens=4, custom_generate=decoder)
    hook.remove()


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["alone", "merged"])
def test_the_text_is_the_target_s_and_the_model_is_left_as_it_was(
    model: Any, rows: list[Tensor], tmp_path: Path, name: str, sampled: bool
) -> None:
    network = load_heads(_saved(tmp_path))
    drafter: Any = ModelDrafter(network, TopKTree(9, depth=4, width=2))
    if name == "merged":
        drafter = AutoDrafter(9, heads=network, min_probability=0.0)
    options = {"do_sample": sampled, "max_new_tokens": NEW}
    options |= {"temperature": 0.8, "top_p": 0.9} if sampled else {}
    before = {name: list(module._forward_hooks) for name, module in model.named_modules()}
    for chosen in ([0, 1, 2], [1]):
        inputs = left_pad([rows[i] for i in chosen])
        decoder = SpeculativeDecoder(drafter, seed=chosen, budget=False)
        output = model.generate(**inputs, custom_generate=decoder, **options)
        if sampled:
            plain = SpeculativeDecoder(None, seed=chosen)
            assert output.equal(model.generate(**inputs, custom_generate=plain, **options))
        else:
            assert output[:, inputs["input_ids"].shape[1] :].tolist() == [
                greedy(model, rows[i], NEW)[len(rows[i]) :] for i in chosen
            ]
        assert decoder.stats is not None and not decoder.stats.num_failures
        drafted = sum(decoder.stats.num_drafted)
        assert drafted > 4 * sum(decoder.stats.num_steps), "streams must draft"
    for name, module in model.named_modules():
        assert list(module._forward_hooks) == before[name]
        assert not module._forward_pre_hooks


def test_a_conversation_that_goes_on_from_a_cache_has_streams_at_once(
    model: Any, rows: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_heads(_saved(tmp_path))
    starts: list[Tensor] = []
    start = network.start
    monkeypatch.setattr(network, "start", lambda c: starts.append(start(c)) or starts[-1])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    decoder = SpeculativeDecoder(ModelDrafter(network, TopKTree(5)), budget=False)
    first = model.generate(**left_pad(rows), custom_generate=decoder, **options)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    longer = [torch.tensor([*greedy(model, row, 3), 7, 8]) for row in rows]
    inputs = left_pad(longer)
    second = model.generate(**inputs, custom_generate=decoder, past_key_values=cache, **options)
    new = second.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert new == [greedy(model, row, 3)[len(row) :] for row in longer]
    # In each call the last of two steps has no room for drafts.
    assert [bool(logits.any(1).all()) for logits in starts] == [False, True]


def test_an_error_between_the_layers_leaves_the_model_as_it_was(
    model: Any, rows: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = ModelDrafter(load_heads(_saved(tmp_path)), TopKTree(5))
    last = model.get_decoder().layers[-1]
    hook = last.mlp.register_forward_pre_hook(_raise_at_second())
    with pytest.raises(ArithmeticError, match="planted"):
        model.generate(
            **left_pad(rows),
            max_new_tokens=6,
            custom_generate=SpeculativeDecoder(drafter, budget=False),
        )
    hook.remove()
    want = greedy(model, rows[0], 6)
    for decoder in (SpeculativeDecoder(None), SpeculativeDecoder(drafter, budget=False)):
        output = model.generate(
            **left_pad(rows[:1]), max_new_tokens=6, do_sample=False, custom_generate=decoder
        )
        assert output[0].tolist() == want


def _raise_at_second() -> Any:
    calls = 0

    def hook(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the prefill is the first
            raise ArithmeticError("planted")

    return hook


def test_another_thread_may_use_the_model_in_the_middle_of_a_step(
    model: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    """It generates while the last layer of a step with streams waits."""
    drafter = ModelDrafter(load_heads(_saved(tmp_path)), TopKTree(5))
    here, others, num_calls = threading.get_ident(), [], 0

    def generate(row: Tensor, drafter: Any) -> list[int]:
        decoder = SpeculativeDecoder(drafter, budget=False)
        options = {"max_new_tokens": 6, "do_sample": False, "custom_generate": decoder}
        return model.generate(**left_pad([row]), **options)[0].tolist()

    def interrupt(module: Any, args: Any) -> None:
        nonlocal num_calls
        if threading.get_ident() == here:
            num_calls += 1
            if num_calls in (2, 3):  # the prefill is the first
                with ThreadPoolExecutor(1) as pool:
                    others.append(pool.submit(generate, rows[1], None).result())

    hook = model.get_decoder().layers[-1].mlp.register_forward_pre_hook(interrupt)
    own = generate(rows[0], drafter)
    hook.remove()
    assert own == greedy(model, rows[0], 6)
    assert others == [greedy(model, rows[1], 6)] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_streams": 2}, r"model.safetensors: streams must be \[2, 64\], found \[3, 64\]"),
        ({"num_layers": 3}, r"before 1 to 2 layers, got 3"),
        ({"num_layers": 1}, r"adapter 1.* is for a linear layer \[.*\] in the last 1 layers"),
        ({"hidden_size": 32}, r"streams must be \[3, 32\]"),
        ({"vocab_size": 90}, r"are for a vocabulary of 90, LlamaForCausalLM has 101"),
        ({"1.mlp.up_proj.up": torch.zeros(9, RANK)}, r"1.mlp.up_proj is for .*\[9, 64\]"),
        ({"1.mlp.up_proj.up": torch.zeros(INNER, 9)}, r"up_proj.down must be \[9, 64\]"),
        ({"0.mlp.other.down": torch.zeros(2, 2)}, r"0.mlp.other.up"),
        ({"more": torch.zeros(2)}, r"must have no tensor more"),
    ],
)
def test_what_does_not_fit_is_named(
    model: Any, rows: list[Tensor], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = _saved(tmp_path, **changes)

    def generate() -> None:
        decoder = SpeculativeDecoder(ModelDrafter(load_heads(folder)), budget=False)
        model.generate(**left_pad(rows[:1]), max_new_tokens=4, custom_generate=decoder)

    with pytest.raises(ValueError, match=message):
        generate()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have the tensor 0.mlp.up_proj.up"):
        load_heads(_saved(tmp_path, without=["0.mlp.up_proj.up"]))


def test_targets_that_streams_cannot_enter_are_refused(
    model: Any, rows: list[Tensor], tmp_path: Path
) -> None:
    drafter = ModelDrafter(load_heads(_saved(tmp_path)))
    decoder = SpeculativeDecoder(drafter, compile="eager", budget=False)
    with pytest.raises(ValueError, match="cannot run in compiled steps"):
        model.generate(**left_pad(rows[:1]), max_new_tokens=4, custom_generate=decoder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=96, n_embd=SIZE, n_layer=3, n_head=4, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    other: PreTrainedModel = GPT2LMHeadModel(config).eval()
    with pytest.raises(ValueError, match="has no decoder layers that streams could enter"):
        other.generate(
            **left_pad(rows[:1]),
            max_new_tokens=4,
            custom_generate=SpeculativeDecoder(drafter, budget=False),
        )
