"""What compilers say of a search: the programs are the search's own, and what is read from them is what is in them."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ses_jax
from ses_jax import cli
from ses_jax.engine import generation, memory, outline
from ses_jax.engine.config import SearchConfig
from ses_jax.loading import compiler, partition
from ses_jax.loading.programs import KEPT, Compiled
from ses_jax.models import attention, blip, clip, score_head
from ses_jax.planner import compilation, hlo, topologies, workload
from ses_jax.rewards import scorers
from ses_jax.rewards.preprocess import Preprocessor

ROOT = Path(__file__).parents[1]
TURBO = "Tongyi-MAI/Z-Image-Turbo"
PROMPTS = ["a", "four"]


def mesh(data, model=1):
    devices = np.array(jax.devices()[: data * model])
    return Mesh(devices.reshape(data, model), partition.AXES)


class Recorder(Compiled):
    """A compiled function that notes the text of every program it runs."""

    def __init__(self, compiled):
        super().__init__(compiled.__wrapped__, static=compiled._static, keep=KEPT, denoises=compiled._denoises)
        self.texts = []

    def __call__(self, *args):
        self.texts.append(self.lower(*args).as_text())
        return super().__call__(*args)


@pytest.mark.parametrize("reward", [toy.brightness(), toy.mixture(red=1.0, blue=0.5)], ids=["one", "mixture"])
@pytest.mark.parametrize("generations", [["generation_step"], ["denoised", "judged"]], ids=["whole", "in two"])
def test_a_search_runs_what_is_lowered_from_shapes(reward, generations, monkeypatch):
    """Word for word, whatever lies where: encoding, generations and final images."""
    monkeypatch.setattr(compiler, "denoises_apart", lambda mesh: len(generations) == 2)
    pipeline = toy.pipeline(mesh(2))
    settings = {"budget": 8, "population": 4, "elites": 2, "chunk": 2, "steps": 3, "preview_steps": 2}
    recorders = {name: Recorder(getattr(generation, name)) for name in ("encode", *generations, "render")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(generation, name, recorder)
    ses_jax.search(PROMPTS, model=pipeline, reward=reward, prompts_at_once=2, progress=False, **settings)

    config = SearchConfig(**settings).resolve(pipeline)
    tokens = pipeline.tokenize(PROMPTS, guidance=config.guidance)
    task = outline.outline(pipeline, reward, config, tokens)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((task.params, task.inputs)))
    lowered = {
        "encode": outline.lower_encode(pipeline, tokens),
        **dict(zip(generations, outline.lower_generation(task, 2), strict=True)),
        "render": outline.lower_render(task, 2),
    }
    for name, recorder in recorders.items():
        assert set(recorder.texts) == {lowered[name].as_text()}, name


def test_programs_that_run_one_after_the_other_come_to_one():
    sums = {"all-reduce": {"count": 2, "bytes": 8}}
    first = compilation.Program(10.0, 100, 50, 5, collectives=sums, kernels={"a": 1, "b": 2}, seconds=3.0)
    second = compilation.Program(
        1.0, 90, 20, 40, collectives=sums | {"all-gather": {"count": 1, "bytes": 4}}, kernels={"b": 1}, seconds=0.5
    )
    both = compilation._then(first, second)
    assert both == compilation._then(second, first)
    assert (both.compile_seconds, both.argument_bytes, both.seconds) == (11.0, 100, 3.5)
    assert both.working_bytes == max(first.working_bytes, second.working_bytes) == 60
    assert both.collectives == {"all-reduce": {"count": 4, "bytes": 16}, "all-gather": {"count": 1, "bytes": 4}}
    assert both.kernels == {"a": 1, "b": 3}
    refused = compilation._then(first, compilation.Program(1.0, 0, 1000, refusal="too large"))
    assert (refused.refusal, refused.working_bytes, refused.seconds) == ("too large", 1000, None)


# What is read from programs.


def compiled_text(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def test_collectives_are_counted_as_often_as_they_run():
    @functools.partial(jax.shard_map, mesh=mesh(2), in_specs=P("data"), out_specs=P("data"))
    def summed(x):
        step = lambda carry, _: (jnp.sin(carry + jax.lax.psum(carry, "data")), None)  # noqa: E731
        inner = lambda carry, _: (jax.lax.scan(step, carry, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, length=5)[0]

    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32, sharding=NamedSharding(mesh(2), P("data")))
    found = list(hlo.instructions(compiled_text(summed, x)))
    assert hlo.collectives(found) == {"all-reduce": {"count": 15, "bytes": 15 * 64 * 8 * 4}}


def test_what_is_gathered_counts_as_it_arrives():
    @functools.partial(jax.shard_map, mesh=mesh(4), in_specs=P("data"), out_specs=P(), check_vma=False)
    def gathered(x):
        return jax.lax.all_gather(x, "data", tiled=True) * 2

    x = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=NamedSharding(mesh(4), P("data")))
    found = list(hlo.instructions(compiled_text(gathered, x)))
    total = hlo.collectives(found)["all-gather"]
    assert total["count"] == 1
    assert total["bytes"] in (8 * 16 * 2, 8 * 16 * 4)  # XLA gathers bfloat16 as float32 on CPUs


TPU_PROGRAM = """HloModule jit_f
%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %a = bf16[8,128]{1,0} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"7"}}
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %f = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %k = bf16[8,128]{1,0} custom-call(%f), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attention/flash_attention"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"1"}}}
  %s = (bf16[8,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%k), dimensions={0}
  %d = bf16[16,128]{1,0} all-gather-done(%s)
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%x, %k)
}

%condition (t: (s32[], bf16[8,128])) -> pred[] {
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(12)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %m = s32[8]{0} custom-call(%x), custom_call_target="AssumeGatherIndicesInBound"
  %w = (s32[], bf16[8,128]{1,0}) while(%x), condition=%condition, body=%body
  ROOT %o = bf16[8,128]{1,0} fusion(%w), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"5"}}
}
"""  # noqa: E501


def test_cycles_and_kernels_of_a_tpus_program():
    found = list(hlo.instructions(TPU_PROGRAM))
    assert hlo.cycles(found) == 12 * 100 + 5
    assert hlo.kernels(found) == {"mosaic flash_attention": 12}
    assert hlo.kernel_flops(found) == 12 * 1000
    assert hlo.collectives(found) == {"all-gather": {"count": 12, "bytes": 12 * 16 * 128 * 2}}


@pytest.mark.parametrize("rows", ["", "2,"])
def test_splash_attention_is_counted_by_its_shapes(rows):
    """Its metadata goes over lines, some of which begin as the end of a computation does."""
    kernel = "%k = bf16[8,128]{1,0} custom-call(%f)"
    queries, keys = (f"bf16[{rows}3,{length},128]{{2,1,0}}" for length in (256, 384))
    shapes = f"s8[1,3,3]{{2,1,0}}, {queries}, {keys}, {keys}, s32[256,128]{{1,0}}"
    splash = kernel.replace("%k", "%splash_mha_fwd.2")
    text = TPU_PROGRAM.replace(kernel, splash).replace('"flops"', '"no"').replace("%k)", "%splash_mha_fwd.2)")
    more = f'operand_layout_constraints={{{shapes}}}, frontend_attributes={{kernel_metadata={{\n"a":1\n}}}}'
    text = text.replace('"tpu_custom_call"', f'"tpu_custom_call", {more}')
    found = list(hlo.instructions(text))
    assert len(found) == len(list(hlo.instructions(TPU_PROGRAM)))
    assert hlo.kernels(found) == {"mosaic splash_mha_fwd": 12}
    assert hlo.kernel_flops(found) == 12 * 4 * (2 if rows else 1) * 3 * 256 * 384 * 128


def test_a_loop_that_goes_with_the_rounds_of_a_ring_of_devices():
    """As products over split channels become on several TPUs: two rounds a turn, counted without a sign."""
    text = TPU_PROGRAM.replace("s32[]", "u32[]").replace(
        "  ROOT %r = (u32[], bf16[8,128]{1,0}) tuple(%x, %k)",
        "  %i = u32[] get-tuple-element(%t), index=0\n  %two = u32[]{:T(128)} constant(2)\n"
        "  %next.1 = u32[]{:T(128)} add(%i, %two), metadata={}\n"
        "  ROOT %r = (u32[], bf16[8,128]{1,0}) tuple(%next.1, %k)",
    )
    assert hlo.kernels(list(hlo.instructions(text))) == {"mosaic flash_attention": 6}
    assert (
        hlo.kernels(list(hlo.instructions(text.replace("constant(2)", "constant(5)"))))["mosaic flash_attention"] == 3
    )


def test_a_program_that_cannot_be_read_has_bytes_all_the_same(monkeypatch, caplog):
    def refuse(text):
        raise ValueError("how often does this loop run?")

    monkeypatch.setattr(hlo, "instructions", refuse)
    target = compilation.Target("h100", encode=0, search=0, chunk=1)
    found = compilation._compile_one(target, "encode", jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))))
    assert not found.readable
    assert found.seconds is None
    assert found.output_bytes == 4 * 64 * 64
    assert "how often" in caplog.text


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="how often does this loop run"):
        list(hlo.instructions(TPU_PROGRAM.replace("constant(12)", "parameter(1)")))


# Compilers.


def test_what_no_compiler_is_known_for():
    with pytest.raises(ValueError, match=r"no compiler for 'v4'.*v6e.*h100"):
        ses_jax.plan(TURBO, device="v4", compile=True)
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        ses_jax.plan(TURBO, device="abacus", compile=True)
    with pytest.raises(ValueError, match=r"512 devices of v5e: .* 256"):
        ses_jax.plan(TURBO, device="v5e", mesh="data=512", compile=True)


@pytest.mark.parametrize(("device", "extra"), [("v6e", "tpu"), ("h100", "cuda")])
def test_an_absent_compiler_is_named(device, extra, monkeypatch, capsys):
    monkeypatch.setattr(topologies, "_installed", lambda name: False)
    assert cli.main(["plan", TURBO, "--device", device, "--compile"]) == 2
    assert f"pip install 'ses_jax[{extra}]'" in capsys.readouterr().err


def test_a_plugin_that_was_put_aside_for_want_of_a_gpu(monkeypatch):
    def refused(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "_installed", lambda name: True)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refused)
    with pytest.raises(ValueError, match=r"compiling for h100: .*set JAX_PLATFORMS=cpu before JAX is first used"):
        topologies.target_mesh("h100", "data=1,model=1")


@pytest.mark.parametrize("name", topologies.TPUS)
def test_topologies_have_the_devices_that_they_should(name):
    """Those of eight chips at most; a few devices of a topology may be all that is wanted."""
    for count in (size for size in topologies.TPUS[name].sizes if size <= 8):
        found = topologies.target_mesh(name, f"data={count}")
        assert found.devices.shape == (count, 1)
    assert topologies.target_mesh(name, "data=1,model=2").devices.shape == (1, 2)


def test_a_program_that_cannot_be_read_is_measured_all_the_same(monkeypatch):
    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390)")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    program = compile_toy(chunk=8).programs["generation"]
    assert program.argument_bytes > 0
    assert (program.readable, program.seconds, program.attention) == (False, None, "unknown kernels")


def test_a_refused_program_says_how_much_it_needs():
    target = topologies.target_mesh("v6e", "data=1,model=1")
    shape = jax.ShapeDtypeStruct((50000, 1000, 1024), jnp.float32, sharding=NamedSharding(target, P()))
    lowered = jax.jit(lambda x: jnp.sort(x, axis=0) + 1).lower(shape)
    with topologies.no_flags():
        needed = memory.working_bytes([lowered])
    assert needed >= 4 * 50000 * 1000 * 1024 > topologies.limit_bytes("v6e")
    with pytest.raises(jax.errors.JaxRuntimeError, match="other words"):
        memory.refused_bytes(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: other words"))


LONG = [("v6e", (4, 16384, 1, 512)), *((d, s) for d in ("v5e", "v5p", "v6e", "tpu7x") for s in
        [(4, 16384, 1, 512), (2, 4096, 24, 128), (2, 4096, 24, 256)])]  # fmt: skip


MORE = [pytest.param(*c, d, marks=pytest.mark.compilers) for c in LONG for d in (False, True)]


@pytest.mark.parametrize(("device", "shape", "derivative"), [(*LONG[0], False), *MORE])
def test_attention_of_full_size_fits_the_vector_memory(device, shape, derivative):
    """Of the autoencoders' middle at 1024 x 1024, and of transformers; and its derivatives."""
    chip = topologies.target_mesh(device, "data=1")
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(chip, P()))

    @jax.jit
    def attend(q, k, v):
        with partition.compiled_for(chip):
            if not derivative:
                return attention.attention(q, k, v)
            with partition.differentiated():
                return jax.vjp(attention.attention, q, k, v)[1](jnp.ones((*q.shape[:2], shape[2] * shape[3]), q.dtype))

    with topologies.no_flags():
        program = attend.lower(x, x, x).compile()
    found = compilation._instructions(program)
    assert found is None or any(hlo.SPLASH in each.line for each in found)
    score_bytes = 2 * shape[0] * shape[1] ** 2 * shape[2]
    assert program.memory_analysis().temp_size_in_bytes < score_bytes / 2


def compile_toy(chunk):
    """A search without networks for four TPUs; `chunk` candidates at a time are expected to fit."""
    pipeline = toy.pipeline(topologies.target_mesh("v6e", "data=2,model=2"))
    config = SearchConfig(population=8, budget=16, elites=2).resolve(pipeline)
    tokens = pipeline.tokenize([""], guidance=config.guidance)
    return compilation.compile_search(
        pipeline, toy.brightness(), config, tokens, compilation.Target("v6e", 0, 0, chunk)
    )


def test_a_search_compiles_for_tpus(monkeypatch):
    found = compile_toy(chunk=2)
    assert (found.fits, found.chunk, set(found.others)) == (True, 8, {2})
    assert found.programs.keys() == {"encode", "generation", "render"}
    assert found.programs["generation"].seconds > found.programs["encode"].seconds >= 0
    assert found.programs["generation"].collectives
    assert not found.programs["encode"].collectives
    assert found.programs["generation"].attention == "XLA"
    text = dict(compilation.lines(found))
    assert "libtpu" in text["compiled with"]
    assert "by the compiler's estimate" in text["  generation"]

    monkeypatch.setattr(topologies, "limit_bytes", lambda device: 1)
    less = compile_toy(chunk=2)
    assert (less.fits, less.chunk, set(less.others)) == (False, 1, {2})


# Tiny models: every family, and every network that scores.

TOWER = clip.Tower(64, 64, 1, 2, "gelu")
CLIP = clip.Config(text=TOWER, vision=TOWER, projection_dim=64)
BLIP = blip.Config(blip.Bert(64, 64, 1, 2), TOWER)
KEY = jax.random.key(0)
SMALL = {"height": 32, "width": 32, "population": 2, "budget": 2, "preview_steps": 2, "steps": 3}


def clip_like(preprocess, score):
    return scorers.Scorer(
        name="clip",
        params=clip.init(KEY, CLIP),
        tokenize=lambda prompts: np.zeros((len(prompts), CLIP.max_length), np.int32),
        embed_text=functools.partial(scorers.embed_clip, CLIP),
        score=scorers.ImageScore(preprocess, functools.partial(score, CLIP)),
    )


def aesthetic():
    return scorers.Scorer(
        name="aesthetic",
        params={"clip": clip.init(KEY, CLIP), "head": score_head.init(KEY, score_head.Config(CLIP.projection_dim))},
        tokenize=lambda prompts: np.zeros((len(prompts), 0), np.int32),
        embed_text=lambda params, tokens: tokens,
        score=scorers.ImageScore(Preprocessor(half_to_even=True), functools.partial(scorers.aesthetic_score, CLIP)),
    )


def image_reward():
    return scorers.Scorer(
        name="imagereward",
        params={"blip": blip.init(KEY, BLIP), "head": score_head.init(KEY, score_head.Config(BLIP.text.hidden_size))},
        tokenize=lambda prompts: blip.Tokens(np.zeros((len(prompts), 35), np.int32), np.ones((len(prompts), 35), bool)),
        embed_text=lambda params, tokens: tokens,
        score=scorers.ImageScore(Preprocessor(half_to_even=True), functools.partial(scorers.image_reward, BLIP)),
    )


SCORERS = {
    "clip": lambda: clip_like(Preprocessor(), scorers.clip_score),
    "hps": lambda: clip_like(Preprocessor(resize_floats=True), scorers.cosine),
    "aesthetic": aesthetic,
    "imagereward": image_reward,
}
# A family and a scorer compile together, on one device, or on two that share the weights.
PAIRS = list(zip(tiny.TINY, [*SCORERS, "clip"], [1, 2, 1, 2, 2], strict=True))
COMPILERS = {"v6e": "libtpu", "h100": "jax-cuda12-plugin"}
ATTENTION = {"v6e": "XLA", "h100": "__cudnn$fmha"}


def publish(monkeypatch, source, scorer):
    """A tiny model in the place of a published one, and a tiny scorer in that of the plan's."""
    tiny.publish(monkeypatch, source)

    def shapes(dtype, quantize=None):
        made = jax.eval_shape(lambda: SCORERS[scorer]().params)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), made)
        return dataclasses.replace(SCORERS[scorer](), params=params)

    monkeypatch.setattr(workload, "clip_scorer", shapes)


@pytest.mark.compilers
@pytest.mark.parametrize("device", COMPILERS)
@pytest.mark.parametrize(("source", "scorer", "model"), PAIRS, ids=[f"{s} {r}" for s, r, _ in PAIRS])
def test_every_family_and_scorer_compiles(source, scorer, model, device, monkeypatch):
    if not topologies.available(device):
        pytest.skip(f"{COMPILERS[device]} is not installed")
    publish(monkeypatch, source, scorer)
    found = ses_jax.plan(source, device=device, mesh=f"data=1,model={model}", compile=True, **SMALL).compiled
    assert found.programs.keys() == {"encode", "generation", "render"}
    assert (found.fits, found.chunk) == (True, SMALL["population"])
    for name, program in found.programs.items():
        assert not program.refusal
        assert bool(program.collectives) == (model > 1), name
        assert ATTENTION[device] in program.attention, name
        assert (program.seconds is None) == (device == "h100"), name


@pytest.mark.compilers
def test_gradients_compile(monkeypatch):
    publish(monkeypatch, TURBO, "clip")
    settings = SMALL | {"searcher": "gradient,climbers=2"}
    found = ses_jax.plan(TURBO, device="v6e", mesh="data=1,model=1", compile=True, **settings).compiled
    assert (found.fits, found.chunk) == (True, 2)
    assert not any(program.refusal for program in found.programs.values())


def test_the_script_makes_what_is_left(monkeypatch, tmp_path, capsys):
    asked_for = []

    def compile_search(pipeline, reward, config, tokens, target):
        asked_for.append((target.device, pipeline.mesh.devices.shape))
        program = compilation.Program(1.0, 2**20, 2**21, seconds=0.5)
        programs = {"encode": program, "generation": program, "render": program}
        return compilation.Compilation("a compiler", 2**30, 5, 2**21, 2**22, True, programs, {})

    publish(monkeypatch, TURBO, "clip")
    monkeypatch.setattr(compilation, "compile_search", compile_search)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("compiled")
    asked = script.Arguments(devices=("v6e",), models=(TURBO,), counts=(8,), height=32, width=32, out=tmp_path)
    for _ in range(2):
        script.main(asked)
    assert asked_for == [("v6e", (8, 1))]  # once
    assert capsys.readouterr().out.count("chunk 5") == 1
    entries = json.loads((tmp_path / "compiled.json").read_text())["entries"]
    assert list(entries) == [f"{TURBO} on 8 v6e"]
    (entry,) = entries.values()
    assert entry["mesh"] == "data=8,model=1"
    assert entry["chunk"] == 5


def test_the_script_compares_two_forms_of_decoding(monkeypatch, tmp_path, capsys):
    tiny.publish(monkeypatch, TURBO)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("decoding")
    monkeypatch.setattr(topologies, "target_mesh", lambda device, axes: mesh(2))
    seen = []
    in_phases = script.autoencoder_kl.in_phases
    monkeypatch.setattr(script.autoencoder_kl, "in_phases", lambda x: (seen.append(len(x)), in_phases(x))[1])
    script.main(script.Arguments(models=(TURBO,), mesh="data=2,model=1", height=32, width=48, out=tmp_path))
    assert seen.count(2) == 1  # of the one form, not of the other
    saved = json.loads((tmp_path / "decoding.json").read_text())
    ((key, found),) = saved["entries"].items()
    assert key == f"{TURBO}, 32 x 48, v6e, data=2,model=1"
    assert list(found) == ["by phase", "plain"]
    assert all(each["temporary_bytes"] > 0 for each in found.values())
    assert key in capsys.readouterr().out
