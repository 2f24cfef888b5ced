"""One engine of vLLM's together with what it has to show: it is given weights, judged, asked, and started again.

Contract: `version` is the version that this engine has confirmed, None as long as it has confirmed none, and
`confirmed` are all that it ever has. One thread samples; another one may give it weights meanwhile. Every sync and
every rollout ends with a comparison of what the engine shows (proof.py). Merged weights are loaded a layer at a time:
a sync that breaks off leaves an engine that serves no version until the next one. An engine that is lost is started
again up to `max_failures` times in a row, its base is checked, and it is given the newest weights that were sent before
it is asked once more. Engines know nothing of each other: generation.py has them all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nemo_rl_lora.generation.proof import (
    Columns,
    Incoming,
    RankShown,
    SyncMismatch,
    Verdict,
    Witness,
    require_received,
)
from nemo_rl_lora.generation.protocol import GenerationFailed
from nemo_rl_lora.generation.turns import SamplingStopped
from nemo_rl_lora.generation.vllm.engine import Job, Sampled
from nemo_rl_lora.tensors import combined_digest
from nemo_rl_lora.types import EngineReceipt, SyncMode, TensorInfo

logger = logging.getLogger(__name__)
T = TypeVar("T")
Source = Incoming | str  # tensors of this process, a file of them, or an adapter's directory

_FAILURES = "policy.generation.max_generation_failures"


class EngineLost(RuntimeError):  # noqa: N818
    """The engine's process is gone, or does not answer. Says what happened, beginning with a verb."""


class Engine(Protocol):
    """What is asked of an engine, in this process (engine.VllmEngine) or another. What each of its ranks says is in a
    list, in their order."""

    @property
    def where(self) -> str: ...
    @property
    def takes_files(self) -> bool: ...
    def generate(self, jobs: Sequence[Job]) -> list[Sampled]: ...
    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]: ...
    def receive_weights(self, source: Source, version: int) -> list[dict[str, str]]: ...
    def receive_adapter(self, directory: str, version: int) -> list[dict[str, str]]: ...
    def release(self, path: str) -> None: ...
    def num_kept_blocks(self) -> int: ...
    def probe(self, kind: Any, names: Sequence[str]) -> list[RankShown]: ...
    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> list[RankShown]: ...
    def rest(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A version as every engine has to show it: of each tensor its digest and its columns, which are there once the
    source was read. The tensors are not held here."""

    version: int
    mode: SyncMode
    digests: Mapping[str, str]
    columns: Columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What all engines of a run have to show or to take, whatever is sent."""

    base: Columns
    base_names: Sequence[str]
    ranks: Mapping[str, int] | None  # of each adapted module; None where merged weights are sent
    num_ranks: int  # of each engine


Newest = Callable[[], tuple[Sent, Source] | None]
"""What was sent last, for an engine that was started again; None where nothing was. It is said before any engine is
given it, and its files stay until all engines have confirmed a newer one."""


class ProvenEngine:
    """See the module's contract. `number` engines make up the run, and this is the one of this `index`."""

    def __init__(
        self,
        start: Callable[[], Engine],
        expected: Expected,
        newest: Newest,
        *,
        index: int = 0,
        number: int = 1,
        max_failures: int = 0,
    ) -> None:
        self._start, self._expected, self._newest = start, expected, newest
        self.index, self._number = index, number
        self._max_failures, self._num_failures = max_failures, 0
        self._witness = Witness(expected.base)
        self._names: Sequence[str] = ()
        self.version: int | None = None
        self.confirmed: set[int] = set()
        self._judging, self._restarting = threading.RLock(), threading.RLock()
        self._is_closed = False
        self.engine: Engine
        self._start_it()

    @property
    def name(self) -> str:
        """As an error names it."""
        if self._number == 1:
            return "the engine"
        engine = getattr(self, "engine", None)  # None: the first one starts
        return f"engine {self.index} of {self._number}" + ("" if engine is None else f" ({engine.where})")

    def sync(self, sent: Sent, source: Source) -> EngineReceipt:
        """Serve a version from now on, proven. SyncMismatch where the engine shows anything else."""
        return self._surviving(lambda: self._sync(sent, source))

    def generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        """All jobs, in their order, by an engine that shows its version afterwards too."""
        return self._surviving(lambda: self._generate(jobs))

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        """Why merged weights of these names and shapes cannot be received."""
        return self._surviving(lambda: self.engine.weight_problems(manifest))

    def rest(self) -> None:
        """The policy trains now: what the engine holds of a device that it shares is free until it is asked again."""
        self.engine.rest()

    def close(self) -> None:
        self._is_closed = True
        self.engine.close()

    def _sync(self, sent: Sent, source: Source) -> EngineReceipt:
        with self._judging:  # between the old weights and the proof of the new ones it has nothing to show
            before = self.version
            try:
                return self._sync_alone(sent, source)
            except EngineLost:
                self.version = before  # who asks now learns that it is lost
                raise

    def _sync_alone(self, sent: Sent, source: Source) -> EngineReceipt:
        start = time.perf_counter()
        before, self.version = self.version, None
        try:
            received = self._receive(sent, source)
        except EngineLost:
            raise
        except ValueError as error:
            self.version = before
            raise self._mismatch(
                f"weights of version {sent.version}: what the engine received cannot be served: {error}. It keeps "
                f"version {before}. No rollout was used."
            ) from error
        except Exception as error:  # whatever vLLM raises: it is shown
            raise self._mismatch(
                f"weights of version {sent.version}: the engine broke off while it loaded them "
                f"({type(error).__name__}: {' '.join(str(error).split())}), so it serves no version. No rollout was "
                f"used."
            ) from error
        arrived = time.perf_counter()
        if isinstance(source, Incoming):
            source.read_rest()  # what the engine has not asked for
        try:
            require_received(sent.version, sent.digests, received)
            self._witness.expect(sent.version, sent.columns)
            self._names = list(sent.digests)
            verdict = self._judge()
            self._require_empty_cache(sent.version)
        except SyncMismatch as error:
            raise self._mismatch(str(error)) from error
        self.version = sent.version
        self.confirmed.add(sent.version)
        done = time.perf_counter()
        return EngineReceipt(
            index=self.index,
            where=self.engine.where,
            num_ranks=self._expected.num_ranks,
            version=sent.version,
            digest=combined_digest({name: received[0][name] for name in sent.digests}),
            verdict=verdict,
            seconds=done - start,
            proof_seconds=done - arrived,
        )

    def _receive(self, sent: Sent, source: Source) -> list[dict[str, str]]:
        """The digests of what each rank received."""
        if sent.mode == "merged":
            return self.engine.receive_weights(source, sent.version)
        assert isinstance(source, str), "an adapter's directory"
        return self.engine.receive_adapter(source, sent.version)

    def _generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        with self._restarting, self._judging:  # a restart or a sync that runs ends first
            if self.version is None:
                raise self._mismatch(
                    "no version is served, since the newest sync was not confirmed. Sync weights again."
                )
            engine = self.engine
        sampled = engine.generate(jobs)
        with self._judging:
            if engine is not self.engine:
                raise EngineLost("was lost before it could show what it had sampled from")
            try:
                self._judge()
            except SyncMismatch as error:
                self.version = None
                raise self._mismatch(str(error)) from error
        return sampled

    def _judge(self) -> Verdict:
        """Probe the engine and compare. SyncMismatch where it shows something else."""
        if self._expected.ranks is None:
            return self._witness.judge(self.engine.probe("weights", self._names))
        return self._witness.judge(self.engine.probe_adapter(self._names, self._expected.ranks))

    def _mismatch(self, said: str) -> SyncMismatch:
        return SyncMismatch(said if self._number == 1 else f"{self.name}: {said}")

    def _started(self) -> Engine:
        """An engine that has just started, and serves the base in every tensor."""
        engine = self._start()
        try:
            self._witness.judge_base(engine.probe("base", self._expected.base_names))
        except SyncMismatch as error:
            engine.close()
            where = "" if self._number == 1 else f"engine {self.index} of {self._number} ({engine.where}): "
            raise SyncMismatch(f"{where}{error}") from error
        except BaseException:
            engine.close()
            raise
        return engine

    def _surviving(self, action: Callable[[], T]) -> T:
        """What the action returns, repeated on another engine that serves the newest version where one is lost."""
        while True:
            engine = self.engine
            try:
                found = action()
                self._num_failures = 0
                return found
            except EngineLost as lost:
                if self._is_closed:
                    raise SamplingStopped("generation: the engine is closed.") from lost
                with self._restarting:
                    if self.engine is engine:  # else another thread has seen it first
                        self._start_it(lost)

    def _start_it(self, lost: EngineLost | None = None) -> None:
        """Start the engine, or start it again, as often as it takes. GenerationFailed after too many failures in a row,
        SamplingStopped where it is closed."""
        while not self._is_closed:
            if lost is not None:
                self._count(lost)
            try:
                engine = self._started()
                with self._judging:  # what is newest is read here, so that no older one follows a sync that runs
                    self.engine = engine
                    if self._is_closed:  # by a close() that has seen the one before
                        engine.close()
                        break
                    if (newest := self._newest()) is not None:
                        self._sync(*newest)
                return
            except EngineLost as again:
                lost = again
        raise SamplingStopped("generation: the engine is closed.") from lost

    def _count(self, lost: EngineLost) -> None:
        """A failure more. GenerationFailed where that is one too many."""
        name, is_first = self.name, not hasattr(self, "engine")
        if not is_first:
            self.engine.close()
        self.version = None
        self._num_failures += 1
        if self._num_failures > self._max_failures:
            state = "" if is_first else "The policy is as it was before the rollout. "
            raise GenerationFailed(
                f"{_FAILURES}={self._max_failures}: {name} {lost}, {self._num_failures} times in a row. {state}"
                f"Where it needs longer, raise policy.generation.timeout_seconds. Where memory is short, lower "
                f"policy.generation.max_concurrent_sequences or policy.generation.vllm_cfg.gpu_memory_utilization."
            ) from lost
        logger.warning("generation: %s %s; it is started again", name, lost)

    def _require_empty_cache(self, version: int) -> None:
        """Keys and values of the version before must not be met again: a sync ends with an empty prefix cache."""
        if number := self.engine.num_kept_blocks():
            raise SyncMismatch(
                f"weights of version {version}: the engine kept its prefix cache, with {number} blocks of the version "
                f"before. No rollout was used."
            )
