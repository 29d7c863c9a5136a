"""Which rank is lost. A collective that fails says that a peer is gone or silent; this says who, and where everyone else was.

Each rank has a thread that answers for it through the store by which the ranks met. A dead or stopped process gives no answer; one that
hangs in its own code answers with where it is and since when.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from cosmos_mp.parallel.topology import Topology

PERIOD = 0.5
"""Seconds between two looks for an alarm."""
LINGER = 1.6
"""How many times as long as it asks a rank stays at most, so that its process ends before the timeout."""


class LostRank(ConnectionError):
    """A rank of the run is dead, stopped or stuck; the message names it, and what this rank was waiting in."""


class Watch:
    """Answers for this rank until `close`; nothing where the run has one rank."""

    def __init__(self, topology: Topology):
        self.rank, self.world = topology.rank, topology.world if topology.mesh is not None else 1
        self._patience = topology.options.grace / 2
        self._place, self._since = "starting", time.monotonic()
        self._closed = threading.Event()
        if self.world > 1:
            # A connection of its own: on a shared one a waiting caller holds up the others.
            self._store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
            threading.Thread(target=self._answer, name="watch", daemon=True).start()

    def at(self, place: str) -> None:
        """Note where this rank is."""
        self._place, self._since = place, time.monotonic()

    def close(self) -> None:
        """Answer no more: this rank leaves in good order."""
        self._closed.set()

    @contextmanager
    def explaining(self, place: str) -> Iterator[None]:
        """Note where this rank is; an error that comes from a collective leaves as what `explain` makes of it."""
        self.at(place)
        try:
            yield
        except BaseException as error:
            found = self.explain(error)
            if found is not error:
                raise found from error
            self.close()
            raise

    def explain(self, error: BaseException) -> BaseException:
        """The error itself, or where it comes from a collective among several ranks: who is lost."""
        if isinstance(error, LostRank) or self.world == 1 or not _of_a_collective(error):
            return error
        here = f"rank {self.rank}, {self._words()}"
        return LostRank(f"{here}: {self._who()}; the last checkpoint stands: start the same command again ({str(error).strip()[:300]})")

    def _words(self) -> str:
        return f"{self._place} for {time.monotonic() - self._since:.0f} s"

    def _answer(self) -> None:
        try:
            while not self._closed.wait(PERIOD):
                if self._store.check(["alarm"]):
                    self._store.set(f"answer/{self.rank}", self._words())
                    return
        except Exception:  # the store went away with its host: there is nobody left to answer
            return

    def _who(self) -> str:
        """In a thread, since a store whose host has stopped keeps its callers waiting."""
        found: list[str] = []
        asking = threading.Thread(target=self._ask, args=(found,), name="asking", daemon=True)
        asking.start()
        asking.join(LINGER * self._patience)
        return found[0] if found else "the store of the ranks does not answer, and so neither does its host, as a rule rank 0"

    def _ask(self, found: list[str]) -> None:
        others = [rank for rank in range(self.world) if rank != self.rank]
        answers: dict[int, str] = {}
        gone, began = "", time.monotonic()
        try:
            self._store.set(f"answer/{self.rank}", self._words())  # it may end before its own thread looks again
            self._store.set("alarm", "")
            while not self._store.check([f"answer/{rank}" for rank in others]) and time.monotonic() < began + self._patience:
                time.sleep(PERIOD / 5)
            for rank in others:
                if self._store.check([f"answer/{rank}"]):
                    answers[rank] = self._store.get(f"answer/{rank}").decode()
            self._store.set(f"asked/{self.rank}", "")
        except Exception as error:
            gone = f"the store of the ranks is gone, and with it its host, as a rule rank 0 ({error})"
        silent = [rank for rank in others if rank not in answers]
        heard = "; ".join(f"rank {rank} is {words}" for rank, words in answers.items())
        if not silent:
            found.append(f"every rank answers: {heard}")
        else:
            lost = gone or f"no answer from rank {', '.join(map(str, silent))}, dead or stopped"
            found.append(lost + (f" ({heard})" if heard else ""))
        if self.rank == 0 and not gone:  # the store's host, as a rule: the others still read what they were answered
            with suppress(Exception):
                while not self._store.check([f"asked/{rank}" for rank in answers]) and time.monotonic() < began + LINGER * self._patience:
                    time.sleep(PERIOD / 5)


_GLOO = re.compile(r"gloo/[\w/]+\.(cc|h):\d+")


def _of_a_collective(error: BaseException | None) -> bool:
    """Whether it comes, at first or second hand, from a wait for other ranks; gloo's errors have no type, but name its source file."""
    return error is not None and (isinstance(error, dist.DistError) or bool(_GLOO.search(str(error))) or _of_a_collective(error.__cause__))
