"""The published scorers, from image and prompt to score, each against its authors' steps in torch and Pillow."""

import functools
import html
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from ses_jax.loading import hub, partition, programs
from ses_jax.models import clip
from ses_jax.rewards import resample, scorers
from ses_jax.rewards.preprocess import Preprocessor

PROMPTS = ["a red cat", "", "\u732b on a CAF\u00c9 &amp;amp; \u201cbar\u201d  \U0001f431", "many Words " * 30]
# The last one tells apart the two ways to centre an odd margin, at every network's size.
SIZES = [(56, 56), (133, 80), (30, 41), (64, 68)]
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def draw_images(size, count=4):
    """Images in [0, 1] of coarse blocks with hard edges, as 8-bit values."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size[::-1], Image.BICUBIC), np.float32)
        hard = np.asarray(coarse.resize(size[::-1], Image.NEAREST), np.float32)
        yield np.round((smooth + hard) / 2) / 255


def pil(image):
    return Image.fromarray(np.round(image * 255).astype(np.uint8))


def target(size, short):
    """Height and width after torchvision's resize of the shorter edge."""
    height, width = size
    return (int(short * height / width), short) if width <= height else (short, int(short * width / height))


def centre(array, size):
    """torchvision's centre crop of the first two axes."""
    top, left = (int(round((edge - size) / 2.0)) for edge in array.shape[:2])  # noqa: RUF046 (as it is written there)
    return array[top : top + size, left : left + size]


def torchvision_pixels(image, size):
    """Resize of a picture, centre crop, tensor, standardise."""
    height, width = target(image.shape[:2], size)
    pixels = centre(np.asarray(pil(image).resize((width, height), Image.BICUBIC)), size) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).astype(np.float32).transpose(2, 0, 1))


def tensor_first_pixels(image, size):
    """Tensor, resize of the tensor, centre crop, standardise."""
    tensor = torch.from_numpy(np.array(pil(image)).transpose(2, 0, 1))[None].float() / 255
    resized = functional.interpolate(
        tensor, target(image.shape[:2], size), mode="bicubic", align_corners=False, antialias=True
    )
    pixels = (centre(resized[0].permute(1, 2, 0).numpy(), size) - MEAN) / STD
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1))


# One folder of each kind, with its original.


def make_clip(folder, act="gelu"):
    oracle.save_clip(folder, oracle.clip(act=act, seed=2))
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    model, tokenizer = CLIPModel.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

    def original(image, prompt):
        """Slow processor, torch model, exp(logit_scale) * cosine."""
        pixels = processor([pil(image)], return_tensors="pt")["pixel_values"]
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        return model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image[0, 0]

    return original


def make_quick_clip(folder):
    return make_clip(folder, "quick_gelu")


def make_hps(folder):
    model = oracle.open_clip(seed=3)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(oracle.OPEN_CLIP))
    tokenizer = oracle.clip_tokenizer()
    tokenizer.save_pretrained(folder)

    def tokenize(prompt):
        text = html.unescape(html.unescape(prompt.replace("\u201c", '"').replace("\u201d", '"'))).strip()
        ids = tokenizer(" ".join(text.split()).lower(), add_special_tokens=False)["input_ids"]
        ids = [256, *ids, 257][:77]
        ids[-1] = 257
        return torch.tensor([ids + [0] * (77 - len(ids))])

    def original(image, prompt):
        pixels = tensor_first_pixels(image, 56)[None]
        return (model.encode_image(pixels) * model.encode_text(tokenize(prompt))).sum()

    return original


def make_aesthetic(folder):
    (folder / "clip").mkdir()
    oracle.save_clip(folder / "clip", oracle.clip(act="quick_gelu", seed=4))
    model, head = CLIPModel.from_pretrained(folder / "clip"), oracle.score_head(20, seed=4)
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")

    def original(image, prompt):
        features = model.get_image_features(torchvision_pixels(image, 56)[None]).pooler_output
        return head(functional.normalize(features, dim=-1))[0, 0]

    return original


def make_image_reward(folder):
    model = oracle.image_reward(seed=5)
    buffers = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(model.state_dict() | buffers, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(oracle.MED_CONFIG))
    tokenizer = oracle.bert_tokenizer(folder)
    assert isinstance(tokenizer, BertTokenizer)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})

    def original(image, prompt):
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return model(torchvision_pixels(image, 48)[None], tokens.input_ids, tokens.attention_mask)[0]

    return original


MAKERS = {
    "clip": make_clip,
    "pick": make_quick_clip,
    "hps": make_hps,
    "aesthetic": make_aesthetic,
    "imagereward": make_image_reward,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A scorer and its original, by kind."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        original = MAKERS[kind](folder)
        return scorers.load_scorer(kind, source=folder), original

    return make


@pytest.fixture(params=[kind for kind in MAKERS if kind != "pick"])
def scorer(made, request):
    """Of every kind of its own code: PickScore is a CLIP."""
    return made(request.param)[0]


def scores_of(scorer, images, prompts):
    text = jax.jit(scorer.embed_text)(scorer.params, scorer.tokenize(prompts))
    assert {len(leaf) for leaf in jax.tree.leaves(text)} == {len(prompts)}
    return np.asarray(jax.jit(scorer.score)(scorer.params, jnp.asarray(images), text))


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for kind in MAKERS for size in SIZES if kind != "pick" or size == SIZES[1]]
)
def test_equals_the_original(made, kind, size):
    scorer, original = made(kind)
    images = np.stack(list(draw_images(size)))
    with torch.no_grad():
        expected = np.array([original(image, prompt).item() for image, prompt in zip(images, PROMPTS, strict=True)])
    scores = scores_of(scorer, images, PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=1e-3)
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(expected))
    assert np.diff(np.sort(expected)).min() > 2e-3 * np.abs(expected).max()  # an order that means something


def test_images_on_many_devices_score_the_same(scorer):
    mesh = partition.parse_mesh("data=2,model=2", jax.devices()[:4])
    images = np.random.default_rng(0).random((4, 40, 56, 3), np.float32)
    text = jax.jit(scorer.embed_text)(scorer.params, scorer.tokenize(["a cat"] * 4))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(partition.AXES))
    spread = jax.jit(scorer.score)(
        partition.replicate(mesh, scorer.params), *jax.tree.map(lambda x: jax.device_put(x, rows), (images, text))
    )
    assert len(spread.sharding.device_set) == 4
    np.testing.assert_allclose(spread, jax.jit(scorer.score)(scorer.params, images, text), rtol=1e-4, atol=1e-4)


def test_score_stays_on_the_device(scorer):
    images = jnp.asarray(np.stack(list(draw_images((64, 64), 1))))
    text = jax.jit(scorer.embed_text)(scorer.params, scorer.tokenize(["a cat"]))
    lowered = jax.jit(scorer.score).lower(scorer.params, images, text)
    assert "callback" not in lowered.as_text()
    assert jax.eval_shape(scorer.score, scorer.params, images, text) == jax.ShapeDtypeStruct((1,), jnp.float32)


def test_half_precision_keeps_heads_and_scores_in_float32(scorer, tmp_path):
    MAKERS[scorer.name](tmp_path)
    half = scorers.load_scorer(scorer.name, source=tmp_path, dtype="bfloat16")
    for part in ("clip", "blip"):
        leaves = jax.tree.leaves(half.params.get(part, {}))
        assert {leaf.dtype for leaf in leaves if leaf.shape} <= {jnp.dtype("bfloat16")}
    if "logit_scale" in half.params:  # an exponent, whose last bits count
        assert clip.logit_scale(half.params) == clip.logit_scale(scorer.params)
    if "head" in half.params:
        assert {leaf.dtype for leaf in jax.tree.leaves(half.params["head"])} == {jnp.dtype("float32")}
    images = np.stack(list(draw_images(SIZES[-1])))
    scores, expected = scores_of(half, images, PROMPTS), scores_of(scorer, images, PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.usefixtures("optimized_programs")
def test_scores_follow_their_images_and_prompts(scorer):
    # Of the network's own size: a resize may round a pixel the other way in another batch.
    size = scorer.score.see.size
    images = np.stack(list(draw_images((size, size))))
    scores = scores_of(scorer, images, PROMPTS)
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(scores_of(scorer, images[order], [PROMPTS[i] for i in order]), scores[order], rtol=1e-4)
    one_prompt = scores_of(scorer, images, PROMPTS[:1])
    repeated = scores_of(scorer, images, PROMPTS[:1] * 4)
    np.testing.assert_allclose(one_prompt, repeated, rtol=1e-5, atol=1e-6 * np.abs(repeated).max())
    np.testing.assert_allclose(one_prompt[0], scores[0], rtol=1e-4)


def assert_same_scorer(found, expected):
    """Of the same params, bit for bit, text and code, so of the same scores."""
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.tokenize(PROMPTS), expected.tokenize(PROMPTS))
    assert found.score == expected.score
    assert programs.comparable(found.embed_text) == programs.comparable(expected.embed_text)


def test_a_tokenizer_of_another_network_is_refused(tmp_path):
    make_image_reward(tmp_path)
    config = oracle.MED_CONFIG | {"vocab_size": 133}
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the tokenizer has 134 tokens, the network 133"):
        scorers.load_scorer("imagereward", source=tmp_path)
    del config["hidden_size"]
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"med_config.json: lacks 'hidden_size'"):
        scorers.load_scorer("imagereward", source=tmp_path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_hps_as_safetensors_is_the_same(tmp_path, prefix):
    make_hps(tmp_path)
    expected = scorers.load_scorer("hps", source=tmp_path)
    state = torch.load(tmp_path / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    (tmp_path / "HPS_v2.1_compressed.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected HPS_v2.1_compressed.safetensors, .pt or .pth or HPS_v2_"):
        scorers.load_scorer("hps", source=tmp_path)
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, tmp_path / "HPS_v2_compressed.safetensors")
    assert_same_scorer(scorers.load_scorer("hps", source=tmp_path), expected)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("hps", "HPS_v2.1_compressed.pt"),
        ("imagereward", "ImageReward.pt"),
        ("aesthetic", None),
        ("clip", "model.safetensors"),
    ],
)
def test_a_file_is_a_source(kind, file, tmp_path):
    MAKERS[kind](tmp_path)
    expected = scorers.load_scorer(kind, source=tmp_path)
    file = tmp_path / file if file else next(p for p in tmp_path.iterdir() if p.is_file() and "logos" in p.name)
    assert_same_scorer(scorers.load_scorer(kind, source=str(file)), expected)


def test_hps_in_transformers_layout(tmp_path):
    """The same network as CLIP's, with HPSv2's own preprocessing and without the logit scale."""
    oracle.save_clip(tmp_path, oracle.clip(act="gelu"))
    hps, clip = (scorers.load_scorer(kind, source=tmp_path) for kind in ("hps", "clip"))
    size = clip.score.see.size
    images = np.round(np.stack(list(draw_images((size, size)))) * 255) / 255  # no resize, and nothing to round
    prompts = ["a cat", "", "two dogs", "a red circle"]  # nothing for HPSv2 to clean
    cosines = scores_of(hps, images.astype(np.float32), prompts)
    scale = np.exp(float(clip.params["logit_scale"]))
    np.testing.assert_allclose(scale * cosines, scores_of(clip, images.astype(np.float32), prompts), rtol=1e-4)
    assert hps.score.see.resize_floats


def test_aesthetic_head_may_lie_beside_its_clip(tmp_path):
    original = make_aesthetic(tmp_path)
    for file in (tmp_path / "clip").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "clip").rmdir()
    scorer = scorers.load_scorer("aesthetic", source=tmp_path)
    assert set(scorer.params["clip"]) == {"vision", "visual_projection", "logit_scale"}
    (image,) = draw_images((64, 64), 1)
    with torch.no_grad():
        np.testing.assert_allclose(scores_of(scorer, image[None], ["x"]), original(image, "x").item(), rtol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  Two\n\twords ", "two words"),
        ("a &amp;lt; b &copy;", "a < b \u00a9"),
        ("\u2018a\u2019 \u201cB\u201d", "'a' \"b\""),
        ("\u732b \u00c9", "\u732b \u00e9"),
        ("\uff21\uff0c\ufb01\u3000\uff71", "a,fi \u30a2"),
    ],
)
def test_hps_prompts_are_cleaned(prompt, cleaned):
    assert scorers.clean(prompt) == cleaned


@pytest.mark.parametrize("shape", [((64, 64), (56, 56)), ((301, 97), (33, 224)), ((20, 31), (56, 40))])
def test_float_resize_equals_torch(shape):
    source, size = shape
    images = np.random.default_rng(0).random((2, *source, 3), np.float32)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2))
    expected = functional.interpolate(tensor, size, mode="bicubic", align_corners=False, antialias=True)
    got = np.asarray(resample.resize(jnp.asarray(images), size, rounded=False))
    assert got.min() < 0 or got.max() > 1 or min(source) > 90  # overshoot is kept
    np.testing.assert_allclose(got, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_preprocessor_reads_its_file(tmp_path):
    assert Preprocessor.from_folder(tmp_path, 64).size == 64
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    assert Preprocessor.from_folder(tmp_path, 32).mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match=r"size is \{'shortest_edge': 32\}; expected \{'shortest_edge': 64\}"):
        Preprocessor.from_folder(tmp_path, 64)


def test_small_files_of_a_clip_are_read_before_its_weights(tmp_path):
    for file in (hub.DEMO / "clip").iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "preprocessor_config.json").write_text('{"resample": 0}')
    with pytest.raises(ValueError, match="resample is 0; expected 3"):
        scorers.load_scorer("clip", source=tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        scorers.load_scorer("clip", source=tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    for kind in ("clip", "hps"):
        with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
            scorers.load_scorer(kind, source=tmp_path)


def test_preprocessor_reads_the_file_of_a_whole_processor(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert Preprocessor.from_folder(tmp_path, 224).mean == (0.0, 0.0, 0.0)
    image_processor = CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 1.0, 0.5])
    tokenizer = AutoTokenizer.from_pretrained(hub.DEMO / "clip")
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    assert Preprocessor.from_folder(tmp_path, 224) == Preprocessor(224, (0.1, 0.2, 0.3), (1.0, 1.0, 0.5))


STANDARD = {"image_mean": list(Preprocessor.mean), "image_std": list(Preprocessor.std)}
TODAYS = {
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}


@pytest.mark.parametrize(
    "config",
    [
        # As OpenAI and LAION published theirs, and as PickScore's is.
        {"size": 224, "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3},
        {**TODAYS, "feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": "CLIPImageProcessor"},
        {"rescale_factor": 0.003921569, "do_resize": None},
    ],
)
def test_published_preprocessing_is_ours(tmp_path, config):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**STANDARD, **config}))
    assert Preprocessor.from_folder(tmp_path, 224) == Preprocessor()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *((f"do_{step}", False, "True") for step in ("resize", "center_crop", "rescale", "normalize")),
        *(("resample", value, "3") for value in (2, 0, "bicubic")),
        ("rescale_factor", 1 / 127.5, "0.0039"),
        # Not even where it is square and as large as it should be: transformers squeezes other images then.
        ("size", {"height": 224, "width": 224}, "{'shortest_edge': 224}"),
        ("size", {"longest_edge": 224}, "{'shortest_edge': 224}"),
        ("size", 336, "{'shortest_edge': 224}"),
        ("crop_size", {"height": 224, "width": 200}, "{'height': 224, 'width': 224}"),
        ("image_std", 0.5, "three numbers"),
    ],
)
def test_preprocessing_that_is_not_ours_is_refused(tmp_path, key, value, expected):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {key: value}}))
    with pytest.raises(ValueError, match=re.escape(f"config.json: {key} is {value!r}; expected {expected}")):
        Preprocessor.from_folder(tmp_path, 224)


def test_preprocessing_equals_the_slow_processor(tmp_path):
    (image,) = draw_images((90, 61), 1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(pil(image), return_tensors="np")["pixel_values"]
    got = Preprocessor(56)(jnp.asarray(image)[None])
    step = 1 / 255 / 0.26
    difference = np.abs(np.asarray(got) - expected.transpose(0, 2, 3, 1))
    assert difference.max() < 1.1 * step
    assert (difference > 1e-5).mean() < 1e-3


def test_published_sources_and_what_is_downloaded(monkeypatch, tmp_path):
    asked = []

    def snapshot(source, allow_patterns, ignore_patterns):
        asked.append((source, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot)
    for kind in scorers.KINDS:
        with pytest.raises(FileNotFoundError):
            scorers.load_scorer(kind)
    weights = [(source, files) for source, files in asked if isinstance(files, str)]
    assert weights == [
        ("yuvalkirstain/PickScore_v1", "model*.safetensors"),
        ("xswu/HPSv2", "HPS_v2.1_compressed.*"),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "model*.safetensors"),
        ("THUDM/ImageReward", "ImageReward.*"),
        ("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.*"),
        ("openai/clip-vit-large-patch14", "model*.safetensors"),
    ]
    asked.clear()
    hub.resolve("google-bert/bert-base-uncased", weights="")
    assert [files for _, files in asked] == [hub.SMALL_FILES]


def test_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="unknown scorer 'aesthetics'; known: pick, hps, clip, imagereward, aesthetic"):
        scorers.load_scorer("aesthetics")
