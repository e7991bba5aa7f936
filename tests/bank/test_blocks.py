# SPDX-License-Identifier: Apache-2.0
"""Who has the model: a context at a time, whether threads, asyncio tasks, generators or forks ask for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time

import pytest
import torch

from smn_peft import MaskBank
from tests.bank.tiny import IMAGES, adapter, build, state_of

NAMES = ("birds", "ships")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        adapter("vit", 0.99 if seed else 0.8, seed)[1].save_pretrained(root / name)
    return root


@pytest.fixture
def bank(saved):
    with torch.no_grad(), MaskBank.open([saved / name for name in NAMES], build("vit")) as bank:
        yield bank


@pytest.fixture
def answers(bank):
    found = {name: bank(IMAGES, name) for name in NAMES}
    return {**found, None: bank.model(IMAGES).clone()}


def is_base(bank, answers):
    return torch.equal(bank.model(IMAGES), answers[None])


def test_asyncio_tasks_get_their_own_answers_or_an_error(bank, answers):
    async def ask(name):
        with bank.use(name) as model:
            await asyncio.sleep(0.01)
            return model(IMAGES)

    async def both():
        return await asyncio.gather(*map(ask, NAMES), return_exceptions=True)

    birds, ships = asyncio.run(both())
    torch.testing.assert_close(birds, answers["birds"])
    assert isinstance(ships, RuntimeError)
    assert "bank.use('ships') while bank.use('birds') is under way in another asyncio task" in str(ships)
    assert is_base(bank, answers)
    torch.testing.assert_close(asyncio.run(ask("ships")), answers["ships"])


@pytest.mark.parametrize("call", ["activate", "forward", "close"])
def test_a_call_from_another_asyncio_task_is_refused_and_changes_nothing(call, bank, answers):
    async def ask():
        with bank.use("birds") as model:
            await asyncio.sleep(0.01)
            return model(IMAGES)

    async def both():
        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        arguments = {"activate": ("ships",), "forward": (IMAGES, "ships"), "close": ()}[call]
        with pytest.raises(RuntimeError, match=f"bank.{call} while bank.use"):
            getattr(bank, call)(*arguments)
        return await task

    torch.testing.assert_close(asyncio.run(both()), answers["birds"])
    assert is_base(bank, answers)
    torch.testing.assert_close(bank(IMAGES, "ships"), answers["ships"])


def test_an_asyncio_task_that_began_inside_a_block(bank, answers):
    """Its context is a copy of the block's, which it could outlive."""

    async def inner():
        with bank.use("ships") as model:
            await asyncio.sleep(0)
            return model(IMAGES)

    async def outer():
        with bank.use("birds") as model:
            (error,) = await asyncio.gather(inner(), return_exceptions=True)
            with pytest.raises(RuntimeError, match="in another asyncio task or context"):
                raise error
            with bank.use("ships"):  # of its own, which nothing comes between
                torch.testing.assert_close(model(IMAGES), answers["ships"])
            return await inner(), model(IMAGES)

    ships, birds = asyncio.run(outer())
    torch.testing.assert_close((ships, birds), (answers["ships"], answers["birds"]))
    assert is_base(bank, answers)


@pytest.mark.parametrize("active", [None, "ships"])
def test_blocks_that_end_in_the_wrong_order(active, bank, answers):
    bank.activate(active)
    first, second = bank.use("birds"), bank.use("ships")
    first.__enter__()
    model = second.__enter__()
    with pytest.raises(RuntimeError, match="leave blocks in the opposite order"):
        first.__exit__(None, None, None)
    torch.testing.assert_close(model(IMAGES), answers["ships"])
    second.__exit__(None, None, None)
    torch.testing.assert_close(model(IMAGES), answers[active])
    with bank.use("birds"):
        torch.testing.assert_close(model(IMAGES), answers["birds"])


def stream(bank, name):
    with bank.use(name) as model:
        for _ in range(3):
            yield model(IMAGES)


def test_a_generator_may_yield_inside_its_block_if_nothing_comes_between(bank, answers):
    birds = stream(bank, "birds")
    torch.testing.assert_close(next(birds), answers["birds"])
    torch.testing.assert_close(bank(IMAGES, "ships"), answers["ships"])  # puts back what it found
    torch.testing.assert_close(next(birds), answers["birds"])
    with bank.use("ships"):  # ends before the generator goes on
        torch.testing.assert_close(bank.model(IMAGES), answers["ships"])
    torch.testing.assert_close(next(birds), answers["birds"])
    birds.close()
    assert is_base(bank, answers)
    for answer in stream(bank, "ships"):
        torch.testing.assert_close(answer, answers["ships"])
    assert is_base(bank, answers)


def test_generators_whose_blocks_end_in_the_wrong_order_are_refused(bank, answers):
    birds, ships = stream(bank, "birds"), stream(bank, "ships")
    next(birds)
    next(ships)
    with pytest.raises(RuntimeError, match=r"bank.use\('birds'\) ends while bank.use\('ships'\).*opposite order"):
        birds.close()
    ships.close()
    assert is_base(bank, answers)


def test_context_managers_made_of_generators_nest(bank, answers):
    @contextlib.contextmanager
    def under(name):
        with bank.use(name) as model:
            yield model

    with under("birds") as model:
        with bank.use("ships"):
            torch.testing.assert_close(model(IMAGES), answers["ships"])
            with contextlib.ExitStack() as stack:
                stack.enter_context(under("birds"))
                torch.testing.assert_close(model(IMAGES), answers["birds"])
        torch.testing.assert_close(model(IMAGES), answers["birds"])
    assert is_base(bank, answers)


def test_a_block_that_another_thread_ends(bank, answers):
    """As a web server runs the parts of a generator in the threads of a pool."""
    birds = stream(bank, "birds")
    found = []

    def run(work):
        thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    run(lambda: next(birds))
    waiting = threading.Thread(target=lambda: found.append(bank(IMAGES, "ships")), daemon=True)
    waiting.start()
    run(lambda: next(birds))
    run(lambda: birds.close())
    waiting.join(20)
    torch.testing.assert_close(found[:2], [answers["birds"]] * 2)
    torch.testing.assert_close(found[-1], answers["ships"])
    assert is_base(bank, answers)


def in_child(work, seconds=30):
    """Exit status of a fork that runs some work; a failure if it hangs."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("live", NAMES)
def test_a_child_of_a_fork_while_another_thread_has_the_model(live, bank, answers):
    torch.set_num_threads(1)
    bank.prefetch(["birds"]).result(30)
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with torch.no_grad(), bank.use(live) as model:
            entered.set()
            leave.wait(60)
            torch.testing.assert_close(model(IMAGES), answers[live])

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert entered.wait(20)

    def child():
        bank.prefetch(list(NAMES)).result(10)
        right = all(torch.allclose(bank(IMAGES, name), answers[name], atol=1e-4) for name in NAMES)
        with bank.use("ships") as model:
            right &= torch.allclose(model(IMAGES), answers["ships"], atol=1e-4)
        right &= torch.equal(bank.model(IMAGES), answers[None])
        bank.close()
        return right

    assert in_child(child) == 0
    leave.set()
    thread.join(20)
    assert is_base(bank, answers)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_of_forks_while_another_thread_switches(bank, answers):
    torch.set_num_threads(1)
    before, stop = state_of(build("vit")), threading.Event()

    def switch():
        while not stop.is_set():
            for name in (*NAMES, None):
                bank.activate(name)

    thread = threading.Thread(target=switch, daemon=True)
    thread.start()

    def child():
        bank.close()
        return all(torch.equal(value, before[key]) for key, value in bank.model.state_dict().items())

    try:
        assert [in_child(child) for _ in range(8)] == [0] * 8
    finally:
        stop.set()
        thread.join(20)
