"""The corpus of the training example, and its commands."""

from __future__ import annotations

import hashlib
import json
import runpy
from collections.abc import Sequence
from pathlib import Path

import corpus
import pytest
from byte_model import save_byte_model
from corpus import Conversation
from typer.testing import CliRunner

from specdec_kernels import load_heads
from specdec_kernels.hf import load_draft_model
from specdec_kernels.hf.text import TextModel

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bytes_target(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    path = tmp_path_factory.mktemp("target")
    save_byte_model(path, num_layers=3, positions=1024)
    return TextModel(str(path), dtype="fp32")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards of short conversations."""
    sizes = {"BATCH": 4, "CYCLE": 3, "MAX_PROMPT": 6, "MAX_ANSWER": 9, "MAX_DOCUMENT": 16}
    for name, value in sizes.items():
        monkeypatch.setattr(corpus, name, value)


def test_an_interrupted_corpus_goes_on_to_the_same_one(
    bytes_target: TextModel, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    corpus.Writer(bytes_target, whole).write(600)
    assert len(corpus.shards(whole)) >= 3  # the third one quotes the others

    class Interrupted(Exception):
        pass

    save = corpus.save_shard

    def save_one(conversations: Sequence[Conversation], path: Path) -> None:
        if path.name == "shard-00001.safetensors" and parts in path.parents:
            path.with_suffix(".partial").write_bytes(b"half")
            raise Interrupted
        save(conversations, path)

    monkeypatch.setattr(corpus, "save_shard", save_one)
    with pytest.raises(Interrupted):
        corpus.Writer(bytes_target, parts).write(600)
    monkeypatch.setattr(corpus, "save_shard", save)
    corpus.Writer(bytes_target, parts).write(600)
    assert [p.name for p in corpus.shards(parts)] == [p.name for p in corpus.shards(whole)]
    assert list(corpus.read(parts)) == list(corpus.read(whole))
    for conversation in corpus.read(whole):
        text = bytes_target.tokenizer.decode(conversation.tokens[: conversation.num_prompt])
        assert text.startswith("<user>") and text.endswith("<model>")
        assert 0 < len(conversation.tokens) - conversation.num_prompt <= corpus.MAX_ANSWER


def test_two_writers_share_a_folder_and_neither_touches_the_other_s_shards(
    bytes_target: TextModel, tmp_path: Path, short: None
) -> None:
    near = corpus.Writer(bytes_target, tmp_path).write(60)
    far = corpus.Writer(bytes_target, tmp_path).write(60, 70)
    assert far[0].name == "shard-00070.safetensors" and not set(near) & set(far)
    assert corpus.shards(tmp_path) == [*near, *far]
    assert corpus.read_shard(near[0]) != corpus.read_shard(far[0])
    assert corpus.Writer(bytes_target, tmp_path).write(60, 70) == far


def test_answers_end_with_the_first_of_several_end_tokens(
    bytes_target: TextModel, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [20, 21]
    monkeypatch.setattr(bytes_target.model.generation_config, "eos_token_id", ends)
    written = corpus.Writer(bytes_target, tmp_path)._continue(["<user>a"], 200, [1.0], 0)[0]
    assert written[-1] in ends and not set(written[:-1]) & set(ends) and len(written) < 200


def test_a_target_without_chat_template_is_refused(
    bytes_target: TextModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytes_target.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template"):
        corpus.Writer(bytes_target, tmp_path)
    monkeypatch.setattr(bytes_target.tokenizer, "chat_template", "nothing")
    with pytest.raises(ValueError, match="leaves the user's turn out"):
        corpus.Writer(bytes_target, tmp_path)


def test_no_excluded_text_and_no_answer_twice_is_learned(
    bytes_target: TextModel, tmp_path: Path
) -> None:
    file = tmp_path / "bench.jsonl"
    turns = ["It was the best of times, it was the worst of times.", "Who is it?"]
    file.write_text(json.dumps({"turns": turns}) + "\n\n")
    excluded = corpus.read_texts([file], bytes_target)

    def said(prompt: str, answer: str) -> Conversation:
        tokens = [bytes_target.tokenizer(text)["input_ids"] for text in (prompt, answer)]
        return Conversation([*tokens[0], *tokens[1]], len(tokens[0]))

    size = corpus.NGRAM
    conversations = [
        said("<user>Hi<model>", "Good day."),
        said("<user>Hello<model>", "Good day."),  # a copy
        said("<user>" + turns[0][5 : 5 + size] + "<model>", "It rhymes."),
        said("<user>" + turns[0][5 : 4 + size] + "<model>", "One token fewer."),
        said("<user>Quote.<model>", "He wrote: it was the worst of times"),
        said("<user>Say: Who is it?<model>", "Me."),
        said("<user>Say: Who is it<model>", "You."),
    ]
    kept = corpus.distinct(conversations, excluded)
    assert kept == [0, 3, 6]
    runs = {tuple(text[i : i + size]) for text in excluded for i in range(len(text) - size + 1)}
    for i in kept:
        tokens = conversations[i].tokens
        assert not runs & {tuple(tokens[j : j + size]) for j in range(len(tokens))}


def test_the_commands_write_weights_that_load_and_their_cards(
    bytes_target: TextModel, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = runpy.run_path(str(ROOT / "examples" / "train_drafters"), run_name="commands")["app"]
    exclude = tmp_path / "bench.jsonl"
    exclude.write_text(json.dumps({"turns": ["Nobody writes this line."]}) + "\n")
    target = ["--folder", str(tmp_path), "--model", bytes_target.name, "--dtype", "fp32"]
    run = CliRunner().invoke
    assert "corpus" in run(app, []).output
    result = run(app, ["corpus", *target, "--tokens", "200"])
    assert result.exit_code == 0, result.output
    for name in ("eagle", "mlp-speculator", "medusa", "draft"):
        options = ["--epochs", "1", "--draft-vocab", "50", "--exclude", str(exclude)]
        result = run(app, [name, *target, *options])
        assert result.exit_code == 0, result.output
        assert "right first guesses by depth" in result.output
        folder = tmp_path / name
        network = (
            load_draft_model(folder, bytes_target.tokenizer)
            if name == "draft"
            else load_heads(folder)
        )
        assert network.offsets is not None
        card = (folder / "README.md").read_text()
        assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
        facts = json.loads((folder / "training.json").read_text())
        for i, share in enumerate(facts["held_out"]["hit_rate"], 1):
            assert f"| {i} | {share:.3f} |" in card
        assert "bench.jsonl" in card and "Licence: to be filled in" in card
