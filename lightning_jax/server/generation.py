"""One request in flight: its samples, what of them is seen, and their record."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import numpy as np

from lightning_jax.policy import Policy
from lightning_jax.sampler.request import Completion, QueueFull, SamplingParams
from lightning_jax.server.contract import (
    ApiError,
    Choice,
    ClientGone,
    Delta,
    GenerateReply,
    GenerateRequest,
    Token,
    TopLogprobs,
)
from lightning_jax.server.increments import ReplyText, StopStrings
from lightning_jax.store import Attempt, CallRecord, Store
from lightning_jax.text import tools

_RETRY_AFTER_S = 1
_PING_S = 10.0  # a stream that waits for a slot is not silent for longer


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request made ready for the sampler.

    Attributes:
        messages: the canonical messages.
        prompt_ids: their tokens.
        parent: index of the recorded call that the prompt extends.
        sampling, indices, names: of each sample: its parameters, its number among the attempt's calls, and what its
            tool calls' ids are made of. Named like the noise, the same sample has the same ids, which some templates
            put into the next prompt.
        role: what the model is asked as.
        certain_calls: a tool call that begins is a well-formed one, as far as it goes.
    """

    messages: list[dict]
    prompt_ids: list[int]
    parent: int | None
    sampling: list[SamplingParams]
    indices: list[int]
    names: list[str]
    role: str
    certain_calls: bool


@dataclasses.dataclass(eq=False)
class _Sample:
    """One sample of a stream.

    Attributes:
        text: what the agent sees of it.
        ids, logprobs: all that has come.
        top_logprobs: theirs, if they were asked for.
        given: how many of them went into deltas.
        content_given: how many of `text.content_positions` did.
        versions: the policy versions that sampled the first of them and the last.
    """

    text: ReplyText
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: TopLogprobs = dataclasses.field(default_factory=list)
    given: int = 0
    content_given: int = 0
    versions: tuple[int, int] = (0, 0)
    done: bool = False


class Generation:
    """The samples of one request, from the construction until `reply` or `events` is over, or `close`.

    A sample that is over is recorded before its end is told. Of a stream that ends early, what the agent was given so
    far is recorded with the finish reason "cancelled", because the agent may go on from it. So it is when the agent
    returns while the stream is open, and nothing more is given then.

    Args:
        on_nothing: called when it ends with nothing recorded.

    Attributes:
        prompt_ids: what the model is given.
        cached_tokens: how many of them had been computed before, for the first sample; 0 until that is over.

    Raises:
        ApiError: the queue is full or too short, or the attempt has ended.
    """

    def __init__(
        self,
        request: GenerateRequest,
        prepared: Prepared,
        attempt: Attempt | None,
        *,
        policy: Policy,
        store: Store,
        family: tools.Family,
        on_nothing: Callable[[], None],
    ):
        self.prompt_ids = prepared.prompt_ids
        self.cached_tokens = 0
        self._request, self._prepared, self._attempt = request, prepared, attempt
        self._policy, self._store, self._family = policy, store, family
        self._on_nothing = on_nothing
        self._recorded = self._closed = False
        self._end_ids = frozenset((*policy.tokenizer.eos_ids, *policy.config.eos_ids, *request.stop_ids))
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue = asyncio.Queue()
        self._samples = [_Sample(self._reply_text(i)) for i in range(request.n)] if request.stream else []
        self._pending: dict[str, asyncio.Future] = {}
        if attempt is not None:
            attempt.on_result.append(self._record_given)
        try:
            with refusals():
                self._submit()
        except BaseException:
            self.close()
            raise

    def _submit(self) -> None:
        self._policy.check_room(self._request.n)  # all or none: a refused request keeps nobody else waiting
        stop, watch_top = self._request.stop, self._request.stream and self._request.top_logprobs
        fairness_key = str(self._attempt.rollout_id) if self._attempt else "root"
        for i, parameters in enumerate(self._prepared.sampling):
            strings = StopStrings(self._policy.tokenizer, stop, **self._text_options) if stop else None
            future = self._policy.sample(
                self.prompt_ids,
                parameters,
                should_stop=strings.check if strings else None,
                on_tokens=functools.partial(self._sampled, i) if self._request.stream else None,
                on_top_logprobs=self._samples[i].top_logprobs.extend if watch_top else None,
                fairness_key=fairness_key,
            )
            self._pending[future.request_id] = asyncio.wrap_future(future)
            if self._attempt is not None:
                self._attempt.on_end[future.request_id] = functools.partial(self._policy.cancel, future.request_id)
        if self._attempt is not None and self._attempt.ended:  # before it could be told whom to cancel
            raise _ended()

    @property
    def completion_tokens(self) -> int:
        """How many tokens a stream's deltas have had so far."""
        return sum(sample.given for sample in self._samples)

    def close(self) -> None:
        """Ends what still runs, and records what a stream's agent was given of it."""
        if self._closed:
            return
        self._closed = True
        for request_id, future in self._pending.items():
            if not future.done():
                self._policy.cancel(request_id)
                future.add_done_callback(_forget)
            if self._attempt is not None:
                self._attempt.on_end.pop(request_id, None)
        self._record_given()
        if self._attempt is not None:
            self._attempt.on_result.remove(self._record_given)
        if not self._recorded:
            self._on_nothing()

    # ---- the reply as a whole ----

    async def reply(self, disconnected: Callable[[], Awaitable]) -> GenerateReply:
        """The samples, once all are over.

        Args:
            disconnected: makes an awaitable that ends when the client is gone; sampling is cancelled then.

        Raises:
            ApiError: sampling failed, or the attempt has ended.
            ClientGone: nobody waits for the reply; nothing was recorded.
        """
        watcher = asyncio.ensure_future(disconnected())
        try:
            waiting = set(self._pending.values())
            while waiting:
                done, _ = await asyncio.wait({*waiting, watcher}, return_when=asyncio.FIRST_COMPLETED)
                waiting -= done
                if watcher in done and waiting:
                    raise ClientGone
            completions = [self._checked(future.result()) for future in self._pending.values()]
            choices = []
            for i, completion in enumerate(completions):
                text = self._reply_text(i)
                text.push(completion.token_ids)
                text.finish(completion.finish_reason)
                choices.append(_choice(text, completion))
            for i, (choice, completion) in enumerate(zip(choices, completions, strict=True)):
                self._record_completion(i, choice, completion)
        finally:
            watcher.cancel()
            self.close()
        self.cached_tokens = completions[0].cached_tokens
        return GenerateReply(choices, self.prompt_ids, self.cached_tokens, completions[0].policy_version)

    # ---- the reply as it comes ----

    async def events(self, disconnected: Callable[[], Awaitable]) -> AsyncIterator[Delta | None]:
        """What is new of the samples, in the order in which it is sampled; None now and then while nothing is.

        The caller closes the generation when it stops to ask for more. Arguments and errors as for `reply`.
        """
        for i, future in enumerate(self._pending.values()):
            future.add_done_callback(functools.partial(self._put, i))
        watcher = asyncio.ensure_future(disconnected())
        watcher.add_done_callback(functools.partial(self._put, None))
        timer = self._loop.call_later(_PING_S, self._ping)
        try:
            running = len(self._samples)
            while running:
                i, news = await self._news.get()
                if i is None:
                    if news is watcher:
                        raise ClientGone
                    timer = self._loop.call_later(_PING_S, self._ping)
                    yield None
                elif self._attempt is not None and self._attempt.ended:
                    raise _ended()
                elif isinstance(news, asyncio.Future):
                    yield self._finished(i, self._checked(news.result()))
                    running -= 1
                elif delta := self._grown(i, *news):
                    yield delta
        finally:
            timer.cancel()
            watcher.cancel()

    def _sampled(self, i: int, ids: list[int], logprobs: np.ndarray, versions: tuple[int, int]) -> None:
        """On the device thread."""
        self._loop.call_soon_threadsafe(self._put, i, (ids, logprobs.tolist(), versions))

    def _put(self, i: int | None, news) -> None:
        self._news.put_nowait((i, news))

    def _ping(self) -> None:
        self._put(None, None)

    def _grown(self, i: int, ids: list[int], logprobs: list[float], versions: tuple[int, int]) -> Delta | None:
        sample = self._samples[i]
        sample.versions = versions
        sample.ids += ids
        sample.logprobs += logprobs
        content, calls = sample.text.push(ids)
        return self._delta(i, content, calls, sample.text.num_text_tokens) if content or calls else None

    def _finished(self, i: int, completion: Completion) -> Delta:
        sample = self._samples[i]
        content, calls = sample.text.finish(completion.finish_reason)
        choice = _choice(sample.text, completion)
        self._record_completion(i, choice, completion)
        sample.done = True
        if i == 0:
            self.cached_tokens = completion.cached_tokens
        return self._delta(i, content, calls, len(sample.ids), choice)

    def _delta(
        self, i: int, content: str, calls: list[tools.CallPiece], upto: int, choice: Choice | None = None
    ) -> Delta:
        sample = self._samples[i]
        new = slice(sample.given, upto)
        num_text_tokens = min(upto, sample.text.num_text_tokens) - sample.given
        sample.given = upto
        top_logprobs = sample.top_logprobs[new] if self._request.top_logprobs else None
        positions = sample.text.content_positions[sample.content_given :]
        sample.content_given += len(positions)
        tokens = _tokens(positions, sample.ids, sample.logprobs, sample.top_logprobs)
        ids = (sample.ids[new], sample.logprobs[new], num_text_tokens)
        return Delta(i, content, calls, *ids, choice, top_logprobs, tokens)

    # ---- samples and records ----

    def _reply_text(self, i: int) -> ReplyText:
        request, parser = self._request, None
        if request.tools and request.tool_choice != "none":
            in_pieces = request.stream and self._prepared.certain_calls and self._family != "mistral"
            parse = tools.PieceParser if in_pieces else tools.ReplyParser
            parser = parse(self._family, self._prepared.names[i])
        options = self._text_options | {"with_positions": request.content_tokens}
        return ReplyText(self._policy.tokenizer, self._end_ids, request.stop, parser, **options)

    @property
    def _text_options(self) -> dict:
        request, prepared = self._request, self._prepared
        # The samples go on from a prompt that is no chat, or from the beginning of a reply.
        continues = bool(request.prompt or (request.continue_final and prepared.messages[-1]["content"]))
        return {"continues": continues, "min_tokens": prepared.sampling[0].min_tokens}

    def _checked(self, completion: Completion) -> Completion:
        if completion.finish_reason == "error":
            raise ApiError(f"sampling failed: {completion.error}", status=500, kind="server")
        if completion.finish_reason == "cancelled":
            if self._attempt is not None:
                raise _ended()
            raise ApiError("the request was cancelled", status=503, kind="server")
        return completion

    def _record_given(self) -> None:
        """Records what a stream's agent was given of samples that are not over, once."""
        for i, sample in enumerate(self._samples):
            if sample.given and not sample.done:
                sample.done = True
                text, ids = sample.text, sample.ids[: sample.given]
                choice = Choice(text.content, text.tool_calls, ids, [], len(ids), "cancelled", None)
                self._record(i, choice, sample.logprobs[: sample.given], "cancelled", sample.versions)

    def _record_completion(self, i: int, choice: Choice, completion: Completion) -> None:
        versions = completion.policy_version, completion.last_policy_version
        if not self._record(i, choice, completion.logprobs, completion.finish_reason, versions):
            raise _ended()

    def _record(
        self, i: int, choice: Choice, logprobs: Sequence[float], finish_reason: str, versions: tuple[int, int]
    ) -> bool:
        """False if the attempt has ended meanwhile."""
        if self._attempt is None:
            return True
        request, prepared, sampling = self._request, self._prepared, self._prepared.sampling[i]
        messages, content = prepared.messages, choice.content
        if request.continue_final:
            messages, content = messages[:-1], messages[-1]["content"] + content
        reply = {"role": "assistant", "content": content}
        if choice.tool_calls:
            reply["tool_calls"] = choice.tool_calls
        kept = {"dialect": request.dialect, "max_tokens": sampling.max_tokens, "stop": request.stop}
        if isinstance(request.prompt, str):
            kept["prompt"] = request.prompt
        call = CallRecord(
            prompt_ids=prepared.prompt_ids,
            sampled_ids=choice.token_ids,
            logprobs=logprobs,
            parent=prepared.parent,
            temperature=sampling.temperature,
            policy_version=versions[0],
            last_policy_version=versions[1] if versions[1] > versions[0] else None,
            finish_reason=finish_reason,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            constrained=sampling.constrained,
            index=prepared.indices[i],
            model=self._policy.name,
            role=prepared.role,
            messages=tuple(messages),
            tools=request.tools,
            reply=reply,
            request=kept,
        )
        self._recorded = True
        return self._store.record_call(self._attempt, call)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes what the sampler refuses an ApiError."""
    try:
        yield
    except QueueFull as error:
        raise ApiError(str(error), status=429, kind="rate_limit", retry_after_s=_RETRY_AFTER_S) from None
    except ValueError as error:  # too many samples or stop ids, a bias for a token that does not exist
        raise ApiError(str(error)) from None


def _choice(text: ReplyText, completion: Completion) -> Choice:
    reason, logprobs = completion.finish_reason, completion.logprobs.tolist()
    return Choice(
        content=text.content,
        tool_calls=text.tool_calls,
        token_ids=completion.token_ids,
        logprobs=logprobs,
        num_text_tokens=text.num_text_tokens,
        finish_reason="tool_calls" if text.tool_calls and reason == "stop" else reason,
        stop_string=text.stop_string,
        top_logprobs=completion.top_logprobs,
        content_tokens=_tokens(text.content_positions, completion.token_ids, logprobs, completion.top_logprobs),
    )


def _tokens(
    positions: Sequence[int], ids: Sequence[int], logprobs: Sequence[float], top_logprobs: TopLogprobs | None
) -> list[Token]:
    return [(ids[i], logprobs[i], top_logprobs[i] if top_logprobs else []) for i in positions]


def _ended() -> ApiError:
    return ApiError("the rollout's attempt has ended", status=401, kind="authentication")


def _forget(future: asyncio.Future) -> None:
    """Takes an abandoned future's exception, so that asyncio does not report it."""
    if not future.cancelled():
        future.exception()
