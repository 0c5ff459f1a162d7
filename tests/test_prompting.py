"""What a prompt may say: weights, length, learned words, layers. The reference is written here.

diffusers has no weights and no long prompts: its pipelines get embeddings that `reference` makes
with transformers' own text encoder, from fragments split by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsd import Pipeline
from fastsd.benchmarks.baselines import diffusers_pipeline
from fastsd.errors import CheckpointError, FastsdError, UsageError
from tests.pictures import assert_same_pictures, generator, quiet

FAMILIES = ["sd1_folder", "sd2_folder", "sdxl_folder"]
QUICK: dict[str, Any] = dict(num_inference_steps=4, output_type="np")
Fragments = list[tuple[str, float]]


@pytest.fixture(scope="module")
def pipes(sd1_folder: Path, sd2_folder: Path, sdxl_folder: Path) -> dict[str, tuple[Pipeline, Any]]:
    """Ours and diffusers', for each family; loaded once."""
    folders = {"sd1_folder": sd1_folder, "sd2_folder": sd2_folder, "sdxl_folder": sdxl_folder}
    return {name: (quiet(path), diffusers_pipeline(path)) for name, path in folders.items()}


def reference(theirs: Any, chunks: list[Fragments]) -> tuple[Tensor, Tensor | None]:
    """Return (1, 77 n, C) and the pooled text: weighted as the web UI does, mean restored."""
    xl = hasattr(theirs, "text_encoder_2")
    pairs = [(theirs.tokenizer, theirs.text_encoder)]
    if xl:
        pairs.append((theirs.tokenizer_2, theirs.text_encoder_2))
    contexts, pooled = [], None
    for tokenizer, encoder in pairs:
        parts = []
        for fragments in chunks:
            ids, weights = [tokenizer.bos_token_id], [1.0]
            for text, weight in fragments:
                found = tokenizer(text, add_special_tokens=False).input_ids
                ids, weights = ids + found, weights + [weight] * len(found)
            padding = 77 - len(ids) - 1
            ids += [tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding
            weights += [1.0] * (padding + 1)
            with torch.no_grad():
                output = encoder(torch.tensor([ids]), output_hidden_states=True)
            z = output.hidden_states[-2] if xl else output.last_hidden_state
            weighted = z * torch.tensor(weights)[None, :, None]
            parts.append(weighted * (z.mean() / weighted.mean()))
            if xl and encoder is theirs.text_encoder_2 and pooled is None:
                pooled = output.text_embeds
        contexts.append(torch.cat(parts, dim=1))
    return torch.cat(contexts, dim=-1), pooled


def draw_reference(theirs: Any, positive: list[Fragments], negative: list[Fragments]) -> Any:
    embeds, pooled = reference(theirs, positive)
    unwanted, unwanted_pooled = reference(theirs, negative)
    extra = (
        {}
        if pooled is None
        else {
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": unwanted_pooled,
        }
    )
    return theirs(
        prompt_embeds=embeds,
        negative_prompt_embeds=unwanted,
        generator=generator(0),
        **extra,
        **QUICK,
    ).images


@pytest.mark.parametrize("family", FAMILIES)
def test_weights(family: str, pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    ours, theirs = pipes[family]
    prompt = r"a (red:1.4) house \(by [the sea]\), ((一个红苹果))"
    fragments = [
        ("a ", 1.0),
        ("red", 1.4),
        (" house (by ", 1.0),
        ("the sea", 1 / 1.1),
        ("), ", 1.0),
        ("一个红苹果", 1.1 * 1.1),
    ]
    settings: dict[str, Any] = dict(negative_prompt="(fog:0.7)", prompt_syntax="weighted", seed=0)
    drawn = ours(prompt, **settings, **QUICK)
    reference = draw_reference(theirs, [fragments], [[("fog", 0.7)]])
    assert_same_pictures(drawn.images, reference)
    plain = ours("a red house (by the sea), 一个红苹果", **settings, **QUICK).images
    assert np.abs(drawn.images - plain).max() > 0.01
    assert drawn.metadata[0]["prompt"] == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts(family: str, pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    """The negative prompt gets as many chunks; BREAK begins one; a comma near the end breaks."""
    ours, theirs = pipes[family]
    many = "dog " * 60
    prompt = f"{many}, {'cat ' * 30} BREAK the (sea:1.2)"
    chunks: list[Fragments] = [
        [(f"{many},", 1.0)],
        [("cat " * 30, 1.0)],
        [("the ", 1.0), ("sea", 1.2)],
    ]
    count = len(theirs.tokenizer(f"{many},").input_ids) - 2
    assert 55 < count <= 75, "the fixture's tokenizer knows the words that this test counts on"
    settings: dict[str, Any] = dict(prompt_syntax="weighted", seed=0)
    drawn = ours(prompt, negative_prompt="fog", **settings, **QUICK).images
    assert_same_pictures(drawn, draw_reference(theirs, chunks, [[("fog", 1.0)], [], []]))
    swapped = ours("fog", negative_prompt=prompt, **settings, **QUICK).images
    assert_same_pictures(swapped, draw_reference(theirs, [[("fog", 1.0)], [], []], chunks))


def test_chunks_are_as_long_as_the_encoder_reads() -> None:
    """The built-in model's reads 32 tokens, where CLIP's read 77."""
    pipe = Pipeline.from_pretrained("builtin", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = dict(prompt_syntax="weighted", seed=0, num_inference_steps=1)
    long, longer = ("red apple " * n for n in (15, 40))
    drawn = [np.asarray(pipe(text, **settings).images[0]) for text in (long, longer)]
    assert drawn[0].shape == (128, 128, 3) and (drawn[0] != drawn[1]).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_short_unweighted_prompts_are_the_same_in_either_syntax(
    family: str, pipes: dict[str, tuple[Pipeline, Any]]
) -> None:
    ours, _ = pipes[family]
    for prompt in ("", "a small red house by the sea", "un château, 一只猫", "ÀÉ it's: 16:9!"):
        a, b = (
            ours(prompt, prompt_syntax=syntax, seed=0, **QUICK).images
            for syntax in ("plain", "weighted")
        )
        np.testing.assert_array_equal(a, b)


def test_a_batch_of_long_and_short_prompts(pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    """The short one is padded; alone and together its bits are the same."""
    ours, _ = pipes["sd1_folder"]
    prompts = ["(cat:1.3) " * 50, "a (dog:0.8) BREAK the sea"]
    settings: dict[str, Any] = dict(prompt_syntax="weighted", batch_invariant=True, **QUICK)
    together = ours(prompts, seed=[1, 2], **settings).images
    alone = ours(prompts[1], seed=2, **settings).images
    np.testing.assert_array_equal(together[1], alone[0])


def test_given_embeddings_and_a_text_meet(pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    ours, theirs = pipes["sd1_folder"]
    chunks: list[Fragments] = [[("a cat", 1.0)], [("the sea", 1.0)]]
    embeds, _ = reference(theirs, chunks)
    drawn = ours(
        prompt_embeds=embeds, negative_prompt="fog", prompt_syntax="weighted", seed=0, **QUICK
    ).images
    assert_same_pictures(drawn, draw_reference(theirs, chunks, [[("fog", 1.0)], []]))
    with pytest.raises(UsageError, match="must be alike"):
        ours(prompt_embeds=embeds, negative_prompt="fog", seed=0, **QUICK)


# --- clip skip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder"])
def test_clip_skip(family: str, clip_skip: int, pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    """An earlier layer, then the final norm; the negative prompt's layer stays.

    Written out as diffusers 0.42.1 has it: with transformers 5 its own argument fails (it looks for
    text_model).
    """
    ours, theirs = pipes[family]
    drawn = ours("a cat", seed=0, clip_skip=clip_skip, negative_prompt="fog", **QUICK)
    ids = theirs.tokenizer("a cat", padding="max_length", max_length=77).input_ids
    with torch.no_grad():
        output = theirs.text_encoder(torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[-(clip_skip + 1)]
        embeds = theirs.text_encoder.final_layer_norm(hidden)
    reference = theirs(
        prompt_embeds=embeds, negative_prompt="fog", generator=generator(0), **QUICK
    ).images
    assert_same_pictures(drawn.images, reference)
    plain = ours("a cat", seed=0, negative_prompt="fog", **QUICK).images
    assert np.abs(drawn.images - plain).max() > 0.01
    assert drawn.metadata[0]["clip_skip"] == clip_skip


def test_clip_skip_of_sdxl(pipes: dict[str, tuple[Pipeline, Any]]) -> None:
    ours, theirs = pipes["sdxl_folder"]
    settings: dict[str, Any] = dict(clip_skip=1, negative_prompt="fog", **QUICK)
    drawn = ours("a cat", seed=0, **settings).images
    assert_same_pictures(drawn, theirs("a cat", generator=generator(0), **settings).images)
    with pytest.raises(UsageError, match="clip_skip must be a whole number from 0 to 1"):
        ours("a cat", **{**settings, "clip_skip": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(clip_skip=3), "clip_skip must be a whole number from 0 to 2"),
        (dict(clip_skip=-1), "clip_skip must be"),
        (dict(clip_skip=0.5), "clip_skip must be"),
        (dict(prompt_syntax="compel"), "prompt_syntax 'compel' is unknown; it is one of plain"),
        (dict(prompt="(a:1000)", prompt_syntax="weighted"), "weights up to 100"),
        (dict(prompt="\ud800", prompt_syntax="weighted"), "lone surrogate"),
    ],
)
def test_bad_arguments(
    arguments: dict[str, Any], message: str, pipes: dict[str, tuple[Pipeline, Any]]
) -> None:
    with pytest.raises(UsageError, match=message):
        pipes["sd1_folder"][0](**{"prompt": "a cat", **arguments}, num_inference_steps=1)


# --- learned words -------------------------------------------------------------------------------


def vectors(count: int, width: int, seed: int) -> Tensor:
    return torch.randn((count, width), generator=generator(seed)) * 0.3


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ["sd1_folder", "sd2_folder"])
def test_learned_words(
    family: str, count: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """One vector or several, under the word's own name, as diffusers writes and reads them."""
    folder = request.getfixturevalue(family)
    ours, theirs = quiet(folder), diffusers_pipeline(folder)
    width = ours.config.text_encoders[0].width
    path = tmp_path / "file.safetensors"
    learned = vectors(count, width, 1)
    save_file({"<red-thing>": learned if count > 1 else learned[0]}, path)
    before = ours("a <red-thing> by the sea", seed=0, **QUICK).images
    ours.load_textual_inversion(path)
    theirs.load_textual_inversion(str(path))
    for prompt in (
        "a <red-thing> by the sea",
        "x<red-thing>, cat",
        "dog " * 73 + "<red-thing> cat",
    ):
        drawn = ours(prompt, seed=0, negative_prompt="<red-thing>", **QUICK)
        reference = theirs(
            prompt, generator=generator(0), negative_prompt="<red-thing>", **QUICK
        ).images
        assert_same_pictures(drawn.images, reference)
    assert list(drawn.metadata[0]["embeddings"]) == ["<red-thing>"]
    assert ours("a cat", num_inference_steps=1).metadata[0]["embeddings"] is None
    ours.unload_textual_inversion("<red-thing>")
    after = ours("a <red-thing> by the sea", seed=0, **QUICK).images
    np.testing.assert_array_equal(after, before)


def test_learned_words_of_sdxl(sdxl_folder: Path, tmp_path: Path) -> None:
    ours, theirs = quiet(sdxl_folder), diffusers_pipeline(sdxl_folder)
    tensors = {"clip_l": vectors(2, 32, 1), "clip_g": vectors(2, 48, 2)}
    save_file(tensors, tmp_path / "thing-xl.safetensors")
    ours.load_textual_inversion(tmp_path / "thing-xl.safetensors")
    for name, part in (("clip_l", ""), ("clip_g", "_2")):
        theirs.load_textual_inversion(
            tensors[name],
            token="thing-xl",
            text_encoder=getattr(theirs, f"text_encoder{part}"),
            tokenizer=getattr(theirs, f"tokenizer{part}"),
        )
    drawn = ours("a thing-xl by the sea", seed=0, **QUICK).images
    reference = theirs("a thing-xl by the sea", generator=generator(0), **QUICK).images
    assert_same_pictures(drawn, reference)


def test_learned_words_weigh_and_are_not_cut(sd1_folder: Path) -> None:
    ours, theirs = quiet(sd1_folder), diffusers_pipeline(sd1_folder)
    learned = {"thing": vectors(4, 32, 1), "<other>": vectors(1, 32, 2)}
    for token, vector in learned.items():
        ours.load_textual_inversion({"emb_params": vector}, token=token)
        theirs.load_textual_inversion(vector, token=token)
    expanded = "thing thing_1 thing_2 thing_3"
    prompt = "dog " * 72 + "(thing:1.3) <other>"
    drawn = ours(prompt, prompt_syntax="weighted", seed=0, **QUICK).images
    chunks: list[Fragments] = [[("dog " * 72, 1.0)], [(expanded, 1.3), (" <other>", 1.0)]]
    assert_same_pictures(drawn, draw_reference(theirs, chunks, [[], []]))


def test_a_call_keeps_the_words_that_it_began_with(sd1_folder: Path) -> None:
    ours = quiet(sd1_folder)
    ours.load_textual_inversion({"<a>": vectors(2, 32, 1)})
    expected = ours("<a> cat", seed=0, **QUICK).images

    def forget(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if ours._vocabulary.embeddings:
            ours.unload_textual_inversion()
        return tensors

    drawn = ours("<a> cat", seed=0, callback_on_step_end=forget, **QUICK).images
    np.testing.assert_array_equal(drawn, expected)


def test_bad_embeddings(sd1_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    """One clear error each, and nothing is half loaded."""
    ours, xl = quiet(sd1_folder), quiet(sdxl_folder)
    good = vectors(1, 32, 0)

    def file(name: str, tensors: dict[str, Tensor]) -> Path:
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    pickle = tmp_path / "bad.pt"
    torch.save({"string_to_param": {"*": good}}, pickle)
    truncated = file("short.safetensors", {"<a>": good})
    truncated.write_bytes(truncated.read_bytes()[:-4])
    cases: list[tuple[Pipeline, Any, str | None, type[FastsdError], str]] = [
        (ours, pickle, None, CheckpointError, "pickle"),
        (ours, truncated, None, CheckpointError, "truncated"),
        (ours, tmp_path, None, CheckpointError, "folder"),
        (ours, tmp_path / "none.safetensors", None, CheckpointError, "missing"),
        (ours, file("w.safetensors", {"<a>": vectors(1, 48, 0)}), None, CheckpointError, "widths"),
        (ours, file("n.safetensors", {"<a>": good * float("nan")}), None, CheckpointError, "NaN"),
        (ours, file("i.safetensors", {"<a>": good.int()}), None, CheckpointError, "I32"),
        (
            ours,
            file("m.safetensors", {f"{i}": good.clone() for i in range(9)}),
            None,
            CheckpointError,
            "9",
        ),
        (ours, file("v.safetensors", {"<a>": vectors(76, 32, 0)}), None, CheckpointError, "75"),
        (ours, file("0.safetensors", {"<a>": good[:0]}), None, CheckpointError, "1 to 75"),
        (ours, {"<a>": good[None]}, None, CheckpointError, "shapes"),
        (ours, {"<a>": torch.ones(())}, None, CheckpointError, "shapes"),
        (ours, {}, None, UsageError, "must map names"),
        (ours, {"<a>": 3}, None, UsageError, "must map names"),
        (ours, {"emb_params": good}, None, UsageError, "give token"),
        (ours, {"<a>": good}, "  ", UsageError, "give token"),
        (ours, {"cat</w>": good}, None, UsageError, "is a token of this model"),
        (ours, {"clip_l": good, "clip_g": vectors(1, 48, 0)}, "<a>", CheckpointError, "another"),
        (xl, {"<a>": good}, None, CheckpointError, "another family"),
        (xl, {"clip_l": good, "clip_g": vectors(2, 48, 0)}, "<a>", CheckpointError, "as many"),
    ]
    for pipe, source, token, error, message in cases:
        with pytest.raises(error, match=message):
            pipe.load_textual_inversion(source, token=token)
        assert pipe._vocabulary.embeddings == ()
    ours.load_textual_inversion({"<a>": good})
    with pytest.raises(UsageError, match="loaded already"):
        ours.load_textual_inversion({"<a>": good})
    with pytest.raises(UsageError, match="learned word '<b>' is unknown; it is one of <a>"):
        ours.unload_textual_inversion("<b>")
    with pytest.raises(UsageError, match="text_encoder"):
        ours.load_textual_inversion({"<b>": good}, text_encoder=None)
