"""The one path every dialect takes: request -> prompt ids -> policy -> record -> reply.

A dialect file turns wire JSON into a `GenerateRequest` and a `GenerateReply` back into wire JSON, and knows no more.
"""

import array
import asyncio
import dataclasses
import hashlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

import ml_collections

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.policy import Policy
from lightning_jax.sampler.request import Completion, QueueFull, SamplingParams, noise_key
from lightning_jax.store import Attempt, CallRecord, Store
from lightning_jax.text import chat, tools
from lightning_jax.text.tokenizer import StreamDecoder, Tokenizer

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that gets no completion.

    Attributes:
        status: HTTP status.
        kind: "invalid_request", "authentication", "context_length", "rate_limit" or "server".
        param: the field that is wrong, if one is.
        retry_after_s: when it may be tried again; only with "rate_limit".
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request",
        param: str | None = None,
        retry_after_s: int | None = None,
    ):
        self.message, self.status, self.kind, self.param, self.retry_after_s = (
            message,
            status,
            kind,
            param,
            retry_after_s,
        )
        super().__init__(message)


class ClientGone(Exception):
    """The client closed its connection before the reply."""


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """What a dialect asks for. None leaves the choice to the server.

    Attributes:
        dialect: its name, kept with the call.
        messages: in the OpenAI chat shape; `text.chat.canonical_messages` checks them.
        tools: function tools in the OpenAI shape.
        parse_tools: whether tool calls in the reply are taken out of its text.
        n: how many samples of the one prompt.
    """

    dialect: str
    messages: Sequence[dict]
    tools: Sequence[dict] | None = None
    parse_tools: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """One sample.

    Attributes:
        content: its text without the turn's end, the stop string, and the tool calls.
        tool_calls: in the OpenAI shape, `arguments` as JSON text.
        token_ids, logprobs: everything that was sampled.
        num_text_tokens: how many of them are text, that is, all but an end-of-turn id.
        finish_reason: "stop", "length" or "tool_calls".
        stop_string: the stop string that ended it, if one did.
    """

    content: str
    tool_calls: list[dict]
    token_ids: list[int]
    logprobs: list[float]
    num_text_tokens: int
    finish_reason: str
    stop_string: str | None


@dataclasses.dataclass(frozen=True)
class GenerateReply:
    """The samples of one request, and what they cost."""

    choices: list[Choice]
    prompt_ids: list[int]
    cached_tokens: int
    policy_version: int

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)


class Generator:
    """Samples from one policy for whoever asks, and records what it samples for rollouts."""

    def __init__(self, policy: Policy, store: Store, sampler_config: ml_collections.ConfigDict):
        self.policy = policy
        self._store = store
        self._config = sampler_config
        self._family = tools.family_of(policy.tokenizer)
        self._end_ids = frozenset(policy.tokenizer.eos_ids) | frozenset(policy.config.eos_ids)
        self._override_logged: set[str] = set()

    def attempt(self, token: str | None) -> Attempt | None:
        """The attempt a rollout URL belongs to; None for the server's root. Raises ApiError (401)."""
        if token is None:
            return None
        attempt = self._store.attempt_by_token(token)
        if attempt is None:
            raise ApiError("this rollout URL is unknown, or its attempt has ended", status=401, kind="authentication")
        return attempt

    async def generate(
        self,
        request: GenerateRequest,
        attempt: Attempt | None,
        disconnected: Callable[[], Awaitable],
    ) -> GenerateReply:
        """Samples `request.n` replies.

        Args:
            attempt: the rollout's attempt, which the calls are recorded under; None records nothing.
            disconnected: makes an awaitable that ends when the client is gone; sampling is cancelled then.

        Raises:
            ApiError: the request cannot be served.
            ClientGone: nobody waits for the reply; nothing was recorded.
        """
        messages, prompt = self._prompt(request, attempt)
        room = self.policy.max_seq_len - len(prompt.ids)
        if room < 1:
            text = f"the prompt has {len(prompt.ids)} tokens, which fills the context of {self.policy.max_seq_len}"
            raise ApiError(text, kind="context_length", param="messages")
        indices = [self._store.next_call_index(attempt) if attempt else 0 for _ in range(request.n)]
        digest = hashlib.blake2b(array.array("i", prompt.ids).tobytes(), digest_size=16).digest()
        taken = attempt.prompts.setdefault(digest, set()) if attempt else set()
        occurrence = next(number for number in itertools.count() if number not in taken)
        name = (*self._noise_name(request, attempt), digest.hex(), occurrence)
        sampling = [self._sampling(request, attempt, room, noise_key(*name, i)) for i in range(request.n)]
        taken.add(occurrence)
        try:
            completions = await self._sample(request, attempt, prompt.ids, sampling, disconnected)
        except BaseException:
            taken.discard(occurrence)  # a refused call that is sent again is the same call
            raise
        choices = [self._choice(request, name, i, completion) for i, completion in enumerate(completions)]
        if attempt is not None:
            parent = None if prompt.parent is None else attempt.calls[prompt.parent].index
            for i, (choice, completion) in enumerate(zip(choices, completions, strict=True)):
                call = self._call(request, messages, prompt.ids, parent, sampling[i], choice, completion, indices[i])
                if not self._store.record_call(attempt, call):
                    raise _ended()
        return GenerateReply(choices, prompt.ids, completions[0].cached_tokens, completions[0].policy_version)

    # ---- the prompt and the sampling parameters ----

    def _prompt(self, request: GenerateRequest, attempt: Attempt | None) -> tuple[list[dict], chat.Prompt]:
        try:
            messages = chat.canonical_messages(request.messages)
            earlier = tuple(attempt.calls) if attempt else ()
            return messages, chat.build_prompt(self.policy.tokenizer, messages, request.tools, earlier)
        except InvalidConfigError as error:  # the tokenizer has no chat template
            raise ApiError(str(error)) from None
        except ValueError as error:  # images, a role out of place, messages that the template refuses
            raise ApiError(str(error), param="messages") from None

    def _sampling(self, request: GenerateRequest, attempt: Attempt | None, room: int, key) -> SamplingParams:
        ours = self._config
        asked = (request.temperature, request.top_p, request.top_k)
        max_tokens = request.max_tokens or ours.max_tokens
        default = (1.0 if attempt is None else 0.0, 1.0, 0)
        if attempt is not None and attempt.mode == "train":
            default = (ours.temperature, ours.top_p, ours.top_k)
            if not ours.honor_agent_sampling:
                self._log_override(attempt, asked, default)
                asked = (None, None, None)
                max_tokens = min(max_tokens, ours.max_tokens)
        temperature, top_p, top_k = (d if a is None else a for a, d in zip(asked, default, strict=True))
        return SamplingParams(
            temperature=float(temperature),
            top_p=float(top_p),
            top_k=max(top_k, 0),
            max_tokens=min(max_tokens, room),
            noise_key=key,
            ignore_eos=request.ignore_eos,
        )

    def _log_override(self, attempt: Attempt, asked: tuple, held: tuple) -> None:
        if asked == (None, None, None) or attempt.job_id in self._override_logged:
            return
        ignored = [
            f"{name}={theirs} (used: {mine})"
            for name, theirs, mine in zip(("temperature", "top_p", "top_k"), asked, held, strict=True)
            if theirs is not None and theirs != mine
        ]
        if ignored:
            self._override_logged.add(attempt.job_id)
            _log.warning(
                "in training the server's sampling parameters hold; ignored of the agent's: %s; "
                "sampler.honor_agent_sampling=True lets the agent decide",
                ", ".join(ignored),
            )

    def _noise_name(self, request: GenerateRequest, attempt: Attempt | None) -> tuple:
        """What the noise depends on beside the prompt, by which a call is told from its rollout's others."""
        if attempt is None:
            return ("root", secrets.randbits(63) if request.seed is None else request.seed)
        agents_seed = attempt.mode != "train" and request.seed is not None
        seed = request.seed if agents_seed else attempt.seed
        entry = attempt.entry
        return (attempt.mode, seed, attempt.step, entry.task_index, entry.sample)

    # ---- sampling ----

    async def _sample(self, request, attempt, prompt_ids, sampling, disconnected) -> list[Completion]:
        policy, pending = self.policy, {}
        fairness_key = str(attempt.rollout_id) if attempt else "root"
        watcher = None
        try:
            for parameters in sampling:
                stop = StopStrings(policy.tokenizer, request.stop).check if request.stop else None
                future = policy.sample(prompt_ids, parameters, should_stop=stop, fairness_key=fairness_key)
                pending[future.request_id] = asyncio.wrap_future(future)
                if attempt is not None:
                    attempt.on_end[future.request_id] = lambda r=future.request_id: policy.cancel(r)
            if attempt is not None and attempt.ended:  # before it could be told whom to cancel
                raise _ended()
            watcher = asyncio.ensure_future(disconnected())
            waiting = set(pending.values())
            while waiting:
                done, _ = await asyncio.wait({*waiting, watcher}, return_when=asyncio.FIRST_COMPLETED)
                waiting -= done
                if watcher in done and waiting:
                    raise ClientGone
            return [_checked(future.result(), attempt) for future in pending.values()]
        except QueueFull as error:
            raise ApiError(str(error), status=429, kind="rate_limit", retry_after_s=_RETRY_AFTER_S) from None
        finally:
            if watcher is not None:
                watcher.cancel()
            for request_id, future in pending.items():
                if not future.done():
                    policy.cancel(request_id)
                    future.add_done_callback(_forget)
                if attempt is not None:
                    attempt.on_end.pop(request_id, None)

    # ---- the reply ----

    def _choice(self, request: GenerateRequest, name: tuple, sample: int, completion: Completion) -> Choice:
        ids = list(completion.token_ids)
        num_text = len(ids)
        if num_text and ids[-1] in self._end_ids and completion.finish_reason == "stop":
            num_text -= 1
        text = self.policy.tokenizer.decode(ids[:num_text], skip_special=True)
        text, stop_string = cut_at_stop(text, request.stop)
        calls, reason = [], completion.finish_reason
        if request.tools and request.parse_tools:
            # Named like the noise: the same sample has the same ids, which some templates put into the next prompt.
            text, calls = tools.parse_reply(text, self._family, f"{name}:{sample}")
            if calls and reason == "stop":
                reason = "tool_calls"
        return Choice(text, calls, ids, completion.logprobs.tolist(), num_text, reason, stop_string)

    def _call(self, request, messages, prompt_ids, parent, sampling, choice, completion, index) -> CallRecord:
        reply = {"role": "assistant", "content": choice.content}
        if choice.tool_calls:
            reply["tool_calls"] = choice.tool_calls
        return CallRecord(
            prompt_ids=prompt_ids,
            sampled_ids=choice.token_ids,
            logprobs=completion.logprobs,
            parent=parent,
            temperature=sampling.temperature,
            policy_version=completion.policy_version,
            finish_reason=completion.finish_reason,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            index=index,
            messages=tuple(messages),
            tools=request.tools,
            reply=reply,
            request={"dialect": request.dialect, "max_tokens": sampling.max_tokens, "stop": request.stop},
        )


class StopStrings:
    """Tells, as ids are sampled, when their text first holds one of the stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._seen = 0
        self._tail = ""
        self._keep_chars = max(map(len, stop)) - 1

    def check(self, ids: Sequence[int]) -> int | None:
        """How many of `ids` to keep once a stop string is complete; None before. Called with ever longer `ids`."""
        while self._seen < len(ids):
            self._tail += self._decoder.push(ids[self._seen : self._seen + 1])
            self._seen += 1
            if any(text in self._tail for text in self._stop):
                return self._seen
            self._tail = self._tail[max(0, len(self._tail) - self._keep_chars) :]
        return None


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """`text` up to the first stop string in it, and that string; the longest where several begin at one place."""
    found = [(text.index(candidate), -len(candidate), candidate) for candidate in stop if candidate in text]
    if not found:
        return text, None
    position, _, candidate = min(found)
    return text[:position], candidate


def _checked(completion: Completion, attempt: Attempt | None) -> Completion:
    if completion.finish_reason == "error":
        raise ApiError(f"sampling failed: {completion.error}", status=500, kind="server")
    if completion.finish_reason == "cancelled":
        raise _ended() if attempt is not None else ApiError("the request was cancelled", status=503, kind="server")
    return completion


def _ended() -> ApiError:
    return ApiError("the rollout's attempt has ended", status=401, kind="authentication")


def _forget(future: asyncio.Future) -> None:
    """Takes an abandoned future's exception, so that asyncio does not report it."""
    if not future.cancelled():
        future.exception()
