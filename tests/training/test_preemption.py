"""Signals of a training run inside a process of another program, such as a notebook."""

import os
import signal
import threading

from gemma4_tpu.training.preemption import Preemption


def test_an_event_loop_gets_its_signals_back():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end)
    try:
        with Preemption():
            pass
        assert signal.set_wakeup_fd(before) == write_end
    finally:
        signal.set_wakeup_fd(before)
        os.close(read_end)
        os.close(write_end)


def test_a_run_on_another_thread_goes_without_signals(caplog):
    handlers, found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}, []

    def run():
        with Preemption() as preemption:
            preemption.listen()
            found.append(preemption.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
    assert "not on the main thread" in caplog.text
    assert {number: signal.getsignal(number) for number in handlers} == handlers
