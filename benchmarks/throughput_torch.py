"""The other side of the throughput benchmark: diffusers' pipelines and transformers' networks, in torch.

What a user who cares for speed would choose: bfloat16, fused attention (on a GPU whichever of torch's and cuDNN's
kernels is the faster here), repeated blocks and the decoder compiled (the regional compilation that diffusers
recommends), channels-last convolutions, no autograd. The transformer runs inside the pipeline's own loop.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import phases
import torch
import torch_pipelines
import transformers
from phases import Job
from torch_pipelines import FAMILIES, PUBLISHED

ATTENTION = ("native", "_native_cudnn")
CLIP_H = {
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}


@torch.no_grad()
def run(job: Job) -> dict[str, Any]:
    """Times the phases of every batch size; text encoders leave the device before the other networks are made."""
    diffusers.utils.logging.disable_progress_bar()
    meter = Meter(job, phases.Clock("diffusers"), "cuda" if torch.cuda.is_available() else "cpu")
    batches = [{"batch": batch} for batch in job.batches]
    start = time.perf_counter()
    if job.model in PUBLISHED:
        pipe = _random_pipeline(meter, batches)
    else:
        folder = _folder(job)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=meter.dtype).to(meter.device)
        encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
        _encode_all(meter, batches, type(pipe).__name__, [encoder for encoder in encoders if encoder is not None])
    pipe.set_progress_bar_config(disable=True)
    settings = _speed_up(meter, pipe)
    clip = _clip(meter)
    meter.clock.say(f"ready, with {settings}")
    setup = time.perf_counter() - start
    for result in batches:
        _batch(meter, pipe, clip, result)
    return {
        "job": dataclasses.asdict(job),
        "settings": settings,
        "setup": setup,
        "seconds": meter.clock.seconds(),
        "batches": batches,
    }


@dataclasses.dataclass(frozen=True)
class Meter:
    """Warms up and times one phase after the other."""

    job: Job
    clock: phases.Clock
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.job.dtype)

    def __call__(self, phase: str, batch: int, call: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
        """The phase's figures and what the call gives; an error in their place and None where memory is short."""
        gpu = self.device == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()

        def finished() -> Any:
            out = call()
            if gpu:
                torch.cuda.synchronize()
            return out

        try:
            start = time.perf_counter()
            finished()
            compile_seconds = time.perf_counter() - start
            out = finished()  # compiled programs may still record or tune themselves on their second run
            seconds, runs = phases.median_seconds(finished, self.job)
        except torch.OutOfMemoryError:
            self.clock.say(f"{phase} of {batch}: out of memory")
            return {"error": "out of memory"}, None
        result = phases.rates(seconds, batch, None, 0.0)
        result |= {"runs": runs, "compile_seconds": compile_seconds}
        result["peak_bytes"] = torch.cuda.max_memory_allocated() if gpu else None
        self.clock.say(phases.line(phase, batch, result))
        return result, out


def _random_pipeline(meter: Meter, batches: list[dict[str, Any]]) -> Any:
    """Times the text encoders, lets them go, and makes the rest."""
    published = PUBLISHED[meter.job.model]
    encoders = [torch_pipelines.build(text, meter.device, meter.dtype) for text in published.texts]
    _encode_all(meter, batches, published.pipeline, encoders)
    encoders.clear()
    gc.collect()
    if meter.device == "cuda":
        torch.cuda.empty_cache()
    networks = {
        name: torch_pipelines.build(getattr(published, name), meter.device, meter.dtype)
        for name in ("transformer", "vae")
    }
    return torch_pipelines.assemble(published, networks)


def _encode_all(meter: Meter, batches: list[dict[str, Any]], family: str, encoders: list[Any]) -> None:
    lengths = FAMILIES[family].lengths(meter.job)
    branches = 2 if FAMILIES[family].guided(meter.job.guidance) else 1
    for result in batches:
        rows = branches * result["batch"]
        ids = [torch.ones((rows, length), dtype=torch.long, device=meter.device) for length in lengths]

        def encode(ids: list[torch.Tensor] = ids) -> list[Any]:
            return [encoder(input_ids=tokens) for encoder, tokens in zip(encoders, ids, strict=True)]

        result["encode"], _ = meter("encode", result["batch"], encode)


def _batch(meter: Meter, pipe: Any, clip: Any, result: dict[str, Any]) -> None:
    """Adds the phases of one batch size, up to the one that does not fit."""
    job, batch = meter.job, result["batch"]
    arguments = FAMILIES[type(pipe).__name__].arguments(pipe, batch, job)
    arguments |= {"height": job.height, "width": job.width, "num_inference_steps": job.steps, "output_type": "latent"}
    result["denoise"], out = meter("denoise", batch, lambda: pipe(**arguments))
    if out is None:
        return
    result["denoise"]["seconds_per_step"] = result["denoise"]["seconds"] / job.steps
    latents = _latents(pipe, batch, job)
    result["decode"], images = meter("decode", batch, lambda: pipe.vae.decode(latents, return_dict=False)[0])
    if images is None:
        return
    result["finite"] = bool(torch.isfinite(images).all())
    if clip is not None:
        images = images.reshape(batch, 3, job.height, job.width)
        result["reward"], _ = meter("reward", batch, lambda: _score(clip, images))


def _latents(pipe: Any, batch: int, job: Job) -> torch.Tensor:
    """Latents in the layout of the pipeline's autoencoder."""
    video = type(pipe.vae).__name__ == "AutoencoderKLQwenImage"
    channels = pipe.vae.config.z_dim if video else pipe.vae.config.latent_channels
    cells = (job.height // pipe.vae_scale_factor, job.width // pipe.vae_scale_factor)
    shape = (batch, channels, 1, *cells) if video else (batch, channels, *cells)
    latents = torch.randn(shape, dtype=pipe.vae.dtype, device=pipe.vae.device)
    return latents if video else latents.to(memory_format=torch.channels_last)


def _score(clip: Any, images: torch.Tensor) -> torch.Tensor:
    """Norms of image embeddings: preprocessing on the device, and the vision tower."""
    size = clip.config.vision_config.image_size
    images = (images / 2 + 0.5).clamp(0, 1)
    pixels = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    pixels = ((pixels - 0.45) / 0.27).to(clip.dtype)
    features = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    return torch.linalg.vector_norm(features, dim=-1)


def _clip(meter: Meter) -> Any:
    if meter.job.reward == "none":
        return None
    if meter.job.reward == "own":
        clip = transformers.CLIPModel.from_pretrained(_folder(meter.job) / "clip", dtype=meter.dtype)
        return clip.to(meter.device).eval()
    return torch_pipelines.build(torch_pipelines.Network("CLIPModel", CLIP_H), meter.device, meter.dtype)


def _speed_up(meter: Meter, pipe: Any) -> dict[str, str]:
    """Chooses the attention, compiles; what was chosen."""
    gpu = meter.device == "cuda"
    attention = meter.job.attention
    if attention == "auto":
        attention = _faster_attention(meter, pipe) if gpu else ATTENTION[0]
    pipe.transformer.set_attention_backend(attention)
    mode = meter.job.compile
    if mode == "auto":
        mode = "default" if gpu else "none"
    if mode != "none":
        how = {"backend": "eager"} if mode == "eager" else {"mode": mode}
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, **how)
        pipe.vae.decoder.compile(dynamic=False, **how)
    if all(weight.ndim < 5 for weight in pipe.vae.parameters()):  # not the video autoencoder
        pipe.vae.to(memory_format=torch.channels_last)
    return {"attention": attention, "compile": mode}


def _faster_attention(meter: Meter, pipe: Any) -> str:
    """The backend that takes the least time for two steps of one image, of those that run here."""
    job = dataclasses.replace(meter.job, steps=2)
    arguments = FAMILIES[type(pipe).__name__].arguments(pipe, 1, job)
    arguments |= {"height": job.height, "width": job.width, "num_inference_steps": 2, "output_type": "latent"}
    times = {}
    for name in ATTENTION:
        try:
            pipe.transformer.set_attention_backend(name)
            pipe(**arguments)
            torch.cuda.synchronize()
            start = time.perf_counter()
            pipe(**arguments)
            torch.cuda.synchronize()
            times[name] = time.perf_counter() - start
        except (RuntimeError, ValueError) as error:
            meter.clock.say(f"attention {name} does not run here: {str(error).splitlines()[0]}")
    return min(times, key=times.get)


def _folder(job: Job) -> Path:
    from ses_jax.loading import hub

    return hub.resolve(job.model)
