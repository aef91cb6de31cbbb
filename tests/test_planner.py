"""Plans: their arithmetic against formulas, what they advise, and the shell."""

import dataclasses
import functools
import json
import math
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import toy

import ses_jax
from ses_jax import cli
from ses_jax.engine import flops
from ses_jax.engine.config import SearchConfig
from ses_jax.models import target
from ses_jax.pipelines.registry import abstract_pipeline
from ses_jax.planner import advice, devices, footprint, need, tables, workload
from ses_jax.planner.need import Machine
from ses_jax.planner.plan import check_model, plan_on
from ses_jax.planner.workload import Work

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TURBO = "Tongyi-MAI/Z-Image-Turbo"
ALONE = "data=1,model=1"


@pytest.fixture(scope="module")
def work():
    """Ten candidates of 1024 x 1024; the fixture keeps what was traced."""
    pipeline = abstract_pipeline(TURBO)
    return Work(pipeline, SearchConfig(budget=25).resolve(pipeline), 128)


def machine(name="h200", mesh=ALONE, offload=False, utilization=0.4):
    return Machine(name, mesh, offload, utilization)


def test_flops_of_a_search(work):
    pipeline = work.pipeline
    latents = jax.ShapeDtypeStruct((1, 16, 128, 128), jnp.float32)
    step = flops.count(
        pipeline.velocity, pipeline.params, latents, jax.ShapeDtypeStruct((1,), jnp.float32), work.condition
    )
    decode = flops.count(pipeline.decode, pipeline.params, latents)
    plan = plan_on(work, machine())
    reward = plan.candidate_flops - 8 * step - decode
    # ViT-H/14: 32 layers of 12 width^2 and attention over 257 tokens; before it, two products a pass of the resize.
    network, resize = 32 * 257 * (24 * 1280**2 + 4 * 257 * 1280), 2 * 2 * 3 * 224 * (1024 * 1024 + 1024 * 224)
    assert reward == pytest.approx(network + resize, rel=0.01)
    encode = flops.count(pipeline.encode, pipeline.params, pipeline.blank_tokens(1, 128, guidance=0.0))
    assert plan.search_flops == (25 + 2) * plan.candidate_flops + encode  # Turbo's previews have all its steps


def test_a_plan_is_the_same_on_whatever_device_it_is_made():
    def planned():
        workload._traced.cache_clear()
        return ses_jax.plan(TURBO, device="h200").as_json()

    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    with target.compiled_for(tpu):
        there = planned()
    assert there == planned()


def test_bytes_of_a_search(work):
    plan = plan_on(work, machine())
    sizes = {name: sum(x.size * 2 for x in jax.tree.leaves(tree)) for name, tree in work.pipeline.params.items()}
    assert plan.weights == sizes | {"reward": footprint.size_of(work.scorer.params)}
    assert plan.weights["reward"] == pytest.approx(2 * 986e6, rel=0.01)
    everything = sum(plan.weights.values())
    # An image of a megapixel is decoded at a time.
    searching = max(work.step(10).temporary_bytes, work.finish(1).temporary_bytes)
    assert (plan.encode_bytes, plan.search_bytes) == (
        everything + int(need.HELD["gpu"] * work.encode().temporary_bytes),
        everything + int(need.HELD["gpu"] * searching),
    )
    on_tpu = plan_on(work, machine("v6e"))
    assert on_tpu.encode_bytes == everything + work.encode().temporary_bytes
    assert on_tpu.search_bytes == everything + searching
    assert plan.fits
    assert plan.chunk == 10
    assert plan.limit_bytes == pytest.approx(0.92 * devices.DEVICES["h200"].memory)


def test_looks_are_planned(work):
    """Ten previews of half the size, then three full ones; of the last five candidates two."""
    config = SearchConfig(budget=25, fidelity="half4:0.3").resolve(work.pipeline)
    looks = Work(work.pipeline, config, 128)
    half = Work(work.pipeline, SearchConfig(height=512, width=512).resolve(work.pipeline), 128)
    plan, full, small = (plan_on(w, machine(utilization=0.5)) for w in (looks, work, half))
    decode = half.finish(1).flops
    look = (small.candidate_flops - decode) // 8 * 4 + decode  # Turbo has 8 steps
    encode = work.encode().flops
    assert plan.search_flops == 25 * look + (8 + 2) * full.candidate_flops + encode
    assert plan.candidate_flops == (25 * look + 8 * full.candidate_flops) // 25
    assert plan.candidate_seconds * 25 == pytest.approx(3 * (10 * look + 3 * full.candidate_flops) / (0.5 * 989e12))
    assert plan.search_bytes == full.search_bytes
    assert "8 steps after half4:0.3" in str(plan)


def test_time_of_a_search(work):
    fast, slow = (plan_on(work, machine(utilization=share)) for share in (0.5, 0.25))
    rate = 0.5 * 989e12
    # Three generations of ten; the last has surplus candidates.
    assert fast.candidate_seconds * 25 == pytest.approx(30 * fast.candidate_flops / rate)
    others = (2 * fast.candidate_flops + work.encode().flops) / rate
    assert fast.search_seconds == pytest.approx(30 * fast.candidate_flops / rate + others)
    assert slow.search_seconds == pytest.approx(2 * fast.search_seconds)


def test_reading_the_weights_can_be_the_bottleneck():
    pipeline = abstract_pipeline(TURBO)
    config = SearchConfig(height=64, width=64, budget=2, population=2, elites=1, level=1).resolve(pipeline)
    small = Work(pipeline, config, 16)
    plan = plan_on(small, machine("4090", offload=True, utilization=1.0))
    read = (plan.weights["transformer"] + plan.weights["vae"]) / 1.008e12
    assert plan.candidate_seconds * 2 == pytest.approx(8 * read + 2 * small.finish(1).flops / 165e12)


def test_meshes(work):
    alone, model, data, both = (
        plan_on(work, machine(mesh=f"data={d},model={m}")) for d, m in [(1, 1), (1, 2), (5, 1), (5, 2)]
    )
    for split, whole in [(model, alone), (both, data)]:
        assert split.weights["transformer"] == pytest.approx(whole.weights["transformer"] / 2, rel=0.01)
        assert split.weights["text_encoder"] == pytest.approx(whole.weights["text_encoder"] / 2, rel=0.01)
        assert split.weights["vae"] == whole.weights["vae"]
    assert data.weights == alone.weights
    assert data.candidate_seconds == pytest.approx(alone.candidate_seconds / 5)
    # Rows are denoised along the data axis, and decoded on all devices, one on each at a time.
    for plan, rows, parts in [(alone, 10, 1), (model, 10, 2), (data, 2, 1), (both, 2, 2)]:
        temporaries = max(work.step(rows, model=parts).temporary_bytes, work.finish(1).temporary_bytes)
        held = need.HELD["gpu"]
        assert plan.search_bytes == sum(plan.weights.values()) + int(held * temporaries)
        assert plan.encode_bytes == sum(plan.weights.values()) + int(held * work.encode(parts).temporary_bytes)
    # Heads and hidden channels are split, tokens are not.
    assert 0.5 < work.step(10, model=2).temporary_bytes / work.step(10).temporary_bytes < 0.8
    assert work.step(10, model=2).flops == work.step(10).flops
    assert both.candidate_seconds < data.candidate_seconds
    assert {plan.candidate_flops for plan in (alone, model, data, both)} == {alone.candidate_flops}


def test_offloading_keeps_the_larger_part_alone(work):
    kept, offloaded = plan_on(work, machine()), plan_on(work, machine(offload=True))
    sizes = kept.weights
    assert offloaded.search_bytes == kept.search_bytes - sizes["text_encoder"]
    refiner = kept.encode_bytes - offloaded.encode_bytes - sizes["vae"]  # the transformer but its caption refiner
    assert 0.9 * sizes["transformer"] < refiner < sizes["transformer"]


def test_the_largest_chunk_that_fits(work):
    crowd = Work(work.pipeline, SearchConfig(population=100, budget=200).resolve(work.pipeline), 128)
    plan = plan_on(crowd, machine("5090"))
    assert 1 < plan.chunk < 100
    assert plan.fits
    assert plan.search_bytes <= plan.limit_bytes
    wider = need.need_of(crowd, machine("5090"), plan.chunk + 1)
    assert wider.search > plan.limit_bytes


@pytest.mark.parametrize(
    ("name", "share", "told"), [("4090", 0.8, True), ("4090", 0.7, False), ("v6e", 0.8, False), ("v4", 0.8, False)]
)
def test_a_gpu_that_must_be_filled_takes_more_than_jax_does_by_default(name, share, told):
    needed = need.Need(encode=0, search=int(share * devices.device(name).memory))
    lines = list(advice.memory_fraction(needed, machine(name)))
    assert len(lines) == told
    assert all("XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" in line for line in lines)


def test_rows_that_compute_for_nothing_are_told(work):
    def told(population, mesh):
        changed = Work(work.pipeline, dataclasses.replace(work.config, population=population), 128)
        return list(advice.idle_rows(changed, machine("v6e", mesh)))

    assert told(10, "data=8") == [
        "of 16 rows on data=8, 6 compute for nothing: --population 16 makes candidates of them"
    ]
    assert told(16, "data=8") == told(10, "data=5,model=2") == told(10, "model=8") == []


@pytest.fixture(scope="module")
def changed(work):
    """The same work after changes that a device may have been advised."""

    @functools.cache
    def make(quantize=None, **sides):
        pipeline = abstract_pipeline(TURBO, quantize=quantize)
        return Work(pipeline, SearchConfig(**sides).resolve(pipeline) if sides else work.config, 128)

    return make


@pytest.mark.parametrize("name", ["4090", "v5e"])
def test_advice_makes_it_fit(work, changed, name):
    plan = plan_on(work, machine(name))
    assert not plan.fits
    assert plan.chunk == 1
    assert any("--quantize int8" in line for line in plan.advice)
    for line in plan.advice:
        flags = dict(part.split(" ", 1) if " " in part else (part, "") for part in line.split(" --")[1:])
        assert flags, line
        if "height" in flags:
            smaller = changed(**{side: int(flags[side]) for side in ("height", "width")})
            assert plan_on(smaller, machine(name)).fits
        else:
            offload = "offload-text-encoder" in flags
            asked = changed(quantize=flags["quantize"]) if "quantize" in flags else work
            assert plan_on(asked, machine(name, flags.get("mesh", ALONE), offload)).fits


def test_a_chunk_that_the_caller_wants_is_taken_and_spoken_about(work):
    plan = ses_jax.plan(TURBO, device="5090", population=100, budget=100, chunk=100)
    assert plan.chunk == 100
    assert not plan.fits
    assert plan.advice == ("candidates at a time: --chunk 1, or leave it out",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "abacus"}, "abacus.*h200"),
        ({"mesh": "rows=2"}, "rows=2"),
        ({"mesh": "data=-1,model=2"}, "size of every axis"),
        ({"mesh": "data=1,model=7"}, "7"),
        ({"height": 1000}, "multiple of 16"),
        ({"utilization": 0.0}, "utilization"),
        ({"population": 1}, "population"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        ses_jax.plan(TURBO, **options)


def test_an_unknown_model():
    with pytest.raises(ValueError, match=r"known: .*Z-Image"):
        ses_jax.plan("nobody/nothing")


def test_a_loaded_pipeline_is_asked_for_by_its_folder():
    with pytest.raises(ValueError, match="model is a loaded pipeline; pass its name or folder, 'toy'"):
        check_model(toy.pipeline())


def test_shell(capsys):
    small = ["--height", "256", "--width", "256", "--population", "2"]
    assert cli.main(["plan", TURBO, *small, "--device", "h200", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["settings"]["height"] == 256
    assert math.isfinite(plan["search_seconds"])
    assert cli.main(["plan", TURBO, *small, "--device", "v5e"]) == 1
    text = capsys.readouterr().out
    assert "fits                  no" in text
    assert "--mesh data=1,model=2" in text
    assert cli.main(["plan", TURBO, "--device", "abacus"]) == 2


def test_overview(work):
    header, rule, row = tables.overview(["h200"], [TURBO]).splitlines()
    assert header == "| model | h200 |"
    assert rule == "| --- | --- |"
    assert row.startswith(f"| `{TURBO}` | chunk 10, ")
    assert tables._cell(work, "4090").startswith("chunk 10, offloaded, ")
    assert tables._cell(work, "v5e").startswith("2 devices, ")


def test_every_published_model_is_known():
    assert TURBO in tables.published()
    assert "demo" not in tables.published()


def test_a_searcher_that_needs_gradients_takes_more():
    """Of arithmetic about four times as much, and of memory for what a block of the network keeps, not for all.

    Weights in eight bits have no derivatives of their own, and are in nobody's way.
    """
    settings = {"budget": 4, "height": 512, "width": 512, "chunk": 1, "quantize": "int8"}
    plain, climbing = (
        ses_jax.plan("Tongyi-MAI/Z-Image-Turbo", searcher=name, **settings) for name in ("ses", "gradient")
    )
    assert 3 < climbing.candidate_flops / plain.candidate_flops < 4.2
    assert climbing.candidate_seconds > 3 * plain.candidate_seconds
    assert plain.search_bytes < climbing.search_bytes < plain.search_bytes + 4e9
    assert "steps and their gradient" in str(climbing)
    assert "gradient" not in str(plain)


H100, H200 = "NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"


@pytest.mark.parametrize(
    ("model", "device", "name"),
    [
        ("black-forest-labs/FLUX.2-klein-4B", "h100", f"search_FLUX.2-klein-4B_{H100}"),
        ("black-forest-labs/FLUX.2-klein-4B", "h200", f"search_FLUX.2-klein-4B_{H200}"),
        ("Tongyi-MAI/Z-Image-Turbo", "h200", f"search_Z-Image-Turbo_{H200}"),
        ("black-forest-labs/FLUX.1-dev", "h100", f"throughput_FLUX.1-dev_1024x1024_b1-10_{H100}"),
        ("black-forest-labs/FLUX.1-dev", "h200", f"throughput_FLUX.1-dev_1024x1024_b1-4_{H200}"),
    ],
)
def test_plans_for_gpus_are_close_to_what_was_measured(model, device, name):
    """Candidates of the models' own preview steps, on random weights; a whole search's memory."""
    measured = json.loads((RESULTS / f"{name}.json").read_text())
    planned = ses_jax.plan(model, device=device, progress=False)
    assert planned.settings["utilization"] == 0.55
    if "searches" in measured:
        last = measured["searches"][-1]
        spent = last["cost"]["search"]
        seconds = spent["seconds"] / spent["images"]
        assert 0.98 < planned.search_bytes / last["peak_bytes"] < 1.1
    else:
        most = measured["jax"]["batches"][-1]
        seconds = 10 * most["denoise"]["seconds_per_step"] / most["batch"] + most["decode"]["seconds"] / most["batch"]
    assert seconds < planned.candidate_seconds < 1.15 * seconds
