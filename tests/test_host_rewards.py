"""Users' functions on the host: what they get, what they may return, and judges that are slow or fail."""

import asyncio
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ses_jax
from ses_jax.rewards import host
from ses_jax.rewards.host import Calls
from ses_jax.rewards.reward import Part, Reward
from ses_jax.rewards.scorers import ImageScore, Scorer

pytestmark = pytest.mark.quick

IMAGES = np.linspace(0, 1, 6 * 2 * 2 * 3, dtype=np.float32).reshape(6, 2, 2, 3)
PROMPTS = [f"prompt {i}" for i in range(6)]
MEANS = IMAGES.mean(axis=(1, 2, 3))


def scores(function, calls=host.PLAIN, images=IMAGES):
    return host.scores("judge", function, calls, images, PROMPTS[: len(images)])


def test_functions_get_arrays_of_their_own():
    def judge(images, prompts):
        assert type(images) is np.ndarray
        assert prompts == PROMPTS
        images *= 0  # torch.from_numpy wants them writable
        return torch.from_numpy(images).mean(dim=(1, 2, 3)) + 1

    images = jnp.asarray(IMAGES)
    np.testing.assert_array_equal(scores(judge, images=images), np.ones(6))
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.parametrize(
    "answer",
    [
        list,
        tuple,
        np.float64,
        jnp.asarray,
        torch.from_numpy,
        lambda means: torch.tensor(means, requires_grad=True) * 1,
        lambda means: [torch.tensor(mean, requires_grad=True) for mean in means],
        lambda means: [float(mean) for mean in means],
        lambda means: (mean for mean in means),
        lambda means: dict(enumerate(means)).values(),
        lambda means: jnp.asarray(means)[:, None][:, 0],
    ],
)
def test_what_functions_may_return(answer):
    found = scores(lambda images, prompts: answer(images.mean(axis=(1, 2, 3))))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, MEANS, rtol=1e-6)


def test_bfloat16_and_whole_numbers_are_scores():
    halves = torch.full((6,), 0.5, dtype=torch.bfloat16)
    for answer in (halves, jnp.full(6, 0.5, jnp.bfloat16)):
        np.testing.assert_array_equal(scores(lambda *_, answer=answer: answer), np.full(6, 0.5))
    np.testing.assert_array_equal(scores(lambda *_: [3, True, 1, 2, False, 0]), [3, 1, 1, 2, 0, 0])


def test_one_image_may_have_one_number():
    assert scores(lambda *_: 0.25, images=IMAGES[:1]) == [0.25]


async def _later(*_):
    return [0.0] * 6


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda *_: None, "returned None; expected one number an image"),
        (lambda *_: 0.5, r"returned shape \(\) for 6 images; expected one number an image"),
        (lambda *_: torch.zeros(6, 1), r"returned shape \(6, 1\)"),
        (lambda *_: np.zeros(5), r"returned shape \(5,\)"),
        (lambda *_: ["1"] * 6, "returned a list of something else"),
        (lambda *_: [None] * 6, "returned a list of something else"),
        (lambda *_: [[1.0], [1.0, 2.0]], "returned a list of something else"),
        (lambda *_: {"score": 1.0}, "returned a dict of something else"),
        (lambda *_: np.zeros(6, complex), "returned a ndarray of something else"),
        (_later, r"is asynchronous; return asyncio\.run"),
    ],
)
def test_what_they_may_not(answer, message):
    with pytest.raises(ValueError, match=f"reward 'judge' {message}"):
        scores(answer)


def test_an_error_says_that_it_came_from_the_reward():
    def judge(images, prompts):
        raise KeyError("score")

    with pytest.raises(KeyError) as caught:
        scores(judge)
    assert host.origin(caught.value) == "raised by the reward 'judge'"
    assert host.origin(ValueError("of ours")) is None


def test_calls_at_once_get_their_shares_and_give_the_same():
    seen, together = [], threading.Barrier(3, timeout=30)

    def judge(images, prompts):
        together.wait()  # passes only where three calls run at once
        seen.append(list(prompts))
        return images.mean(axis=(1, 2, 3))

    np.testing.assert_array_equal(scores(judge, Calls(workers=3)), scores(lambda i, p: i.mean(axis=(1, 2, 3))))
    assert sorted(seen) == [PROMPTS[0:2], PROMPTS[2:4], PROMPTS[4:6]]
    assert len(scores(lambda i, p: [0.0] * len(p), Calls(workers=50))) == 6
    assert len(scores(lambda i, p: [0.0] * len(p), Calls(workers=50), IMAGES[:0])) == 0


def test_a_call_that_takes_too_long_is_made_again_and_noted():
    calls = []

    def judge(images, prompts):
        calls.append(prompts[0])
        if calls.count(prompts[0]) == 1 and prompts[0] == PROMPTS[3]:
            time.sleep(60)  # in a thread that nobody waits for
        return images.mean(axis=(1, 2, 3))

    with host.noting() as notes:
        np.testing.assert_allclose(scores(judge, Calls(workers=2, timeout=0.2, retries=1)), MEANS, rtol=1e-6)
    assert notes == ["reward 'judge', attempt 1 of 2: TimeoutError: no score after 0.2 s"]
    assert sorted(calls) == [PROMPTS[0], PROMPTS[3], PROMPTS[3]]


def test_the_last_error_comes_through():
    errors = iter([OSError("down"), RuntimeError("still down")])

    def judge(images, prompts):
        raise next(errors)

    with host.noting() as notes, pytest.raises(RuntimeError, match="still down"):
        scores(judge, Calls(retries=1))
    assert notes == ["reward 'judge', attempt 1 of 2: OSError: down"]


def test_load_reward_takes_them():
    def brightness(images, prompts):
        return images.mean(axis=(1, 2, 3))

    plain, pooled = ses_jax.load_reward(brightness), ses_jax.load_reward(brightness, workers=2)
    assert (plain.on_host, pooled.on_host) == (False, True)
    np.testing.assert_allclose(pooled(IMAGES, PROMPTS), plain(IMAGES, PROMPTS), rtol=1e-6)
    assert repr(pooled) == "Reward(brightness)"


def test_a_loaded_reward_keeps_what_is_not_given_anew():
    def judge(images, prompts):
        return [0.0] * len(prompts)

    loaded = ses_jax.load_reward(judge, workers=4, timeout=5.0, retries=2)
    for again in (loaded, {loaded: 1.0, (lambda images, prompts: [0.0] * len(prompts)): 1.0}):
        assert ses_jax.load_reward(again).parts[0].calls == Calls(4, 5.0, 2)
    assert ses_jax.load_reward(loaded, name="x").parts[0].calls == Calls(4, 5.0, 2)
    assert ses_jax.load_reward(loaded, workers=1, retries=3).parts[0].calls == Calls(1, 5.0, 3)


def test_a_loaded_function_that_jax_could_trace_is_called_on_the_host_too():
    traced = ses_jax.load_reward(lambda images, prompts: images.mean(axis=(1, 2, 3)))
    (part,) = ses_jax.load_reward(traced, retries=1).parts
    assert not traced.on_host
    assert (part.on_host, part.reads_prompt, part.calls) == (True, True, Calls(retries=1))


def test_a_network_is_not_called():
    with pytest.raises(ValueError, match="'clip': no function that retries could be for"):
        ses_jax.load_reward("clip", retries=2)
    loaded = Reward((Part("second", scorer=Scorer("clip", None, len, len, ImageScore(len, len))),))
    with pytest.raises(ValueError, match="'clip', 'second': no function that workers and timeout could be for"):
        ses_jax.load_reward({"clip": 1.0, loaded: 1.0}, workers=2, timeout=1.0)
    parts = ses_jax.load_reward({loaded: 1.0, (lambda images, prompts: [0.0]): 1.0}, retries=2).parts
    assert [part.calls for part in parts] == [host.PLAIN, Calls(retries=2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers=0 must be a whole number, at least 1"),
        ({"workers": True}, "workers=True"),
        ({"retries": -1}, "retries=-1"),
        ({"retries": 1.5}, "retries=1.5"),
        ({"timeout": 0}, "timeout=0 must be more than 0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "10"}, "timeout='10' must be a number"),
    ],
)
def test_what_they_must_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Calls(**settings).check()


def test_traceable_functions_are_not_called():
    with pytest.raises(ValueError, match="are for functions on the host"):
        ses_jax.load_reward(lambda images, prompts: [0.0], workers=2, traceable=True)


def test_a_coroutine_that_was_run_is_fine():
    np.testing.assert_array_equal(scores(lambda *_: asyncio.run(_later())), np.zeros(6))
