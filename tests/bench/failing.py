"""Contenders that go wrong."""

import os
import time

from bcos_rt.benchmark.contender import Contender


class Crashing(Contender):
    def load(self):
        os._exit(3)


class Hanging(Contender):
    def load(self):
        time.sleep(600)
