"""A word where devices stay unused: once, and not where nothing is to be said."""

import types

import batch_runs
import jax
import pytest

import ses_jax
from ses_jax.loading import partition
from ses_jax.planner import devices, plan
from ses_jax.planner.need import Machine

WORD = '1 of 8 devices is used; mesh="data=8" (--mesh data=8) uses all'


def said(caplog):
    return [record.getMessage() for record in caplog.records if "used" in record.getMessage()]


def search(**settings):
    ses_jax.search(batch_runs.PROMPTS[:2], reward=batch_runs.REWARD, **batch_runs.SETTINGS, **settings)


def test_a_search_says_so_once(caplog):
    search(model=batch_runs.PIPELINE)
    assert said(caplog) == [WORD]
    caplog.clear()
    search(model=batch_runs.PIPELINE, progress=False)
    assert said(caplog) == []


def test_a_run_of_many_prompts_says_so_once(tmp_path, caplog):
    batch_runs.run(batch_runs.PROMPTS[:2], tmp_path / "a", progress=True)
    assert said(caplog) == [WORD]
    batch_runs.run(batch_runs.PROMPTS[:2], tmp_path / "a", progress=True)  # nothing is left to do
    batch_runs.run(batch_runs.PROMPTS[:1], tmp_path / "b", progress=False)
    assert said(caplog) == [WORD]


def test_what_a_mesh_leaves_over():
    whole = partition.parse_mesh("data=2,model=4")
    part = partition.parse_mesh("data=2", jax.devices()[:2])
    assert partition.unused(whole) is None
    assert partition.unused(part, jax.devices()[:2]) is None
    assert partition.unused(part) == '2 of 8 devices are used; mesh="data=8" (--mesh data=8) uses all'
    assert partition.unused(None, jax.devices()[:1]) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("a100-80", "NVIDIA A100-SXM4-80GB"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("v5e", "TPU v5 lite"),
        ("v6e", "TPU v6 lite"),
        ("v4", "TPU v4"),
        ("tpu7x", "TPU7x"),
    ],
)
def test_a_plan_says_so_of_devices_of_the_kind(name, kind, monkeypatch, caplog):
    present = [types.SimpleNamespace(device_kind=kind)] * 4
    assert [one for one in devices.DEVICES if devices.of_name(one, present)] == [
        one for one in devices.DEVICES if one == name or (name, one) == ("a100-80", "a100-40")
    ]
    monkeypatch.setattr(jax, "devices", lambda: present)
    plan._say_unused(Machine(name, "data=2,model=1", False, 0.4))
    assert said(caplog) == ['2 of 4 devices are used; mesh="data=4" (--mesh data=4) uses all']
    plan._say_unused(Machine(name, "data=2,model=2", False, 0.4))
    plan._say_unused(Machine("l40s", "data=1,model=1", False, 0.4))
    assert len(said(caplog)) == 1


def test_a_plan_needs_no_device(monkeypatch, caplog):
    def held():
        raise RuntimeError("The TPU is already in use")

    monkeypatch.setattr(jax, "devices", held)
    plan._say_unused(Machine("v5e", "data=1,model=1", False, 0.4))
    assert said(caplog) == []
