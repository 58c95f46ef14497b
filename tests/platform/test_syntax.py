"""Syntax trees made in several threads, with garbage collected in the middle that lets another thread in."""

from __future__ import annotations

import gc
import threading
import time

from megatron_davinci.platform.syntax import parsed


class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0)


def test_threads_that_parse_at_once_all_get_a_tree():
    text, found = "x = " + "f(" * 24 + "1" + ")" * 24 + "\n", []

    def work():
        for _ in range(200):
            Cycle()
            try:
                found.append(len(parsed(text).body))
            except SystemError as error:  # `ast.parse` of CPython 3.11.7: once in some hundred
                found.append(str(error))

    thresholds = gc.get_threshold()
    gc.set_threshold(20)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
    assert found == [1] * 600
