"""Continuous batching: requests share one decode program, and a row that ends is given to the next request at once.

A request waits, its prompt is read in chunks into a small cache, its keys are copied to a free row, and it is decoded
with all others until it ends or is cancelled. Its tokens depend only on its own arguments, up to rounding.

If a prompt begins with whole chunks of an earlier prompt, the engine copies their keys from that prompt's row, until
the row is reassigned: the turns of a conversation, or requests with the same instructions, read what is new.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import bucket, chunk_length, padded_length, put, row_shards
from lemur_jax.infer.programs import CHUNK, DecodeRows, empty_rows
from lemur_jax.infer.sampling import Sampling
from lemur_jax.infer.session import Session

# Most rows, and most slots of all rows together, for each shard of rows on the mesh.
ROWS, SLOTS = 16, 8192
# Most prompts in one prefill for each shard; without sharded rows, a second program reads fewer prompts.
PROMPTS, FEW_PROMPTS = 8, 2
GREEDY = Sampling()
# Steps of decode between two chunks of prompts if all rows are in decode, else in proportion.
STEPS_IN_PREFILL = 4


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One sequence, and the tokens that were chosen for it so far.

    Attributes:
      tokens, logprobs: chosen ids and their log-probabilities in nats under the model's own distribution.
      finish_reason: "" until it ends; then "stop" (a stop id), "length" or "cancelled".
      decoded: how many of the first tokens have been decoded, and their text, which `complete.with_text` continues.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    sampling: Sampling = GREEDY
    seed: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ""
    decoded: tuple[int, str] = (0, "")

    @property
    def length(self) -> int:
        """Slots that it may need: the last token needs none."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclasses.dataclass
class _Prompt:
    """A prompt in prefill, for all requests that share it, by row."""

    tokens: list[int]
    long: bool
    requests: dict[int, Request]
    done: int = 0


class Engine:
    """Rows of one session and the requests that wait for them.

    Call `submit`, then `step` until `busy` is false. All hosts of a mesh make the same calls. Not safe for threads.

    Args:
      session: whose parameters are read at each step. Setting another session of the same model and mesh discards
        earlier prompts.
      rows: sequences at a time; 0: `ROWS` for each shard of rows on the mesh.
      slots: most tokens of the cache for each shard, all rows together, unless one row needs more.
      length: tokens that every row takes from the start; longer requests wait until the rows are made longer.
    """

    def __init__(self, session: Session, rows: int = 0, slots: int = SLOTS, length: int = 0):
        shards = row_shards(session)
        self._max_rows, self._max_slots = -(-(rows or ROWS * shards) // shards) * shards, slots * shards
        self._length = length
        self._waiting: collections.deque[Request] = collections.deque()
        self._shape = (0, 0, 0)  # B, S, J
        self._ready = np.zeros(0, bool)  # rows whose prompts are read
        self._long = np.zeros(0, bool)  # rows whose keys are rotated for long texts
        self._rows: list[Request | None] = []
        self._prompts: list[_Prompt | None] = []
        self._prefix_rows: dict[int, int] = {}  # new prompt -> the row that holds its beginning
        self._order: list[int] = []  # rows, the least recently used first
        self._cache: Any = None
        self._prompt_cache: Any = None
        self._device_rows: Any = None
        self.session = session

    @property
    def session(self) -> Session:
        return self._session

    @session.setter
    def session(self, session: Session) -> None:
        self._session = session
        # Whole chunks of prompts in the cache.
        self._cached_prompts: list[list[int]] = [[] for _ in self._rows]
        self._prefix_rows.clear()
        for prompt in filter(None, self._prompts):
            prompt.done = 0

    @property
    def busy(self) -> bool:
        """Whether a request waits or has a row."""
        return bool(self._waiting) or any(self._rows)

    def submit(self, request: Request) -> Request:
        """Queues a request, which `step` will fill.

        Raises:
          UserError: an empty prompt, an id outside the vocabulary, or more tokens than the model has positions.
        """
        check_request(self.session, "the prompt", request.prompt, request.max_new_tokens)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request wherever it is; a row that it had is free at the next step."""
        request.finish_reason = request.finish_reason or "cancelled"

    def step(self, steps: int = 32) -> list[Request]:
        """Runs a chunk of prefill and up to `steps` tokens of decode; returns the requests that got tokens."""
        if not 1 <= steps <= CHUNK:
            raise UserError(f"steps is {steps}: it must be between 1 and {CHUNK}")
        self._waiting = collections.deque(request for request in self._waiting if not request.finish_reason)
        self._rows = [request if request and not request.finish_reason else None for request in self._rows]
        self._assign()
        if reading := any(self._prompts):
            self._prefill()
        return self._decode(steps, reading)

    def release(self) -> None:
        """Frees the cache, until the next request is given a row; none may be in progress."""
        self._shape, self._rows, self._cached_prompts, self._prompts = (0, 0, 0), [], [], []
        self._cache = self._prompt_cache = self._device_rows = None

    def _assign(self) -> None:
        """Gives free rows to waiting requests, in order; prompts that are equal are read once."""
        if self._waiting and not any(self._rows):
            self._resize()
        while self._waiting and None in self._rows and self._fits(self._waiting[0]):
            tokens, long = list(self._waiting[0].prompt), self._is_long(self._waiting[0])
            row = None
            same = (one for one in self._prompts if one and (one.tokens, one.long) == (tokens, long))
            prompt = next(same, None)
            if not prompt:
                if None not in self._prompts:
                    return
                prompt, row = self._begin(tokens, long)
            if row is None:
                free = [row for row in self._order if self._rows[row] is None]
                row = min(free, key=lambda row: bool(self._cached_prompts[row]))
            self._rows[row] = prompt.requests[row] = self._waiting.popleft()
            self._ready[row] = False
            self._mark_used(row)

    def _is_long(self, request: Request) -> bool:
        """Whether a request takes LongRoPE's factors for long texts: if its greatest length needs them."""
        model = self.session.model
        return (
            model.rope_scaling == "longrope" and request.length > model.rope_original_max_position_embeddings
        )

    def _begin(self, tokens: list[int], long: bool) -> tuple[_Prompt, int | None]:
        """Starts to read a prompt. Returns it, and its row if it continues the prompt of a free one.

        A prompt is read on the devices of the row whose chunks it copies.
        """
        rows, shards = len(self._rows), row_shards(self.session)
        free = [slot for slot, one in enumerate(self._prompts) if one is None]
        slots = {slot * shards // len(self._prompts): slot for slot in reversed(free)}
        unit = chunk_length(self.session)
        shared = [
            _shared(cached, tokens, unit) if row * shards // rows in slots and self._long[row] == long else 0
            for row, cached in enumerate(self._cached_prompts)
        ]
        length = max(shared)
        if not length:
            prompt = self._prompts[free[0]] = _Prompt(tokens, long, {})
            return prompt, None
        row = shared.index(length)
        slot = slots[row * shards // rows]
        prompt = self._prompts[slot] = _Prompt(tokens, long, {}, length)
        self._prefix_rows[slot] = row
        self._mark_used(row)
        return prompt, row if self._rows[row] is None and len(self._cached_prompts[row]) == length else None

    def _mark_used(self, row: int) -> None:
        self._order.remove(row)
        self._order.append(row)

    def _fits(self, request: Request) -> bool:
        return request.length <= self._shape[1] and len(request.stop_ids) <= self._shape[2]

    def _resize(self) -> None:
        """Makes the rows long enough for all waiting requests; no row is in use.

        Rows that an earlier request made long, and therefore few, are made shorter if more rows are needed.
        """
        shards, (_, S, J) = row_shards(self.session), self._shape
        length = max(self._length, *(one.length for one in self._waiting), 2 * chunk_length(self.session))
        length = padded_length(self.session, length)

        def num_rows(slots: int) -> int:
            return max(shards, min(self._max_rows, self._max_slots // slots) // shards * shards)

        if length > S:
            S = length
        elif num_rows(S) < min(len(self._waiting), num_rows(length)):
            # Not shorter than needed to have all rows: every length is another program.
            S = max(length, padded_length(self.session, self._max_slots // self._max_rows))
        J = max(J, 4, *(bucket(len(one.stop_ids)) for one in self._waiting))
        B = num_rows(S)
        if self._shape != (B, S, J):
            P = min(B, PROMPTS * shards)
            programs = self.session.programs
            self.release()  # before the new cache is allocated
            self._shape, self._rows, self._prompts = (B, S, J), [None] * B, [None] * P
            self._cached_prompts, self._order = [[] for _ in range(B)], list(range(B))
            self._ready, self._long = np.zeros(B, bool), np.zeros(B, bool)
            self._cache, self._prompt_cache = programs.empty(B, S), programs.empty(P, S)
            self._device_rows = self._put(empty_rows(B, S, J))

    def _put(self, rows: DecodeRows) -> DecodeRows:
        return jax.tree.map(lambda array: put(self.session, array), rows)

    def _prefill(self) -> None:
        """Reads a chunk of every prompt, and admits the requests whose prompts are complete.

        The last token of a prompt is left to decode, which chooses what follows it.
        """
        programs, C, P = self.session.programs, chunk_length(self.session), len(self._prompts)
        if self._prefix_rows:
            rows = np.array([self._prefix_rows.get(slot, -1) for slot in range(P)], np.int32)
            self._prompt_cache = programs.recall(self._prompt_cache, self._cache, put(self.session, rows))
            self._prefix_rows.clear()
        if row_shards(self.session) == 1 and not any(self._prompts[FEW_PROMPTS:]):
            P = min(P, FEW_PROMPTS)
        tokens, start, long = np.zeros((P, C), np.int32), np.zeros(P, np.int32), np.zeros(P, bool)
        for index, prompt in enumerate(self._prompts):
            if prompt:
                piece = prompt.tokens[prompt.done : prompt.done + C]
                tokens[index, : len(piece)], start[index], long[index] = piece, prompt.done, prompt.long
        arrays = (put(self.session, array) for array in (tokens, start, long))
        self._prompt_cache = programs.prefill(self.session.params, self._prompt_cache, *arrays)
        B, S, J = self._shape
        source, new = np.full(B, -1, np.int32), empty_rows(B, S, J)
        for index, prompt in enumerate(self._prompts):
            if not prompt:
                continue
            prompt.done += C
            active = {row: one for row, one in prompt.requests.items() if self._rows[row] is one}
            if active and prompt.done < len(prompt.tokens) - 1:
                continue
            for row, request in active.items():
                source[row], self._ready[row] = index, True
                new.long[row] = self._long[row] = prompt.long
                self._cached_prompts[row] = prompt.tokens[: (len(prompt.tokens) - 1) // C * C]
                _fill(new, row, request)
            self._prompts[index] = None
        if (source >= 0).any():
            self._cache, self._device_rows = programs.admit(
                self._cache, self._device_rows, self._prompt_cache, put(self.session, source), self._put(new)
            )

    def _decode(self, steps: int, reading: bool) -> list[Request]:
        """Tokens for all rows whose prompts are complete; ends early when rows are free for requests that wait.

        While prompts are read, it makes fewer steps: a step costs the same for few rows as for all.
        """
        keep = np.array([row is not None for row in self._rows], bool)
        keep &= self._ready
        if not keep.any():
            return []
        if reading:
            steps = min(steps, max(1, STEPS_IN_PREFILL * int(keep.sum()) // len(keep)))
        busy = max(0, int(keep.sum()) - max(1, len(keep) // 8)) if self._waiting else 0
        arguments = (put(self.session, keep), np.int32(steps), np.int32(busy))
        self._cache, self._device_rows, *chosen = self.session.programs.decode(
            self.session.params, self._cache, self._device_rows, *arguments
        )
        tokens, logprobs = map(np.asarray, chosen)
        progressed = []
        for row in np.flatnonzero(keep):
            request = self._rows[row]
            assert request
            count = int((tokens[row] >= 0).sum())
            request.tokens += tokens[row, :count].tolist()
            request.logprobs += logprobs[row, :count].tolist()
            if request.tokens[-1] in request.stop_ids:
                request.finish_reason = "stop"
            elif len(request.tokens) == request.max_new_tokens:
                request.finish_reason = "length"
            if request.finish_reason:
                self._rows[row] = None
            progressed.append(request)
        return progressed


def _shared(cached: list[int], tokens: list[int], unit: int) -> int:
    """The number of tokens in the whole chunks that both begin with; a chunk has `unit` tokens."""
    count = 0
    while count < len(cached) and cached[count : count + unit] == tokens[count : count + unit]:
        count += unit
    return count


def _fill(rows: DecodeRows, row: int, request: Request) -> None:
    """Writes a request into a row of NumPy."""
    length = len(request.prompt)
    rows.tokens[row, :length] = request.prompt
    rows.position[row] = length - 1
    rows.remaining[row] = request.max_new_tokens
    rows.seed[row] = request.seed % 2**32
    rows.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    for knob, value in zip(rows.knobs.values(), request.sampling.knobs().values(), strict=True):
        np.asarray(knob)[row] = value


def check_request(session: Session, what: str, prompt: Sequence[int], limit: int) -> None:
    """Raises UserError if the model cannot continue the prompt by `limit` tokens; `what` names it."""
    if not len(prompt):
        raise UserError(f"{what} is empty: give it at least one token, e.g. bos")
    if limit < 1:
        raise UserError(f"max_new_tokens of {what} is {limit}: it must be at least 1")
    check_ids(session, what, prompt)
    max_length = session.model.max_position_embeddings
    if len(prompt) + limit > max_length:
        raise UserError(
            f"{what} has {len(prompt)} tokens, and with max_new_tokens {limit} it may become longer"
            f" than the model's max_position_embeddings {max_length}: shorten one of them"
        )


def check_ids(session: Session, what: str, ids: Sequence[int]) -> None:
    """Raises UserError for an id outside the model's vocabulary."""
    for token in ids:
        if not 0 <= token < session.model.vocab_size:
            raise UserError(
                f"{what} has token id {token}, outside the model's vocabulary of {session.model.vocab_size}"
            )
