"""The same search twice in one run: this library, and the reference's way of doing it in torch.

The reference's way: diffusers' pipeline and transformers' CLIP, one candidate after the other, the wavelets and the
Cross-Entropy Method in numpy on the host. Both sides run the same checkpoint, base noise, draws, reward and budget, so
their scores must agree; what is compared is the time. Prints the ratio; `python benchmarks/search_vs_torch.py`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import pywt
import torch
import tyro
from diffusers import ZImagePipeline
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

import ses_jax
from ses_jax.engine.tasks import base_noise, prompt_keys


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Times a search on the demo checkpoint against the same search in torch.

    Attributes:
      prompt: what to search for.
      budget: candidates.
      seed: of all draws.
      threads: of torch; 0 leaves its default, one a core.
      repeats: timed runs of each side, alternating; the median counts.
      model: the checkpoint, in the demo's layout.
      out: folder of the JSON.
    """

    prompt: str = "a red circle left of a blue square on a white background"
    budget: int = 50
    seed: int = 0
    threads: int = 0
    repeats: int = 3
    model: str = "demo"
    out: Path = common.RESULTS


def main(args: Arguments) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    pipeline = ses_jax.load_pipeline(args.model)
    reward = ses_jax.load_reward("clip", source=pipeline.folder / "clip")
    config = ses_jax.SearchConfig(budget=args.budget, seed=args.seed).resolve(pipeline)
    judge = TorchSide(pipeline.folder, args.prompt, config)

    def ours() -> list[float]:
        result = ses_jax.search(
            args.prompt, model=pipeline, reward=reward, budget=args.budget, seed=args.seed, progress=False
        )
        return [row["score"] for row in result.history]

    seconds: dict[str, list[float]] = {"jax": [], "torch": []}
    cold, scores = timed(ours)
    for _ in range(args.repeats):
        seconds["jax"].append(timed(ours)[0])
        elapsed, reference_scores = timed(lambda: reference_search(judge, config))
        seconds["torch"].append(elapsed)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    difference = float(np.abs(np.array(scores) - reference_scores).max())
    ratio = medians["torch"] / medians["jax"]
    print(f"torch {medians['torch']:.2f} s, jax {medians['jax']:.2f} s warm ({cold:.2f} s cold): {ratio:.2f} x as fast")
    print(f"largest difference of the {len(scores)} scores: {difference:.2e}")
    result = {
        "arguments": dataclasses.asdict(args) | {"out": None},
        "seconds": seconds,
        "median_seconds": medians,
        "jax_cold_seconds": cold,
        "torch_over_jax": ratio,
        "largest_score_difference": difference,
        "torch_threads": torch.get_num_threads(),
    }
    print(common.save("search_vs_torch", result, args.out))


def timed(function: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


class TorchSide:
    """The torch pipeline and scorer, the prompt encoded once."""

    def __init__(self, folder: Any, prompt: str, config: ses_jax.SearchConfig):
        self.pipeline = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.clip = CLIPModel.from_pretrained(folder / "clip", torch_dtype=torch.float32)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
        self.tokens = AutoTokenizer.from_pretrained(folder / "clip")(prompt, return_tensors="pt")
        self.config = config
        with torch.no_grad():
            self.positive, self.negative = self.pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)

    @torch.no_grad()
    def render(self, noise: np.ndarray, steps: int) -> Image.Image:
        return self.pipeline(
            prompt_embeds=self.positive,
            negative_prompt_embeds=self.negative,
            guidance_scale=self.config.guidance,
            num_inference_steps=steps,
            height=self.config.height,
            width=self.config.width,
            latents=torch.tensor(noise[None]),
        ).images[0]

    @torch.no_grad()
    def score(self, image: Image.Image) -> float:
        pixels = self.processor(image, return_tensors="pt")
        return float(self.clip(**self.tokens, **pixels).logits_per_image[0, 0])


def reference_search(judge: TorchSide, config: ses_jax.SearchConfig) -> list[float]:
    """Spectral Evolution Search one candidate at a time; the winner and the base are rendered at the end, as ours."""
    noise_key, key = prompt_keys(config.seed, 0)
    pipeline_shape = (judge.pipeline.transformer.config.in_channels, config.height // 8, config.width // 8)
    noise = np.asarray(base_noise(noise_key, pipeline_shape))
    low, *high = pywt.wavedec2(noise, config.wavelet, mode="symmetric", level=config.level, axes=(-2, -1))
    mean, variance = np.zeros_like(low), np.ones_like(low)
    archive: list[tuple[float, np.ndarray]] = []
    scores: list[float] = []

    def merged(sample: np.ndarray) -> np.ndarray:
        return pywt.waverec2([sample, *high], config.wavelet, mode="symmetric", axes=(-2, -1)).astype(np.float32)

    for generation in range(-(-config.budget // config.population)):
        draws = jax.random.normal(jax.random.fold_in(key, generation), (config.population, *low.shape))
        samples = mean + np.asarray(draws) * np.sqrt(np.maximum(variance, 1e-9))
        if generation == 0:
            samples[0] = low
        for sample in samples[: config.budget - len(scores)]:
            scores.append(judge.score(judge.render(merged(sample), config.preview_steps)))
            archive.append((scores[-1], sample))
        archive = sorted(archive, key=lambda pair: -pair[0])[: config.elites]
        elites = np.stack([sample for _, sample in archive])
        mean, variance = elites.mean(axis=0), elites.var(axis=0, ddof=1) + 1e-7
    for final in (merged(archive[0][1]), noise):
        judge.score(judge.render(final, config.steps))
    return scores


if __name__ == "__main__":
    main(tyro.cli(Arguments))
