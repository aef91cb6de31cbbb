"""Many processes on one machine: they meet, share the prompts, and the loss of one costs nobody else anything."""

import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import jax
import mesh_process
import numpy as np
import oracle
import pytest
from batch_runs import PROMPTS, finished, lines, run, stable_files, start, wait_for
from forked import finish, fork

import ses_jax
from ses_jax import cli
from ses_jax.batch import processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Bytes of a run in one process."""
    out = tmp_path_factory.mktemp("alone")
    run(PROMPTS, out)
    return stable_files(out)


def start_all(out, count, **settings):
    """Starts processes that meet at a coordinator."""
    coordinator = f"127.0.0.1:{free_port()}"
    places = [{"coordinator": coordinator, "process_id": i, "num_processes": count} for i in range(count)]
    return [start(out, meet=place, **settings) for place in places]


def test_two_processes_of_a_cluster_share_the_prompts(tmp_path, alone):
    """SLURM's variables are what the cluster announces."""
    announced = {
        "SLURM_JOB_ID": str(free_port()),  # JAX derives the port from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    places = [announced | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    running = [start(tmp_path, meet={}, environment=place) for place in places]
    for index, (status, out, error) in enumerate(map(finish, running)):
        assert status == 0, error
        assert out.startswith(f"met {index} 2\n")
        assert [row["index"] for row in lines(tmp_path / f"results-{index}.jsonl")] == list(range(index, 8, 2))
    assert [row["index"] for row in lines(tmp_path / "results.jsonl")] == list(range(8))
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] == 8
    assert stable_files(tmp_path) == alone


def test_a_mesh_may_span_processes(tmp_path):
    """All run the same search and end with the same scores; one of them writes, and calls what scores on the host."""
    folder = tmp_path / "model"
    sizes = oracle.ZImageSizes(
        dim=24, heads=2, axes_dims=(4, 4, 4), layers=1, refiner_layers=1, text_layers=2, vae_widths=(4, 8), vae_layers=1
    )
    oracle.z_image_pipeline(sizes, seed=3).save_pretrained(folder)
    oracle.save_clip(folder / "clip", oracle.clip(seed=1))
    settings = {"model": str(folder), "budget": 4, "population": 3, "elites": 2, "preview_steps": 1, "steps": 1}
    settings |= {"height": 32, "width": 32, "level": 1, "prompts_at_once": 2, "prompt": ["a cat", "b"]}
    results = ses_jax.search(reward="clip", progress=False, **settings)
    expected = [[row["score"] for row in result.history] for result in results], mesh_process.candidates()
    connect = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    spanning = settings | {"out": str(tmp_path), "resume": True}
    running = [
        fork(tmp_path / "said", mesh_process.search, spanning | {"connect": connect | {"process_id": i}})
        for i in range(2)
    ]
    judged = []
    for status, out, error in (finish(process, seconds=300) for process in running):
        assert status == 0, error
        *of_meshes, last = out.splitlines()[-len(expected) - 1 :]
        judged.append(json.loads(last))
        for line, alone in zip(of_meshes, expected, strict=True):
            np.testing.assert_allclose(json.loads(line), alone, rtol=1e-4, atol=1e-4)
    for mesh in ("model=2", "data=2"):
        assert sorted(path.name for path in (tmp_path / mesh).iterdir()) == ["000", "001"]
    (scores, *leading), (same, *other) = judged
    assert scores == same
    assert leading == [4, "judge is down"]
    assert other == [0, "the process that leads the mesh failed with RuntimeError: judge is down"]


def test_four_processes_lose_two_and_two_others_finish(tmp_path, alone):
    """The coordinator, process 0, is one of the lost."""
    running = start_all(tmp_path, 4, sleep=0.4)
    wait_for((tmp_path, "00000/result.json"), *running)
    running[0].process.kill()
    running[2].process.terminate()
    statuses = [finish(process)[0] for process in running]
    assert statuses == [-signal.SIGKILL, 0, 128 + signal.SIGTERM, 0]
    before = finished(tmp_path)
    assert {"00000", "00001", "00003", "00005", "00007"} <= set(before) < {f"{i:05d}" for i in range(8)}
    assert not (tmp_path / "results.jsonl").exists()

    again = [start(tmp_path, process_id=i, num_processes=2) for i in range(2)]
    assert [finish(process)[0] for process in again] == [0, 0]
    assert before.items() <= finished(tmp_path).items()
    assert [row["index"] for row in lines(tmp_path / "results.jsonl")] == list(range(8))
    noted = [row["index"] for path in tmp_path.glob("results-*.jsonl") for row in lines(path)]
    assert len(noted) == len(set(noted))
    assert stable_files(tmp_path) == alone


def test_a_callers_own_jax_distributed_is_the_place(tmp_path, alone):
    place = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": 2}
    running = [start(tmp_path, connect=place | {"process_id": i}) for i in range(2)]
    for index, (status, _, error) in enumerate(map(finish, running)):
        assert status == 0, error
        assert [row["index"] for row in lines(tmp_path / f"results-{index}.jsonl")] == list(range(index, 8, 2))
    assert len(lines(tmp_path / "results.jsonl")) == 8
    assert stable_files(tmp_path) == alone


def test_who_waits_in_vain_knows_what_for_and_does_not_wait_for_ever(tmp_path):
    place = {"coordinator": f"127.0.0.1:{free_port()}", "process_id": 0, "num_processes": 2, "seconds": 1}
    status, _, error = finish(start(tmp_path, meet=place))
    assert status == -signal.SIGABRT
    assert error.startswith("waiting for the other processes for at most 1 s")
    assert not list(tmp_path.iterdir())


def test_what_no_cluster_announces_must_be_given(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="the processes did not meet: coordinator_address should be defined"):
        processes.meet()
    with pytest.raises(ValueError, match=r"the processes did not meet: .*process_id=2, num_processes=2"):
        processes.meet("127.0.0.1:1", 2, 2)
    assert jax.config.jax_enable_preemption_service


def test_meeting_leaves_an_ordinary_jax():
    place = processes.meet(f"127.0.0.1:{free_port()}", 0, 1)
    assert place == (0, 1)
    assert not jax.distributed.is_initialized()
    assert jax.process_count() == 1


def test_own_place(monkeypatch):
    assert processes.own_place() == (0, 1)
    assert processes.own_place(2, 3) == (2, 3)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 4)
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    assert processes.own_place() == (4, 8)
    assert processes.own_place(0, 1) == (0, 1)
    for place in ((3, 3), (-1, 3), (0, 0), (None, 2), (1, None)):
        with pytest.raises(ValueError, match="process_id"):
            processes.own_place(*place)


@pytest.mark.parametrize("name", ["slurm.sh", "tpu_pod.sh"])
def test_examples_are_scripts_with_options_that_exist(name, capsys):
    path = Path(__file__).parents[1] / "examples" / name
    subprocess.run(["bash", "-n", path], check=True)
    command = path.read_text().split("ses-jax batch", 1)[1]
    with pytest.raises(SystemExit):
        cli.main(["batch", "--help"])
    known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
    assert set(re.findall(r"--[a-z-]+", command)) <= set(known)
