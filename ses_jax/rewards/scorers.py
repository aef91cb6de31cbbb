"""The published scorers: networks that say how good an image is for a prompt, preprocessing included.

Each follows its authors' code, down to the order of resizing and rounding. Text is prepared once a prompt; images are
scored inside the compiled step.
"""

import dataclasses
import functools
import html
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ses_jax.convert import blip as blip_tables
from ses_jax.convert import clip as clip_tables
from ses_jax.convert import open_clip as open_clip_tables
from ses_jax.convert import score_head as head_tables
from ses_jax.loading import hub, network
from ses_jax.loading.programs import comparable
from ses_jax.loading.tokenizers import load_tokenizer
from ses_jax.models import blip, clip, quantized, score_head
from ses_jax.rewards.preprocess import Preprocessor

Pixels = Float[Array, "b size size 3"]  # as a `Preprocessor` gives them
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
BERT = "google-bert/bert-base-uncased"
# Names of the weights, without their suffix; the first one that a folder holds is read.
HPS_FILES = ("HPS_v2.1_compressed", "HPS_v2_compressed")
AESTHETIC_FILES = ("sac+logos+ava1-l14-linearMSE",)
IMAGE_REWARD_FILES = ("ImageReward",)
IMAGE_REWARD_MEAN, IMAGE_REWARD_STD = 0.16717362830052426, 1.0333394966054072
IMAGE_REWARD_TOKENS = 35
# What ftfy, which HPSv2's tokenizer begins with, makes plain: ligatures, wide and narrow forms, curly quotes.
PLAIN = {code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0))}
PLAIN |= dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'") | dict.fromkeys(range(0x201C, 0x2020), '"')


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """A score of images in two parts, so that images need not be kept until all that are to be scored are there.

    Attributes:
      see: `images [B, H, W, 3] in [0, 1] -> seen`, all that is needed of each image; far smaller than images.
      say: `(params, seen, text) -> [B]`.
    """

    see: Callable[[Array], Any]
    say: Callable[[Any, Any, Any], Array]

    def __post_init__(self):
        object.__setattr__(self, "say", comparable(self.say))

    def __call__(self, params: Any, images: Float[Array, "b h w 3"], text: Any) -> Float[Array, "b"]:
        """The scores of images."""
        return self.say(params, self.see(images), text)


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A scorer as pure functions and their params.

    Attributes:
      name: its kind.
      params: pytree of weights.
      tokenize: `(prompts) -> tokens`, on the host.
      embed_text: `(params, tokens) -> text`, arrays with the prompts as their leading axis; once a prompt.
      score: `(params, images, text) -> [B]`, pure; text of one prompt or of one an image.
      source: where its weights are from, as it was asked for.
    """

    name: str
    params: Any = dataclasses.field(repr=False)
    tokenize: Callable[[Sequence[str]], Any]
    embed_text: Callable[[Any, Any], Any]
    score: ImageScore
    source: str = ""


class Kind(NamedTuple):
    """What is known of a kind of scorer before it is loaded.

    Attributes:
      source: Hugging Face id of the published weights.
      verified: what was checked.
      load: `(name, folder or file, dtype, quantize) -> Scorer`.
      weights: pattern of the weights' files; None is a network in safetensors.
    """

    source: str
    verified: str
    load: Callable[[str, Path, Any, str | None], Scorer]
    weights: str | None = None


def load_scorer(
    kind: str, *, source: str | Path | None = None, dtype: Any = None, quantize: str | None = None
) -> Scorer:
    """Loads a published scorer.

    Args:
      kind: one of `KINDS`.
      source: a local folder, a file or a Hugging Face id with the weights; None is the published one. What the folder
        of "hps", "aesthetic" or "imagereward" lacks (tokenizer, CLIP) comes from the published id of that part.
      dtype: of the weights; None is bfloat16 on GPU and TPU, float32 on CPU.
      quantize: "int8" or "fp8" puts the linear layers of the towers into eight bits as they are read.

    Raises:
      FileNotFoundError: naming the file that is absent.
      ValueError: for an unknown kind or a broken checkpoint.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown scorer {kind!r}; known: {', '.join(KINDS)}")
    chosen = KINDS[kind]
    dtype, quantize = hub.params_dtype(dtype), quantized.check_kind(quantize)
    if chosen.weights is None:
        place = hub.resolve(source or chosen.source)
    else:
        weights = chosen.weights if source is None else (chosen.weights, hub.NETWORK_WEIGHTS)
        place = hub.resolve_weights(source or chosen.source, weights=weights)
    return dataclasses.replace(chosen.load(kind, place, dtype, quantize), source=hub.told(source or chosen.source))


# CLIP score and PickScore: exp(logit_scale) * cosine.


def load_clip(name: str, folder: Path, dtype: Any = None, quantize: str | None = None) -> Scorer:
    """A CLIP checkpoint of transformers, with its tokenizer and, optionally, the config of its image processor."""
    _, config = hub.read_config(folder / "config.json", clip_tables.COMPONENT)
    # Small files first: what is wrong with them is said before the weights are read.
    preprocess, tokenizer = Preprocessor.from_folder(folder, config.image_size), load_tokenizer(folder)
    _, params = hub.load_component(folder, clip_tables.COMPONENT, dtype=dtype, quantize=quantize)
    return Scorer(
        name=name,
        params=params,
        tokenize=functools.partial(_tokenize_clip, tokenizer, config.max_length),
        embed_text=functools.partial(embed_clip, config),
        score=ImageScore(preprocess, functools.partial(clip_score, config)),
    )


def abstract_clip(folder: Path, dtype: Any, quantize: str | None = None) -> Scorer:
    """A CLIP checkpoint as shapes, from its configs; its tokens are blank."""
    config, params = network.shapes(folder, clip_tables.COMPONENT, dtype=dtype, quantize=quantize)
    return Scorer(
        name="clip",
        params=params,
        tokenize=lambda prompts: np.zeros((len(prompts), config.max_length), np.int32),
        embed_text=functools.partial(embed_clip, config),
        score=ImageScore(Preprocessor.from_folder(folder, config.image_size), functools.partial(clip_score, config)),
    )


def clip_score(config: clip.Config, params: Any, pixels: Pixels, text: Array) -> Float[Array, "b"]:
    """`exp(logit_scale) * cosine` of each image and its text embedding, float32 `[B]`."""
    return clip.logit_scale(params) * cosine(config, params, pixels, text)


def cosine(config: clip.Config, params: Any, pixels: Pixels, text: Array) -> Float[Array, "b"]:
    """Cosine of each image and its text embedding, float32 `[B]`."""
    return jnp.sum(clip.embed_image(params, config, pixels) * text, axis=-1)


def _tokenize_clip(tokenizer: Any, length: int, prompts: Sequence[str]) -> np.ndarray:
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
    return np.array(encoded["input_ids"], np.int32)


def embed_clip(config: clip.Config, params: Any, tokens: Any) -> Array:
    """Embeddings of tokens `[P, L]`, `[P, D]`."""
    return clip.embed_text(params, config, tokens)


# HPSv2: cosine, of an image that is resized as a float tensor.


def load_hps(name: str, path: Path, dtype: Any = None, quantize: str | None = None) -> Scorer:
    """HPSv2 or v2.1, in open_clip's layout or in that of transformers.

    Args:
      path: a folder with `HPS_v2.1_compressed` or `HPS_v2_compressed`, `.safetensors` or `.pt`, or such a file;
        optionally with `open_clip_config.json` (default ViT-H/14) and the tokenizer (default that of LAION's ViT-H/14)
        beside it. Or a folder with a CLIP as transformers saves it.
    """
    folder = path.parent if path.is_file() else path
    resaved = path.is_dir() and (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    component = clip_tables.COMPONENT if resaved else open_clip_tables.COMPONENT
    file = folder / ("config.json" if resaved else "open_clip_config.json")
    json, config = hub.read_config(file, component) if file.is_file() else ({}, component.from_json({}))
    tokenizer = _load_tokenizer(folder, CLIP_H, [], config.vocab_size)
    if resaved:
        _, params = hub.load_component(folder, component, dtype=dtype, quantize=quantize)
    else:
        params = hub.load_weights(hub.open_source(path, HPS_FILES), component, json, dtype=dtype, quantize=quantize)
    # The authors leave `antialias` to torchvision, whose releases differ; this is what it does since 0.17.
    preprocess = Preprocessor(config.image_size, resize_floats=True, half_to_even=True)
    return Scorer(
        name=name,
        params=params,
        tokenize=lambda prompts: _tokenize_clip(tokenizer, config.max_length, [clean(prompt) for prompt in prompts]),
        embed_text=functools.partial(embed_clip, config),
        score=ImageScore(preprocess, functools.partial(cosine, config)),
    )


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer reads it: escapes resolved twice, lower case, plain spaces and characters.

    ftfy's repair of text that was decoded wrongly is left out.
    """
    unescaped = html.unescape(html.unescape(prompt.translate(PLAIN)))
    return " ".join(unescaped.split()).lower()


# LAION aesthetics: a head on CLIP's image embedding; the prompt is not looked at.


def load_aesthetic(name: str, path: Path, dtype: Any = None, quantize: str | None = None) -> Scorer:
    """LAION's improved aesthetic predictor on CLIP ViT-L/14.

    Args:
      path: a folder with `sac+logos+ava1-l14-linearMSE`, `.safetensors` or `.pth`, or such a file; and the CLIP
        checkpoint of transformers in the subfolder `clip`, or beside the head, or nowhere (default OpenAI's).
    """
    folder = path.parent if path.is_file() else path
    config, params = hub.load_component(_clip_beside(folder), clip_tables.COMPONENT, dtype=dtype, quantize=quantize)
    head = _load_head(hub.open_source(path, AESTHETIC_FILES), config.projection_dim)
    preprocess = Preprocessor(config.image_size, half_to_even=True)
    return Scorer(
        name=name,
        params={"clip": {part: leaf for part, leaf in params.items() if not part.startswith("text")}, "head": head},
        tokenize=lambda prompts: np.zeros((len(prompts), 0), np.int32),
        embed_text=_as_tokens,
        score=ImageScore(preprocess, functools.partial(aesthetic_score, config)),
    )


def aesthetic_score(config: clip.Config, params: Any, pixels: Pixels, text: Any = None) -> Float[Array, "b"]:
    """Aesthetic scores, about 1 to 10, float32 `[B]`."""
    return score_head.score(params["head"], clip.embed_image(params["clip"], config, pixels))


def _clip_beside(folder: Path) -> Path:
    if (folder / "clip").is_dir():
        return folder / "clip"
    return folder if (folder / "config.json").is_file() else hub.resolve(CLIP_L)


# ImageReward: a text encoder that looks at the image, and a head.


def load_image_reward(name: str, path: Path, dtype: Any = None, quantize: str | None = None) -> Scorer:
    """ImageReward, in its authors' layout.

    Args:
      path: a folder with `ImageReward`, `.safetensors` or `.pt`, or such a file; `med_config.json` beside it, and
        optionally the tokenizer (default that of BERT base uncased).
    """
    folder = path.parent if path.is_file() else path
    json, config = hub.read_config(folder / "med_config.json", blip_tables.COMPONENT)
    weights = hub.open_source(path, IMAGE_REWARD_FILES)
    tokenizer = _load_tokenizer(folder, BERT, ["[DEC]", "[ENC]"], config.text.vocab_size)
    return Scorer(
        name=name,
        params={
            "blip": hub.load_weights(weights, blip_tables.COMPONENT, json, dtype=dtype, quantize=quantize),
            "head": _load_head(weights, config.text.hidden_size),
        },
        tokenize=functools.partial(_tokenize_bert, tokenizer),
        embed_text=_as_tokens,
        score=ImageScore(Preprocessor(config.image_size, half_to_even=True), functools.partial(image_reward, config)),
    )


def image_reward(config: blip.Config, params: Any, pixels: Pixels, text: blip.Tokens) -> Float[Array, "b"]:
    """ImageReward of each image for its prompt, standardised by the authors' mean and deviation, float32 `[B]`."""
    state = blip.encode(params["blip"], config, pixels, text)
    return (score_head.score(params["head"], state) - IMAGE_REWARD_MEAN) / IMAGE_REWARD_STD


def _tokenize_bert(tokenizer: Any, prompts: Sequence[str]) -> blip.Tokens:
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=IMAGE_REWARD_TOKENS)
    return blip.Tokens(np.array(encoded["input_ids"], np.int32), np.array(encoded["attention_mask"], bool))


def _as_tokens(params: Any, tokens: Any) -> Any:
    """The text of scorers that read it together with the image, or not at all."""
    return tokens


def _load_head(weights: Any, input_size: int) -> Any:
    return hub.load_weights(weights, head_tables.COMPONENT, {"input_size": input_size}, dtype=jnp.float32)


def _load_tokenizer(folder: Path, default: str, added: Sequence[str], vocabulary: int) -> Any:
    """The folder's own tokenizer if it has one, else the published one, with the network's own tokens added."""
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenizer = load_tokenizer(folder if own else hub.resolve(default, weights=""))
    tokenizer.add_tokens(list(added), special_tokens=True)
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the network {vocabulary}")
    return tokenizer


HEADER = "names and shapes of every published tensor"
PARITY = "scores against the original on tiny random weights; not run with the published weights"
KINDS: dict[str, Kind] = {
    "pick": Kind("yuvalkirstain/PickScore_v1", f"{HEADER}; {PARITY}", load_clip),
    "hps": Kind("xswu/HPSv2", f"{HEADER}; {PARITY}", load_hps, f"{HPS_FILES[0]}.*"),
    "clip": Kind(CLIP_H, f"{HEADER}; {PARITY}", load_clip),
    "imagereward": Kind("THUDM/ImageReward", PARITY, load_image_reward, f"{IMAGE_REWARD_FILES[0]}.*"),
    "aesthetic": Kind("camenduru/improved-aesthetic-predictor", PARITY, load_aesthetic, f"{AESTHETIC_FILES[0]}.*"),
}
