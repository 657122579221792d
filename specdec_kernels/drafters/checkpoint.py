"""Checkpoints of trained heads: a folder with `config.json` and one or more files of tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_INDEX_SUFFIX = ".index.json"


class Checkpoint:
    """The tensors of a folder, taken by name with the shape that they must have.

    Args:
        folder: has `config.json`, and tensors in `*.safetensors` files, else in `*.bin` or `*.pt`
            files, which are read without running code.

    Attributes:
        folder: its path.
        config: the content of `config.json`.

    Raises:
        ValueError: no such folder or file, or one that cannot be read, by its path.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder / "config.json")
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for path in _tensor_files(self.folder):
            for key, tensor in _read_tensors(path).items():
                self._tensors[key] = tensor
                self._files[key] = path
        self._prefix = ""
        self._taken: set[str] = set()

    def strip(self, prefixes: Sequence[str]) -> None:
        """Leave the first of these prefixes that a key has out of all names from now on."""
        for prefix in prefixes:
            if any(key.startswith(prefix) for key in self._tensors):
                self._prefix = prefix
                return

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def names(self, suffix: str) -> list[str]:
        """Of the tensors that end so, without that, sorted."""
        start = len(self._prefix)
        return sorted(
            key[start:].removesuffix(suffix)
            for key in self._tensors
            if key.startswith(self._prefix) and key.endswith(suffix)
        )

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: it is missing, or has another shape; names file, key, expected and found.
        """
        key = self._prefix + name
        if key not in self._tensors:
            files = ", ".join(path.name for path in dict.fromkeys(self._files.values()))
            found = ", ".join(sorted(self._tensors)[:6])
            raise ValueError(
                f"{self.folder / files}: must have the tensor {key} {list(shape)}, "
                f"found {len(self._tensors)} others: {found}, ..."
            )
        tensor = self._tensors[key]
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"{self._files[key]}: {key} must be {list(shape)}, found {list(tensor.shape)}"
            )
        self._taken.add(key)
        return tensor

    def refuse_others(self, name: str = "", *, ignore: tuple[str, ...] = ()) -> None:
        """Raise ValueError for a tensor whose name starts like this and that nobody took, unless
        one of `ignore` follows: the formula would be another one with it.
        """
        start = self._prefix + name
        ignored = tuple(start + after for after in ignore)
        for key in sorted(self._tensors):
            if key.startswith(start) and key not in self._taken and not key.startswith(ignored):
                raise ValueError(
                    f"{self._files[key]}: must have no tensor {key}, found "
                    f"{list(self._tensors[key].shape)}, which these heads have no use for"
                )

    def shape(self, name: str, dims: int) -> list[int]:
        """The shape of a tensor with so many dimensions, for sizes that no config tells."""
        key = self._prefix + name
        tensor = self._tensors.get(key)
        if tensor is None or tensor.dim() != dims:
            self.take(name, [-1] * dims)
        assert tensor is not None
        return list(tensor.shape)

    def number(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the config.

        Raises:
            ValueError: it is missing without default, or something else.
        """
        value = self.config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{self.folder / 'config.json'}: {name} must be a number >= 1, found {value!r}"
            )
        return value

    def refuse(self, name: str, value: object, supported: str) -> ValueError:
        """The error for a setting that would change the formula."""
        return ValueError(
            f"{self.folder / 'config.json'}: {name} must be {supported}, found {value!r}"
        )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder with heads")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; heads need one beside their tensors") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, found {type(config).__name__}")
    return config


def _tensor_files(folder: Path) -> list[Path]:
    for suffixes in ((".safetensors",), (".bin", ".pt")):
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if files:
            _check_index(folder, files)
            return files
    raise ValueError(f"{folder}: must have *.safetensors, *.bin or *.pt, found none")


def _check_index(folder: Path, files: Sequence[Path]) -> None:
    """A file that an index names must be there: half a download is not half a model."""
    names = {path.name for path in files}
    for index in sorted(folder.glob(f"*{_INDEX_SUFFIX}")):
        shards = set(_read_config(index).get("weight_map", {}).values())
        missing = sorted(shards - names) if shards & names else []
        if missing:
            raise ValueError(f"{index}: must have the file {missing[0]} beside it, found none")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    read: Callable[[Path], Any] = _read_safetensors if path.suffix == ".safetensors" else _read_bin
    try:
        tensors = read(path)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: must hold tensors by name, found {type(tensors).__name__}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _read_bin(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
