"""Heads with random weights on disk, in the published formats, and the papers' formulas in plain
PyTorch: one sequence at a time, from scratch, in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels.drafters.eagle import Eagle1Head, Eagle3Head
from specdec_kernels.drafters.medusa import MedusaHeads
from specdec_kernels.drafters.mlp_speculator import MLPSpeculator

SIZE, VOCAB, DRAFT_VOCAB, LAYERS = 64, 101, 40, 6
"""Of the target of `save_all`, and the draft vocabulary of some of its heads."""
LAYERS_OF_EAGLE3 = (2, 3, 3)
Reference = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""Logits [U] from the target's features [n - 1, F] at all of n committed tokens but the root, the
committed tokens, and the draft tokens behind them.
"""

BASE = 5.0


def _random(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        scale = 0.1 if len(shape) == 1 else BASE / math.sqrt(shape[1])
        tensors[name] = torch.randn(list(shape), generator=generator) * scale + is_norm
    return tensors


def draft_ids(vocab: int, draft_vocab: int) -> Tensor:
    """Target id of each draft id, sorted."""
    generator = torch.Generator().manual_seed(3)
    return torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values


def _offsets(ids: Tensor) -> Tensor:
    return ids - torch.arange(len(ids))


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str
) -> None:
    """`config.json` and one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(dict(tensors), folder / file)
    else:
        torch.save(dict(tensors), folder / file)


def medusa_shapes(size: int, vocab: int, heads: int, blocks: int) -> dict[str, list[int]]:
    """As in `medusa_lm_head.pt`."""
    shapes: dict[str, list[int]] = {}
    for i in range(heads):
        for j in range(blocks):
            shapes[f"{i}.{j}.linear.weight"] = [size, size]
            shapes[f"{i}.{j}.linear.bias"] = [size]
        shapes[f"{i}.{blocks}.weight"] = [vocab, size]
    return shapes


def speculator_shapes(size: int, inner: int, vocab: int, heads: int) -> dict[str, list[int]]:
    """As in IBM's accelerators."""
    shapes: dict[str, list[int]] = {}
    for i in range(heads):
        shapes[f"speculator.emb.{i}.weight"] = [vocab, inner]
        shapes[f"speculator.proj.{i}.weight"] = [inner, inner if i else size]
        shapes[f"speculator.ln.{i}.weight"] = [inner]
        shapes[f"speculator.ln.{i}.bias"] = [inner]
        shapes[f"speculator.head.{i}.weight"] = [vocab, inner]
    return shapes


def eagle_shapes(config: Mapping[str, Any], kind: int) -> dict[str, list[int]]:
    """As in EAGLE's heads: kind 1 or 3."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = size // heads
    layer, into = ("layers.0.", size) if kind == 1 else ("midlayer.", 2 * size)
    shapes = {
        "embed_tokens.weight": [config["vocab_size"], size],
        "fc.weight": [size, (2 if kind == 1 else 3) * size],
        f"{layer}self_attn.q_proj.weight": [heads * dim, into],
        f"{layer}self_attn.k_proj.weight": [groups * dim, into],
        f"{layer}self_attn.v_proj.weight": [groups * dim, into],
        f"{layer}self_attn.o_proj.weight": [size, heads * dim],
        f"{layer}mlp.gate_proj.weight": [inner, size],
        f"{layer}mlp.up_proj.weight": [inner, size],
        f"{layer}mlp.down_proj.weight": [size, inner],
        f"{layer}post_attention_layernorm.weight": [size],
    }
    if kind == 1:
        biases = {f"{layer}self_attn.{name}_proj.bias": [count * dim] for name, count in
                  (("q", heads), ("v", groups))}  # fmt: skip
        return {**shapes, **biases, "fc.bias": [size]}
    return {
        **shapes,
        "midlayer.hidden_norm.weight": [size],
        "midlayer.input_layernorm.weight": [size],
        "norm.weight": [size],
        "lm_head.weight": [config["draft_vocab_size"], size],
    }


def save_medusa(
    folder: Path,
    size: int,
    vocab: int,
    *,
    file: str = "medusa_lm_head.pt",
    draft_vocab: int | None = None,
    rows_of: PreTrainedModel | None = None,
) -> Reference:
    """Three heads of two blocks; the config names two heads only, as a published one does. Their
    last layers may cover a draft vocabulary, and be rows of a target's head.
    """
    ids = draft_ids(vocab, draft_vocab or vocab)
    weights = _random(medusa_shapes(size, len(ids), 3, 2))
    prefix = "medusa_head." if file.endswith(".safetensors") else ""
    config = {"medusa_num_heads": 2, "medusa_num_layers": 2}
    own = {name: weights.pop(name) for name in ("0.2.weight", "1.2.weight", "2.2.weight")}
    if rows_of is None:
        weights |= own
    else:
        config["draft_vocab_size"] = len(ids)
        head = rows_of.get_output_embeddings().weight.detach()[ids]
        own = dict.fromkeys(own, head)
    if draft_vocab:
        config["vocab_size"] = vocab
        weights["d2t"] = _offsets(ids)
    write(folder, config, {prefix + name: w for name, w in weights.items()}, file)
    w = {name: tensor.double() for name, tensor in (weights | own).items()}

    def reference(features: Tensor, tokens: Sequence[int], drafted: Sequence[int]) -> Tensor:
        i, h = len(drafted), features[-1]
        for j in range(2):
            z = w[f"{i}.{j}.linear.weight"] @ h + w[f"{i}.{j}.linear.bias"]
            h = h + z / (1 + torch.exp(-z))
        return w[f"{i}.2.weight"] @ h

    return reference


def save_speculator(
    folder: Path,
    size: int,
    vocab: int,
    *,
    inner: int = 24,
    tied: bool = False,
    scaled: bool = True,
    draft_vocab: int | None = None,
    embeddings_of: PreTrainedModel | None = None,
) -> Reference:
    """Four heads, which may cover a draft vocabulary; their embeddings may be a target's."""
    heads = 4
    ids = draft_ids(vocab, draft_vocab or vocab)
    weights = _random(speculator_shapes(size, inner, vocab, heads))
    if draft_vocab:
        for i in range(heads):
            weights[f"speculator.head.{i}.weight"] = weights[f"speculator.head.{i}.weight"][ids]
    if tied:
        for name in list(weights):
            _, kind, i, rest = name.split(".")
            first = 1 if kind == "proj" else 0
            weights[name] = weights[f"speculator.{kind}.{min(int(i), first)}.{rest}"].clone()
    config = {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "emb_dim": size,
        "inner_dim": inner,
        "n_predict": heads,
        "vocab_size": vocab,
        "tie_weights": tied,
        "scale_input": scaled,
    }
    stored = dict(weights)
    if draft_vocab:
        config["draft_vocab_size"] = draft_vocab
        stored["speculator.d2t"] = _offsets(ids)
    if embeddings_of is not None:
        for name in [name for name in stored if ".emb." in name]:
            del stored[name]
            weights[name] = embeddings_of.get_input_embeddings().weight.detach()
    write(folder, config, stored, "model.safetensors")
    w = {name.removeprefix("speculator."): tensor.double() for name, tensor in weights.items()}
    alpha = 0.5 ** (0.5 / heads)
    beta = math.sqrt((1 - alpha**2) * inner / 2)

    def reference(features: Tensor, tokens: Sequence[int], drafted: Sequence[int]) -> Tensor:
        s = features[-1]
        if scaled:
            s = s / (s @ s / len(s) + 1e-6).sqrt() / math.sqrt(2)
        for i, token in enumerate([tokens[-1], *drafted]):
            z = w[f"proj.{i}.weight"] @ s + beta / alpha * w[f"emb.{i}.weight"][token]
            z = z / (z @ z / inner + 1e-6).sqrt() * w[f"ln.{i}.weight"] + w[f"ln.{i}.bias"]
            s = z * (1 + torch.erf(z / math.sqrt(2))) / 2
        return w[f"head.{len(drafted)}.weight"] @ s

    return reference


def eagle_config(size: int, vocab: int, **more: Any) -> dict[str, Any]:
    """Of a Llama with one layer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        **more,
    }


def save_eagle1(folder: Path, size: int, vocab: int, target: PreTrainedModel) -> Reference:
    """Features go into the target's own head."""
    config = eagle_config(size, vocab, rope_theta=500.0)
    weights = _random(eagle_shapes(config, 1))
    # Nothing is normed before the attention: larger ones would leave each entry a single key, and
    # rounding which.
    weights["fc.weight"] *= 0.1
    write(folder, config, weights, "pytorch_model.bin")
    w = {name.replace("layers.0.", ""): tensor.double() for name, tensor in weights.items()}
    head = target.get_output_embeddings().weight.double()
    theta = torch.tensor([500.0 ** (-i / 8) for i in range(8)]).double()

    def reference(features: Tensor, tokens: Sequence[int], drafted: Sequence[int]) -> Tensor:
        outputs: list[Tensor] = []
        inputs: list[Tensor] = []
        known = list(features)
        for token in [*tokens[1:], *drafted]:
            feature = known.pop(0) if known else outputs[-1]
            joined = torch.cat([w["embed_tokens.weight"][token], feature])
            inputs.append(w["fc.weight"] @ joined + w["fc.bias"])
            if not known:  # nobody asks for the layer's output where the target's feature is known
                outputs.append(_decoder_layer(w, inputs, inputs, theta, config))
        return head @ outputs[-1]

    return reference


def save_eagle3(
    folder: Path,
    size: int,
    vocab: int,
    draft_vocab: int,
    *,
    llama3: bool = True,
    rows_of: PreTrainedModel | None = None,
) -> Reference:
    """Its reference takes features [n, 3 * size]. Its head may be rows of a target's."""
    config = eagle_config(size, vocab, draft_vocab_size=draft_vocab)
    low, high, length, factor = 1.0, 4.0, 16, 8.0
    if llama3:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
    weights = _random(eagle_shapes(config, 3))
    ids = draft_ids(vocab, draft_vocab)
    known = torch.zeros(vocab, dtype=torch.bool)
    known[ids] = True
    stored = {**weights, "d2t": _offsets(ids), "t2d": known}
    if rows_of is not None:
        del stored["lm_head.weight"]
        weights["lm_head.weight"] = rows_of.get_output_embeddings().weight.detach()[ids]
    write(folder, config, stored, "pytorch_model.bin")
    w = {name.replace("midlayer.", ""): tensor.double() for name, tensor in weights.items()}
    theta = torch.tensor([10000.0 ** (-2 * i / 16) for i in range(8)]).double()
    if llama3:
        for i, rate in enumerate(theta.tolist()):
            wavelength = 2 * math.pi / rate
            if wavelength > length / low:
                theta[i] = rate / factor
            elif wavelength >= length / high:
                smooth = (length / wavelength - low) / (high - low)
                theta[i] = (1 - smooth) * rate / factor + smooth * rate

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x @ x / len(x) + 1e-5).sqrt() * weight

    def reference(features: Tensor, tokens: Sequence[int], drafted: Sequence[int]) -> Tensor:
        residuals: list[Tensor] = []
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        known = [w["fc.weight"] @ feature for feature in features]
        for token in [*tokens[1:], *drafted]:
            g = known.pop(0) if known else outputs[-1]
            e = norm(w["embed_tokens.weight"][token], w["input_layernorm.weight"])
            inputs.append(torch.cat([e, norm(g, w["hidden_norm.weight"])]))
            residuals.append(g)
            if not known:
                outputs.append(_decoder_layer(w, inputs, residuals, theta, config))
        return w["lm_head.weight"] @ norm(outputs[-1], w["norm.weight"])

    return reference


def _decoder_layer(
    w: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    residuals: Sequence[Tensor],
    theta: Tensor,
    config: Mapping[str, Any],
) -> Tensor:
    """Output at the last position of a Llama layer, rotations as complex numbers."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    x = torch.stack(list(inputs))

    def projected(name: str, count: int) -> Tensor:
        values = x @ w[f"self_attn.{name}_proj.weight"].T + w.get(f"self_attn.{name}_proj.bias", 0)
        return values.reshape(len(x), count, dim)

    def rotated(name: str, count: int) -> Tensor:
        values = projected(name, count)
        pairs = torch.complex(values[..., : dim // 2], values[..., dim // 2 :])
        angles = torch.arange(len(x)).double()[:, None, None] * theta[: dim // 2]
        turned = pairs * torch.exp(1j * angles)
        return torch.cat([turned.real, turned.imag], -1)

    q, k, v = rotated("q", heads)[-1], rotated("k", groups), projected("v", groups)
    mixed = []
    for h in range(heads):
        g = h * groups // heads
        probs = torch.softmax(k[:, g] @ q[h] / math.sqrt(dim), 0)
        mixed.append(probs @ v[:, g])
    hidden = residuals[-1] + w["self_attn.o_proj.weight"] @ torch.cat(mixed)
    inner = hidden / (hidden @ hidden / len(hidden) + config["rms_norm_eps"]).sqrt()
    inner = inner * w["post_attention_layernorm.weight"]
    gate = w["mlp.gate_proj.weight"] @ inner
    inner = gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ inner)
    return hidden + w["mlp.down_proj.weight"] @ inner


def save_all(folder: Path, target: PreTrainedModel) -> dict[str, Any]:
    """Heads of every kind: name -> (folder, class, formula, layers of their features)."""
    made: dict[str, Any] = {}

    def add(name: str, kind: type, layers: Sequence[int], save: Callable[..., Any], **more: Any):
        formula = save(folder / name, SIZE, VOCAB, **more)
        made[name] = (folder / name, kind, formula, layers)

    add("medusa", MedusaHeads, (), save_medusa)
    add("medusa-safetensors", MedusaHeads, (), save_medusa, file="model.safetensors")
    add("speculator", MLPSpeculator, (), save_speculator)
    add("speculator-tied", MLPSpeculator, (), save_speculator, tied=True, scaled=False)
    some = {"draft_vocab": DRAFT_VOCAB}
    add("medusa-some", MedusaHeads, (), save_medusa, **some)
    add("medusa-rows", MedusaHeads, (), save_medusa, rows_of=target, **some)
    add("speculator-some", MLPSpeculator, (), save_speculator, tied=True, **some)
    lent = {"embeddings_of": target, "inner": SIZE}
    add("speculator-lent", MLPSpeculator, (), save_speculator, **lent)
    rows = {"rows_of": target, **some}
    add("eagle-3-rows", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, **rows)
    add("eagle-1", Eagle1Head, (), save_eagle1, target=target)
    add("eagle-3", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, draft_vocab=DRAFT_VOCAB)
    add("eagle-3-full", Eagle3Head, LAYERS_OF_EAGLE3, save_eagle3, draft_vocab=VOCAB, llama3=False)
    return made
