"""Ctrl-C while the native decoder computes, callbacks, threads, and what the model is good for afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from native_models import make_model, some_tokens

from featherweight.errors import FeatherError
from featherweight.model.decoder.model import CHUNK, NativeModel
from featherweight.model.decoder.sampling import Sampling
from interrupts import interrupt_program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
LONG = 7000
LARGE = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 6, "max_position_embeddings": 8192}
SOON = 2.0
"""Seconds within which an interrupted call must have ended here; the calls take many times as long undisturbed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt of LONG tokens takes it a minute."""
    return make_model("llama", tmp_path_factory.mktemp("large"), torch.bfloat16, **LARGE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("small"), max_position_embeddings=4096)


@pytest.fixture
def model(folder: Path) -> NativeModel:
    return NativeModel.open(folder, threads=1, precision="float")


@pytest.fixture
def signals() -> Iterator[None]:
    """A program started in the background of a script ignores SIGINT; these tests are about one that does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(call: Callable[[], object], after: float = 0.5) -> float:
    """Send this process SIGINT while `call` runs; seconds until KeyboardInterrupt has come out of it."""
    sent = 0.0

    def send() -> None:
        nonlocal sent
        time.sleep(after)
        sent = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    seconds = time.perf_counter() - sent
    thread.join()
    return seconds


@pytest.mark.parametrize("threads", [1, 2])
def test_within_a_prompt(folder: Path, threads: int, signals: None) -> None:
    model = NativeModel.open(folder, threads=threads, precision="float")
    tokens = some_tokens(LONG)
    assert interrupted(lambda: model.generate(tokens, 4)) < SOON
    kept = model.length()
    assert kept < LONG
    assert kept % CHUNK == 0  # whole chunks stay
    assert interrupted(lambda: model.forward(tokens)) < SOON
    assert interrupted(lambda: model.feed(some_tokens(100) * 40)) < SOON


def test_within_the_first_chunk(model: NativeModel, signals: None) -> None:
    """Nothing of it stays, and what it left in the pages harms nobody."""
    tokens = some_tokens(CHUNK)
    assert interrupted(lambda: model.feed(tokens), 0.2) < SOON
    assert model.length() == 0
    found = model.feed(tokens[:40])
    fresh = NativeModel(model.network, model.weights, model.defaults, threads=1, precision="float")
    assert torch.equal(found, fresh.feed(tokens[:40]))


def test_within_a_generation(model: NativeModel, signals: None) -> None:
    told: list[int] = []
    tokens = some_tokens(20)
    assert interrupted(lambda: model.generate(tokens, 5000, on_token=told.append, stops=())) < SOON
    assert 0 < len(told) < 5000
    assert interrupted(lambda: model.generate(tokens, 5000, stops=())) < SOON
    fresh = NativeModel(model.network, model.weights, model.defaults, threads=1, precision="float")
    assert model.generate(tokens, 5, stops=()) == fresh.generate(tokens, 5, stops=())


def test_what_stays_is_continued_to_the_same_bits(model: NativeModel, signals: None) -> None:
    tokens = some_tokens(2 * CHUNK + 10)

    def wait_for_a_chunk() -> None:
        while model.length() < CHUNK:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait_for_a_chunk)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        model.feed(tokens)
    thread.join()
    assert model.length() == CHUNK
    assert model.stats().prompt_tokens == CHUNK
    again = model.generate(tokens, 3, stops=())
    assert model.stats().reused_tokens == CHUNK
    fresh = NativeModel(model.network, model.weights, model.defaults, threads=1, precision="float")
    assert again == fresh.generate(tokens, 3, stops=())


def test_keys_that_depend_on_the_prompt_s_length_do_not_stay(tmp_path: Path, signals: None) -> None:
    """With dynamic rotary scaling the chunks of a long prompt are of no use to a short one."""
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "rope_theta": 10000.0}
    folder = make_model("llama", tmp_path, max_position_embeddings=600, **scaling)
    model = NativeModel.open(folder, threads=1, context=2400)
    tokens = some_tokens(2200)

    def wait_for_a_chunk() -> None:
        while model.length() < CHUNK:
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)

    def feed_again_and_again() -> None:  # until the signal falls into a prompt
        while True:
            model.reset()
            model.feed(tokens)

    thread = threading.Thread(target=wait_for_a_chunk)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        feed_again_and_again()
    thread.join()
    found = model.generate(tokens[:550], 4, stops=())
    fresh = NativeModel.open(folder, threads=1, context=2400)
    assert found == fresh.generate(tokens[:550], 4, stops=())
    assert torch.equal(model.feed([5]), fresh.feed([5]))


PROGRAM = """
import sys
from featherweight.model.decoder.model import NativeModel
model = NativeModel.open(sys.argv[1], threads=1, precision="float")
tokens = list(range(3, 203)) * (35 if sys.argv[2] == "prompt" else 1)
print("ready", flush=True)
try:
    model.generate(tokens, 5000, on_token=(lambda token: None) if sys.argv[2] == "told" else None, stops=())
finally:
    print("usable", len(model.generate([5, 6, 7], 2, stops=())), flush=True)
"""


@pytest.mark.parametrize("moment", ["prompt", "generation", "told"])
def test_a_script_ends(folder: Path, moment: str) -> None:
    done = interrupt_program(PROGRAM, folder, moment, wait=0.5)
    assert done.code in (-signal.SIGINT, 130), done
    assert done.output == "usable 2\n"
    assert "KeyboardInterrupt" in done.errors
    assert "ignored" not in done.errors
    assert "ctypes" not in done.errors


def test_a_callback_that_uses_the_model(small: Path) -> None:
    model = NativeModel.open(small, threads=1)
    for use in (
        lambda: model.generate([5], 2),
        lambda: model.forward([5]),
        lambda: model.feed([5]),
        lambda: model.step({0: 5}),
        lambda: model.reset(),
    ):
        with pytest.raises(FeatherError, match="from within its own generation"):
            model.generate([5, 6], 10, on_token=lambda token, use=use: use(), stops=())
    lengths: list[int] = []
    model.generate([5, 6], 3, on_token=lambda token: lengths.append(model.length()), stops=())
    assert lengths == [2, 3, 4]
    assert len(model.generate([5, 6], 10, stops=())) == 10


def test_a_callback_s_exception_comes_with_its_own_traceback(small: Path) -> None:
    model = NativeModel.open(small, threads=1)

    def listen(token: int) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as caught:
        model.generate([5, 6], 10, on_token=listen, stops=())
    assert caught.traceback[-1].name == "listen"
    assert model.length() == 2


def test_callbacks_run_in_the_caller_s_thread(small: Path) -> None:
    model = NativeModel.open(small, threads=1)
    seen: set[int] = set()
    model.generate([5, 6], 5, on_token=lambda token: seen.add(threading.get_ident()), stops=())
    assert seen == {threading.get_ident()}


def test_several_threads_take_turns(small: Path) -> None:
    model = NativeModel.open(small, threads=1)
    warm = Sampling(temperature=0.8, seed=3)
    prompts = [some_tokens(30, seed=seed) for seed in range(4)]
    expected = [model.generate(prompt, 12, warm, stops=()) for prompt in prompts]
    found: dict[int, list[int]] = {}
    meet = threading.Barrier(len(prompts))

    def work(number: int) -> None:
        meet.wait()
        for _ in range(5):
            found[number] = model.generate(prompts[number], 12, warm, on_token=lambda token: None, stops=())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(len(prompts))] == expected


def test_a_model_ends_with_its_last_reference(small: Path) -> None:
    others = set(threading.enumerate())  # of earlier tests: these may end meanwhile

    def own() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in others and "decoder" in thread.name]

    model = NativeModel.open(small, threads=1)
    model.feed([5])  # is over at once, and needs none
    assert own() == []
    model.generate([5], 2)
    assert own() == ["featherweight-decoder"]
    del model
    for _ in range(1000):
        if not own():
            break
        time.sleep(0.01)
    assert own() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_goes_on(small: Path) -> None:
    model = NativeModel.open(small, threads=1)
    expected = model.generate([5, 6], 5, stops=())
    child = os.fork()
    if child == 0:
        os._exit(0 if model.generate([5, 6], 5, stops=()) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_of_the_cache_is_given_back(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64, "num_hidden_layers": 12}
    model = NativeModel.open(make_model("llama", tmp_path, max_position_embeddings=8192, **heads), threads=1)
    model.feed(some_tokens(600))  # the buffers of a pass
    model.reset()
    assert model.stats().cache_bytes == 0
    empty = resident_bytes()
    model.feed(some_tokens(2000))
    held = model.stats().cache_bytes
    full = resident_bytes()
    assert held > 90e6
    assert full - empty > 0.8 * held
    model.generate(some_tokens(2000)[:500], 2, stops=())  # a shorter text needs less
    assert model.stats().cache_bytes == held // 4
    assert resident_bytes() - empty < 0.4 * held
    model.reset()
    assert model.stats().cache_bytes == 0
    assert resident_bytes() - empty < 0.2 * held


def test_at_any_moment(small: Path, signals: None) -> None:
    """Some hundred signals, also between two instructions of our own, in all calls: nothing hangs, nothing is lost."""
    model = NativeModel.open(small, threads=1)
    tokens = some_tokens(300)
    expected = model.generate(tokens, 5, stops=())
    calls: list[Callable[[], object]] = [
        lambda: model.generate(tokens, 5000, on_token=lambda token: None, stops=()),
        lambda: model.generate(tokens, 200, stops=()),
        lambda: model.forward(tokens),
        lambda: model.step({0: 7}),
        lambda: model.reset(),
    ]
    delays = (torch.rand(300, generator=torch.Generator().manual_seed(1)) ** 3 * 0.03).tolist()
    stopped = 0

    def again(call: Callable[[], object]) -> None:
        while True:
            call()

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for number, delay in enumerate(delays):
        model.forward([5])
        try:
            signal.setitimer(signal.ITIMER_REAL, delay + 1e-4)
            again(calls[number % len(calls)])
        except KeyboardInterrupt:
            stopped += 1
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert stopped == len(delays)
    assert model.generate(tokens, 5, stops=()) == expected
