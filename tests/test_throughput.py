"""The throughput benchmark on tiny sizes, both sides; and the published sizes of the other side as shapes."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch

import ses_jax
from ses_jax.pipelines.registry import FAMILIES
from ses_jax.rewards import scorers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Parameters of the published files.
CLIP_L, T5_XXL, QWEN3_4B, QWEN3_8B = 123060480, 4762310656, 4022468096, 8190735360
FLUX1_VAE, FLUX2_VAE = 83819683, 84046115
PARAMETERS = {
    "Tongyi-MAI/Z-Image-Turbo": (6154908736, FLUX1_VAE, QWEN3_4B),
    "Tongyi-MAI/Z-Image": (6154908736, FLUX1_VAE, QWEN3_4B),
    "black-forest-labs/FLUX.1-dev": (11901408320, FLUX1_VAE, CLIP_L, T5_XXL),
    "black-forest-labs/FLUX.1-schnell": (11891178560, FLUX1_VAE, CLIP_L, T5_XXL),
    "black-forest-labs/FLUX.2-dev": (32223281152, FLUX2_VAE, 24011361280),
    "black-forest-labs/FLUX.2-klein-4B": (3875544576, FLUX2_VAE, QWEN3_4B),
    "black-forest-labs/FLUX.2-klein-9B": (9078581248, FLUX2_VAE, QWEN3_8B),
    "black-forest-labs/FLUX.2-klein-base-4B": (3875544576, FLUX2_VAE, QWEN3_4B),
    "black-forest-labs/FLUX.2-klein-base-9B": (9078581248, FLUX2_VAE, QWEN3_8B),
    "Qwen/Qwen-Image": (20430401088, 126892531, 8292166656),
}
# What makes the published networks tiny.
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 1}
VAE = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}
TINY = {
    "FluxTransformer2DModel": {
        **HEADS,
        "num_single_layers": 1,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        **HEADS,
        "num_single_layers": 1,
        "joint_attention_dim": 8,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "QwenImageTransformer2DModel": {**HEADS, "joint_attention_dim": 8, "axes_dims_rope": (4, 6, 6)},
    "ZImageTransformer2DModel": {
        "dim": 48,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 8,
        "axes_dims": [4, 6, 6],
    },
    "AutoencoderKL": VAE,
    "AutoencoderKLFlux2": VAE,
    "AutoencoderKLQwenImage": {"base_dim": 4, "num_res_blocks": 1},
}


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmarks' folder on the path, as when they are run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def script(name):
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """What a core can do at most takes seconds of products to find, and nothing here looks at it."""
    monkeypatch.setitem(script("throughput_jax").MATMUL_SIZES, "cpu", 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    sizes = oracle.ZImageSizes(layers=1, refiner_layers=1, text_layers=2, vae_layers=1)
    oracle.z_image_pipeline(sizes).save_pretrained(path)
    oracle.save_clip(path / "clip", oracle.clip())
    (path / "ses_jax.json").write_text('{"level": 2}')
    return path


def test_both_sides_of_a_tiny_model(folder, tmp_path, capfd, monkeypatch):
    """As from the shell, with two batch sizes; only our side in a process of its own, as torch takes long to import."""
    throughput = script("throughput")
    run_side = throughput.run_side

    def run(module, job):
        return run_side(module, job) if module == "throughput_jax" else throughput._run(module, job)

    monkeypatch.setattr(throughput, "run_side", run)
    arguments = throughput.Arguments(
        str(folder),
        batch=(2, 1),
        height=32,
        width=48,
        steps=2,
        tokens=40,
        dtype="float32",
        reward="own",
        repeats=2,
        against="diffusers",
        out=tmp_path,
    )
    path = throughput.main(arguments)
    assert path.name == f"throughput_{folder.name}_32x48_b1-2_{jax.devices()[0].device_kind}.json"
    result = json.loads(path.read_text())
    ours, theirs = result["jax"], result["diffusers"]
    assert [batch["batch"] for batch in ours["batches"]] == [1, 2]
    for batch, other, ratio in zip(ours["batches"], theirs["batches"], result["ratios"], strict=True):
        assert batch["finite"]
        assert other["finite"]
        for phase in ("encode", "denoise", "decode", "reward"):
            figures = batch[phase]
            assert figures["images_per_second"] == pytest.approx(batch["batch"] / figures["seconds"])
            assert figures["share_of_peak"] == pytest.approx(figures["flops"] / figures["seconds"] / ours["peak_flops"])
            assert figures["argument_bytes"] > 0
            assert figures["runs"] == 2
            assert ratio[phase] == pytest.approx(other[phase]["seconds"] / figures["seconds"])
        assert batch["denoise"]["seconds_per_step"] == batch["denoise"]["seconds"] / 2
    single, double = ours["batches"]
    for phase in ("encode", "denoise", "decode"):
        assert double[phase]["flops"] == pytest.approx(2 * single[phase]["flops"], rel=0.01)
    assert ours["job"]["guidance"] == 0.0
    assert theirs["job"] == ours["job"]
    assert result["environment"]["platform"] == "cpu"
    printed = capfd.readouterr().out
    assert "denoise of 2" in printed
    assert "x as fast" in printed


def test_without_torch_ours_runs_alone(tmp_path, capsys):
    throughput, phases = script("throughput"), script("phases")
    side = {"job": dataclasses.asdict(phases.Job("demo", height=8, width=8)), "batches": []}
    with (
        mock.patch.object(throughput, "run_side", return_value=side | {"environment": {"device": "cpu"}}) as run,
        mock.patch.object(throughput.importlib.util, "find_spec", return_value=None),
    ):
        path = throughput.main(throughput.Arguments("demo", against="diffusers", out=tmp_path))
    assert run.call_count == 1
    assert json.loads(path.read_text())["jax"] == json.loads(json.dumps(side))
    assert "not installed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def shapes(folder):
    """The tiny model as if it were a published one: without weights."""
    pipeline = ses_jax.load_pipeline(str(folder), dtype=jnp.bfloat16)
    return dataclasses.replace(pipeline, params=jax.eval_shape(lambda: pipeline.params))


@pytest.fixture(scope="module")
def scorer(folder):
    return scorers.load_clip("clip", folder / "clip")


def test_random_weights_and_the_checkpoints_own_reward(shapes):
    side, phases = script("throughput_jax"), script("phases")
    job = phases.Job("tiny", batches=(3,), height=32, width=64, steps=1, reward="own", repeats=1, kernels=3)
    with mock.patch.object(side, "_pipeline", return_value=shapes):
        result = side.run(job)
    (batch,) = result["batches"]
    assert batch["finite"]
    assert set(batch) == {"batch", "finite", *phases.PHASES}
    assert result["job"]["width"] == 64
    assert result["job"]["guidance"] == shapes.defaults.guidance
    for phase in phases.PHASES:
        busy, longest = batch[phase]["kernels"]["busy"], batch[phase]["kernels"]["longest"]
        assert len(longest) == 3
        assert 0 < sum(row["seconds"] for row in longest) <= busy
        assert longest == sorted(longest, key=lambda row: -row["seconds"])


@pytest.mark.parametrize("phase", ["encode", "decode"])
def test_a_batch_that_does_not_fit_ends_alone(shapes, phase):
    side, phases = script("throughput_jax"), script("phases")

    def measured(self, name, batch, *args):
        if name == phase and batch == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        out = jax.eval_shape(self.programs[name, batch].function, *args)
        return {"seconds": 1.0}, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)

    job = phases.Job("tiny", batches=(1, 2), height=32, width=32, steps=1, reward="none", repeats=1)
    with (
        mock.patch.object(side, "_pipeline", return_value=shapes),
        mock.patch.object(side.Meter, "__call__", measured),
        mock.patch.object(side, "_lower"),  # nothing of it is run
        mock.patch.object(side, "_compile", return_value=(None, 0.0)),
    ):
        first, second = side.run(job)["batches"]
    assert first["finite"]
    assert second[phase] == {"error": "out of memory"}
    assert list(second)[-1] == phase


def test_random_params():
    random_weights = script("random_weights")
    pipeline = ses_jax.load_pipeline("demo", dtype=jnp.bfloat16)
    abstract = jax.eval_shape(lambda: {name: pipeline.params[name] for name in ("vae", "text_encoder")})
    params = random_weights.random_params(abstract, seed=1)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    kernel = np.asarray(params["vae"]["decoder"]["conv_in"]["kernel"], np.float32)
    scale = np.asarray(params["vae"]["decoder"]["norm_out"]["scale"], np.float32)
    assert kernel.std() == pytest.approx(0.02, rel=0.2)
    assert scale.mean() == pytest.approx(1.0, rel=0.05)
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_share_of_the_reward_in_a_generation_of_a_published_model(shapes, scorer, tmp_path):
    """With the program of the search below."""
    reward_share, random_weights = script("reward_share"), script("random_weights")
    with (
        mock.patch.object(random_weights, "abstract_pipeline", return_value=shapes),
        mock.patch.object(random_weights, "clip_h", return_value=scorer),
    ):
        path = reward_share.main(
            reward_share.Arguments("published/tiny", 32, 32, 1, population=10, chunk=5, repeats=1, out=tmp_path)
        )
    result = json.loads(path.read_text())
    assert path.name == "reward_share_tiny_cpu.json"
    assert 0 < result["share"] < 1
    assert result["bytes_to_host"] == 10 * 4 * 2  # a score and a low band's size a candidate
    assert result["bytes_of_images"] == 10 * 32 * 32 * 3 * 4


def test_a_whole_search_with_a_published_model(shapes, scorer, tmp_path, capsys):
    real_search, random_weights = script("real_search"), script("random_weights")
    with (
        mock.patch.object(random_weights, "abstract_pipeline", return_value=shapes),
        mock.patch.object(random_weights, "clip_h", return_value=scorer),
    ):
        path = real_search.main(real_search.Arguments("published/tiny", 12, 32, 32, 1, 1, chunk=5, out=tmp_path))
    assert path.name == "search_tiny_cpu.json"
    first, again = json.loads(path.read_text())["searches"]
    assert first["scored"] == again["scored"] == 12
    assert first["chunk"] == 5
    assert again["cost"]["search"]["nfe"] == 12
    assert again["seconds"] < first["seconds"]  # nothing is compiled any more
    assert "s a candidate" in capsys.readouterr().out


def test_timing_stops_at_its_limit():
    phases = script("phases")
    calls = []
    _, runs = phases.median_seconds(lambda: calls.append(0), phases.Job("demo", repeats=5))
    assert runs == len(calls) == 5
    _, runs = phases.median_seconds(lambda: None, phases.Job("demo", repeats=5, limit=1e-9))
    assert runs == 1


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_other_side_has_the_published_sizes(model):
    torch_pipelines = script("torch_pipelines")
    published = torch_pipelines.PUBLISHED[model]
    networks = (published.transformer, published.vae, *published.texts)
    modules = [torch_pipelines.build(network, "meta", torch.bfloat16) for network in networks]
    assert tuple(sum(p.numel() for p in module.parameters()) for module in modules) == PARAMETERS[model]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("model", PARAMETERS)
@torch.no_grad()
def test_the_other_side_runs_without_tokenizers(model):
    """Its networks made tiny; every family's call, decode and score."""
    torch_pipelines, side, phases = script("torch_pipelines"), script("throughput_torch"), script("phases")
    published = torch_pipelines.PUBLISHED[model]
    tiny = [n._replace(config=n.config | TINY[n.name]) for n in (published.transformer, published.vae)]
    modules = [torch_pipelines.build(network, "cpu", torch.float32) for network in tiny]
    pipe = torch_pipelines.assemble(published, dict(zip(("transformer", "vae"), modules, strict=True)))
    pipe.set_progress_bar_config(disable=True)
    guidance = 4.0 if "dev" not in model else 3.5
    job = phases.Job(model, height=32, width=48, steps=2, guidance=guidance, tokens=8, repeats=1, dtype="float32")
    meter = side.Meter(job, phases.Clock("diffusers"), "cpu")
    assert side._speed_up(meter, pipe) == {"attention": "native", "compile": "none"}
    result = {"batch": 2}
    side._batch(meter, pipe, None, result)
    assert set(result) == {"batch", "denoise", "decode", "finite"}
    assert result["finite"]


def test_the_other_side_compiles(folder):
    """Blocks and decoder are captured whole; the kernels themselves are torch's business."""
    side, phases = script("throughput_torch"), script("phases")
    job = phases.Job(str(folder), (1,), 32, 32, 1, 0.0, dtype="float32", reward="none", repeats=1, compile="eager")
    result = side.run(job)
    assert result["settings"]["compile"] == "eager"
    assert result["batches"][0]["finite"]


def test_every_published_model_has_another_side():
    other = script("torch_pipelines").PUBLISHED
    ours = {p.source: family for family in FAMILIES.values() for p in family.PUBLISHED if p.configs}
    assert set(ours) == set(other) == set(PARAMETERS)
    for source, family in ours.items():
        assert FAMILIES[other[source].pipeline] is family


def test_every_way_of_loading_a_network(tmp_path, monkeypatch, capsys):
    """In one process, where the script takes one for each."""
    loading, torch_pipelines = script("loading"), script("torch_pipelines")
    model, name = "black-forest-labs/FLUX.2-klein-4B", "Flux2Transformer2DModel"
    tiny = torch_pipelines.PUBLISHED[model]._replace(transformer=torch_pipelines.Network(name, TINY[name]))
    monkeypatch.setitem(torch_pipelines.PUBLISHED, model, tiny)
    monkeypatch.setattr(loading, "child", lambda args, way: loading.measure(dataclasses.replace(args, way=way)))
    loading.main(loading.Arguments(model, networks=("transformer",), out=tmp_path))
    (file,) = tmp_path.glob("loading_FLUX.2-klein-4B_cpu.json")
    row = json.loads(file.read_text())["rows"]["transformer"]
    assert row["bytes"] > 1000
    assert list(row["ways"]) == list(loading.WAYS)
    assert all(found["seconds"] > 0 and found["peak_bytes"] > row["bytes"] for found in row["ways"].values())
    assert len(capsys.readouterr().out.splitlines()) == len(loading.WAYS) + 1
