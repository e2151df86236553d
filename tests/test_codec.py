"""The codec computes what the stock pipeline computes, to the bit, and one sample does not see another."""

import json
import shutil

import numpy as np
import pytest
import torch
from builders import TEXT_WIDTH, VISION_TOKENS, VISION_WIDTH, C, shared_wan_folder
from diffusers import WanImageToVideoPipeline
from PIL import Image

from v4e import flow
from v4e.errors import CheckpointError, ShapeError
from v4e.models.codec import WanCodec
from v4e.models.wan import load_backbone
from v4e.nouns import TEXT_TOKENS, Clip, known_mask_4thw

T, H, W = 9, 32, 48


@pytest.fixture(scope="module")
def codec():
    return WanCodec.load(shared_wan_folder("flf2v"))


@pytest.fixture(scope="module")
def stock():
    pipeline = WanImageToVideoPipeline.from_pretrained(shared_wan_folder("flf2v"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clips(n, frames=T):
    g = torch.Generator().manual_seed(3)
    return [Clip(torch.randint(0, 256, (frames, 3, H, W), dtype=torch.uint8, generator=g)) for _ in range(n)]


def picture(image):
    return Image.fromarray(image.frames_T3HW[0].permute(1, 2, 0).numpy())


def statistics(vae):
    return (torch.tensor(v).view(1, C, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))


def preprocessed(stock, image):
    return stock.video_processor.preprocess(picture(image), height=H, width=W).float()


@pytest.mark.parametrize("both_ends", [False, True])
def test_known_latents_and_mask_equal_prepare_latents(codec, stock, both_ends):
    grid = codec.grid(T, H, W)
    firsts, lasts = clips(2, 1), clips(4, 1)[2:] if both_ends else None
    known = codec.known(firsts, grid, lasts)
    for b in range(2):  # the stock pipeline takes one image at a time
        last = preprocessed(stock, lasts[b]) if both_ends else None
        _, condition = stock.prepare_latents(
            preprocessed(stock, firsts[b]), 1, C, H, W, T, torch.float32, "cpu", last_image=last
        )
        assert torch.equal(condition[0, 4:], known[b])
        assert torch.equal(condition[0, :4], known_mask_4thw(grid, last=both_ends))


def test_latents_are_the_normalised_mode(codec, stock):
    clip = clips(1)
    frames = [picture(clip[0].frame(i)) for i in range(T)]
    video = stock.video_processor.preprocess_video(frames, height=H, width=W)
    with torch.no_grad():
        mode = stock.vae.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(v).view(1, C, 1, 1, 1) for v in (stock.vae.config.latents_mean, stock.vae.config.latents_std)
    )
    assert torch.equal(codec.encode(clip), (mode - mean) * (1 / std))


def test_a_sample_does_not_see_its_batch(codec):
    many = clips(3)
    z = codec.encode(many)
    assert z.shape == (3, C, 3, H // 8, W // 8) and z.dtype == torch.float32
    assert all(torch.equal(z[b : b + 1], codec.encode([clip])) for b, clip in enumerate(many))
    decoded = codec.decode(z)
    assert all(torch.equal(decoded[b].frames_T3HW, codec.decode(z[b : b + 1])[0].frames_T3HW) for b in range(3))
    images = [clip.frame(0) for clip in many]
    assert torch.equal(codec.look(images)[1:2], codec.look(images[1:2]))
    assert torch.equal(codec.read(["a red car", "add snow"])[1], codec.read(["add snow"])[0])


def test_decoded_pixels_equal_the_stock_postprocessing(codec, stock):
    z = codec.encode(clips(1))
    mean, std = (
        torch.tensor(v).view(1, C, 1, 1, 1) for v in (stock.vae.config.latents_mean, stock.vae.config.latents_std)
    )
    with torch.no_grad():
        video = stock.vae.decode(z / (1 / std) + mean).sample
    pictures = stock.video_processor.postprocess_video(video, output_type="pil")[0]
    expected = np.stack([np.asarray(p) for p in pictures])
    assert np.array_equal(codec.decode(z)[0].frames_T3HW.permute(0, 2, 3, 1).numpy(), expected)


def test_decoding_some_frames_equals_decoding_all(codec, monkeypatch):
    z = codec.encode(clips(2))
    whole = codec.decode(z)
    lengths = []
    decode = codec.vae.decode
    monkeypatch.setattr(codec.vae, "decode", lambda z, **k: lengths.append(z.shape[2]) or decode(z, **k))
    for frames, needed in (([0], 1), ([4, 1], 2), ([5], 3), ([-1], 3)):
        lengths.clear()
        some = codec.decode(z, frames)
        assert all(torch.equal(a.frames_T3HW, b.frames_T3HW[frames]) for a, b in zip(some, whole, strict=True))
        assert lengths == [needed] * 2
    assert torch.equal(codec.decode_last(z)[1].frames_T3HW, whole[1].frame(-1).frames_T3HW)


def test_float_decoder_is_the_stock_one_without_its_clamp(codec):
    z = (4 * torch.randn(1, C, 2, 4, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    video = codec.decode_floats(z)
    with torch.no_grad():
        assert torch.equal(video.clamp(-1, 1), codec._decode_one(z))
    video.square().mean().backward()
    assert z.grad is not None and z.grad.isfinite().all() and (z.grad != 0).all()


@torch.no_grad()  # as the pipeline itself runs: with gradients, attention takes another kernel
def test_read_equals_encode_prompt(codec, stock):
    texts = ["add a red tree", "  make the\n sky &amp;amp; house blue ", "", "snow " * 600]
    for text, embedding in zip(texts, codec.read(texts), strict=True):
        padded, _ = stock.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
        assert torch.equal(padded[0, : len(embedding)], embedding) and not padded[0, len(embedding) :].any()
    assert [len(e) for e in codec.read(texts)] == [5, 7, 1, TEXT_TOKENS]
    assert codec.read([""])[0].shape == (1, TEXT_WIDTH)
    kept = codec.read([""])[0]  # may be remembered for long; the padding of 512 tokens is not
    assert kept.untyped_storage().nbytes() == kept.nbytes


@torch.no_grad()
def test_look_equals_encode_image(codec, stock):
    images = clips(2, 1)
    expected = torch.cat([stock.encode_image(picture(image), "cpu") for image in images])
    assert torch.equal(codec.look(images), expected) and expected.shape == (2, VISION_TOKENS, VISION_WIDTH)
    both = stock.encode_image([picture(image) for image in images], "cpu")  # as FLF2V calls it; GEMMs of another size
    torch.testing.assert_close(codec.look(images), both, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["i2v", "flf2v"])
def test_conditions_give_the_velocity_the_stock_pipeline_computes(kind):
    """The whole path. Different pictures make one batch here, and one call each of the stock pipeline."""
    folder = shared_wan_folder(kind)
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    codec, ours = WanCodec.load(folder), load_backbone(folder)
    grid, sigma_B = codec.grid(5, H, W), flow.time_grid(1, by=1.0)[:1].float()
    firsts, lasts, texts = clips(2, 1), clips(4, 1)[2:], ["add snow", "turn the red car into a blue house"]
    if kind == "i2v":
        lasts = []
    x = torch.randn(2, C, grid.t, grid.h, grid.w, generator=torch.Generator().manual_seed(1))
    told = [conditions(codec, grid, texts, firsts, lasts, picked) for picked in (slice(0, 1), slice(1, 2), slice(2))]
    together = ours(x, sigma_B.expand(2), told[2])[0]
    for b in range(2):
        theirs = stock_velocity(pipeline, x[b : b + 1], firsts[b], (lasts + [None, None])[b], texts[b])
        assert torch.equal(ours(x[b : b + 1], sigma_B, told[b])[0], theirs)
        torch.testing.assert_close(together[b : b + 1], theirs, rtol=0, atol=1e-5)


def conditions(codec, grid, texts, firsts, lasts, picked):
    texts, firsts, lasts = texts[picked], firsts[picked], lasts[picked]
    known = codec.known(firsts, grid, lasts or None)
    return codec.conditions(codec.read(texts), codec.look(firsts), known, grid, codec.look(lasts) if lasts else None)


def stock_velocity(pipeline, x, first, last, text):
    """What the transformer says in the pipeline's only step."""
    said = []
    hook = pipeline.transformer.register_forward_hook(lambda module, args, output: said.append(output[0]))
    ends = {"image": picture(first), "last_image": picture(last) if last else None}
    sizes = {"height": H, "width": W, "num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
    pipeline(**ends, prompt=text, latents=x, output_type="latent", **sizes)
    hook.remove()
    return said[0]


def test_faults_are_named(codec, tmp_path):
    grid = codec.grid(5, H, W)
    with pytest.raises(ShapeError, match="6 frames"):
        codec.encode(clips(1, 6))
    with pytest.raises(ShapeError, match="among ones of 5"):
        codec.encode([clips(1, 5)[0], clips(1, 9)[0]])
    with pytest.raises(ShapeError, match="5 frames, .* among ones of 1,"):
        codec.known(clips(1, 5), grid)
    with pytest.raises(ShapeError, match="no room"):
        codec.known(clips(1, 1), grid.with_frames(1), clips(1, 1))
    with pytest.raises(ShapeError, match="one frame, not 5"):
        codec.look(clips(1, 5))
    with pytest.raises(CheckpointError, match="model_index.json"):
        WanCodec.load(tmp_path)


def test_a_missing_part_says_so_when_it_is_needed(tmp_path):
    shutil.copytree(shared_wan_folder("i2v"), tmp_path / "wan")
    shutil.rmtree(tmp_path / "wan/text_encoder")
    index = tmp_path / "wan/model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"image_encoder": [None, None], "vae": ["os", "system"]})
    )
    codec = WanCodec.load(tmp_path / "wan")
    for part in ("text_encoder", "image_encoder", "vae"):
        with pytest.raises(CheckpointError, match=f"no {part}"):
            getattr(codec, part)
