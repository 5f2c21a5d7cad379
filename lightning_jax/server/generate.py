"""The one path every dialect takes: request -> prompt ids -> policy -> record -> reply.

A dialect file turns wire JSON into a `GenerateRequest` and a `GenerateReply`, or the deltas of a stream, back into wire
JSON, and knows no more.
"""

import array
import copy
import dataclasses
import functools
import hashlib
import itertools
import logging
import secrets
from typing import Any

import ml_collections
from starlette.concurrency import run_in_threadpool

from agent_lightning.exceptions import InvalidConfigError
from lightning_jax.policy import Policy
from lightning_jax.sampler.request import Grammar, SamplingParams, noise_key
from lightning_jax.server.contract import ApiError, GenerateRequest
from lightning_jax.server.generation import Generation, Prepared
from lightning_jax.store import Attempt, CallRecord, Store
from lightning_jax.text import chat, guided, plain, tools

_log = logging.getLogger(__name__)

# What an agent may change about the distribution that is sampled from, and the values at which it is the model's own.
_SHAPING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "min_tokens": 0,
}

_JSON_FORMS = ("json_object", "json_schema", "json_schema_if_possible")


class Generator:
    """Samples from one policy for whoever asks, and records what it samples for rollouts."""

    def __init__(self, policy: Policy, store: Store, sampler_config: ml_collections.ConfigDict):
        self.policy = policy
        self._role = "1"
        self._store = store
        self._config = sampler_config
        self._family = tools.family_of(policy.tokenizer)
        self._guide = guided.Guide(policy.tokenizer)
        self._override_logged: set[str] = set()

    def in_role(self, role: str) -> "Generator":
        """This generator, which records its calls under `role`."""
        other = copy.copy(self)
        other._role = role
        return other

    async def start(self, request: GenerateRequest, attempt: Attempt | None) -> Generation:
        """Begins to sample `request.n` replies; the caller takes them, or closes the generation.

        Args:
            attempt: the rollout's attempt, which the calls are recorded under; None records nothing.

        Raises:
            ApiError: the request cannot be served.
        """
        grammar = await self._grammar(request)
        earlier = self._earlier(attempt)
        messages, prompt = self._prompt(request, earlier)
        room = self._room(request, prompt.ids, at_least=1)
        # One prompt in two roles is two prompts, or which call came first would decide about their noise.
        key = b"" if self._role == "1" else self._role.encode()
        digest = hashlib.blake2b(array.array("i", prompt.ids).tobytes(), digest_size=16, key=key).digest()
        counts = attempt is not None and not _has_own_seed(request, attempt)
        taken = attempt.prompts.setdefault(digest, set()) if counts else set()
        occurrence = next(number for number in itertools.count() if number not in taken)
        name = (*self._noise_name(request, attempt), digest.hex(), occurrence)
        sampling = self._sampling(request, attempt, room, grammar)
        samplings = [dataclasses.replace(sampling, noise_key=noise_key(*name, i)) for i in range(request.n)]
        indices = [self._store.next_call_index(attempt) if attempt else 0 for _ in range(request.n)]
        parent = None if prompt.parent is None else earlier[prompt.parent].index
        names = [f"{name}:{i}" for i in range(request.n)]
        # A stop string or id may end a call in its middle, and then it is text; so it is where max_tokens does, but for
        # a stream, which like the commercial endpoints' ends in an unfinished call.
        certain = _has_strict_calls(request) and not request.stop and not request.stop_ids
        prepared = Prepared(messages, prompt.ids, parent, samplings, indices, names, self._role, certain)
        taken.add(occurrence)

        def forget() -> None:  # a refused call that is sent again is the same call
            taken.discard(occurrence)

        return Generation(
            request, prepared, attempt, policy=self.policy, store=self._store, family=self._family, on_nothing=forget
        )

    def prompt_ids(self, request: GenerateRequest, attempt: Attempt | None) -> list[int]:
        """The tokens of the request's prompt, which fits into the context by itself. Raises ApiError."""
        ids = self._prompt(request, self._earlier(attempt))[1].ids
        self._room(request, ids, at_least=0)
        return ids

    def count_tokens(self, request: GenerateRequest, attempt: Attempt | None) -> int:
        """How many tokens the request's prompt has, be it too long. Raises ApiError."""
        return len(self._prompt(request, self._earlier(attempt))[1].ids)

    # ---- the prompt and the sampling parameters ----

    def _earlier(self, attempt: Attempt | None) -> list[CallRecord]:
        """The attempt's calls that a prompt may extend: other models' ids are another tokenizer's."""
        return [call for call in attempt.calls if call.model == self.policy.name] if attempt else []

    def _room(self, request: GenerateRequest, ids: list[int], *, at_least: int) -> int:
        """How many tokens fit behind a prompt's. Raises ApiError where they are too few."""
        most = self.policy.max_seq_len
        if most - len(ids) < at_least:
            # In the words of the commercial endpoints, by which agent frameworks tell this error from others.
            text = f"prompt is too long: {len(ids)} tokens, and this model's maximum context length is {most}"
            raise ApiError(text, kind="context_length", param="messages" if request.prompt is None else "prompt")
        return most - len(ids)

    def _prompt(self, request: GenerateRequest, earlier: list[CallRecord]) -> tuple[list[dict], chat.Prompt]:
        tokenizer, vocab = self.policy.tokenizer, self.policy.config.vocab_size
        try:
            if request.prompt is not None:
                if not isinstance(request.prompt, str) and not all(0 <= i < vocab for i in request.prompt):
                    raise ValueError(f"a token id of the prompt is outside the vocabulary of {vocab}")
                return [], plain.build_plain_prompt(tokenizer, request.prompt, earlier)
            messages = chat.canonical_messages(request.messages)
            if request.continue_final:
                return messages, chat.build_continuation(tokenizer, messages, request.tools, earlier)
            return messages, chat.build_prompt(tokenizer, messages, request.tools, earlier)
        except InvalidConfigError as error:  # the tokenizer has no chat template
            raise ApiError(str(error)) from None
        except ValueError as error:  # images, a role out of place, messages that the template refuses
            raise ApiError(str(error), param="messages" if request.prompt is None else "prompt") from None

    async def _grammar(self, request: GenerateRequest) -> Grammar | None:
        """What the reply must look like, if that is asked for; compiled in a thread, because it can take a second."""
        tools = request.tools if request.tool_choice != "none" else None
        forced = request.tool_choice == "required"
        kind, value = request.form or (None, None)
        if tools and (forced or kind in _JSON_FORMS):  # calls, or else an answer of the form
            compile = functools.partial(self._tool_call, request, None if forced else kind, value)
        elif kind is not None:
            compile = functools.partial(self._form, kind, value)
        elif _has_strict_calls(request):
            compile = functools.partial(self._tool_call, request, None, None)
        else:
            return None
        try:
            return await run_in_threadpool(compile)
        except (ValueError, TypeError, RecursionError) as error:  # the last two of what is no schema at all
            raise ApiError(str(error)) from None

    def _form(self, kind: str, value: Any) -> Grammar:
        if kind in _JSON_FORMS:
            return self._guide.json_schema(self._schema(kind, value))
        return {"regex": self._guide.regex, "choice": self._guide.choice, "grammar": self._guide.ebnf}[kind](value)

    def _tool_call(self, request: GenerateRequest, kind: str | None, value: Any) -> Grammar:
        return self._guide.tool_call(
            request.tools,
            self._family,
            required=request.tool_choice == "required",
            parallel=request.parallel_tool_calls,
            name=request.tool_name,
            answer=None if kind is None else self._schema(kind, value),
        )

    def _schema(self, kind: str, value: Any) -> dict | str:
        """The schema that can be enforced for one of `_JSON_FORMS`."""
        if kind == "json_object":
            return {"type": "object"}
        if kind == "json_schema_if_possible":
            try:
                self._guide.json_schema(value)
            except ValueError:
                return {"type": "object"}
        return value

    def _sampling(
        self, request: GenerateRequest, attempt: Attempt | None, room: int, grammar: Grammar | None
    ) -> SamplingParams:
        ours = self._config
        asked = {name: getattr(request, name) for name in _SHAPING if getattr(request, name) is not None}
        # An evaluation that samples a task once is greedy; one that was asked for several samples wants them to differ.
        held = {"temperature": 0.0 if attempt is not None and attempt.entry.greedy else 1.0}
        max_tokens = request.max_tokens or ours.max_tokens
        if attempt is not None and attempt.mode == "train":
            held = {"temperature": ours.temperature, "top_p": ours.top_p, "top_k": ours.top_k}
            if not ours.honor_agent_sampling:
                self._log_override(attempt, asked, held)
                asked = {}
                max_tokens = min(max_tokens, ours.max_tokens)
        shaping = _SHAPING | held | asked
        top_k = min(max(shaping["top_k"], 0), self.policy.config.vocab_size)
        try:
            return SamplingParams(
                **shaping | {"top_k": top_k, "logit_bias": tuple(shaping["logit_bias"].items())},
                max_tokens=min(max_tokens, room),
                stop_ids=request.stop_ids,
                ignore_eos=request.ignore_eos,
                top_logprobs=request.top_logprobs,
                grammar=grammar,
            )
        except ValueError as error:
            raise ApiError(str(error)) from None

    def _log_override(self, attempt: Attempt, asked: dict, held: dict) -> None:
        held = _SHAPING | held
        ignored = [f"{name}={value} (used: {held[name]})" for name, value in asked.items() if value != held[name]]
        if ignored and attempt.job_id not in self._override_logged:
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
        seed = request.seed if _has_own_seed(request, attempt) else attempt.seed
        entry = attempt.entry
        return (attempt.mode, seed, attempt.step, entry.task_index, entry.sample)


def _has_own_seed(request: GenerateRequest, attempt: Attempt) -> bool:
    """Whether the agent's seed holds: then the same prompt is the same sample, however often it is asked for."""
    return attempt.mode != "train" and request.seed is not None


def _has_strict_calls(request: GenerateRequest) -> bool:
    """Whether a grammar holds all tool calls of the reply to their form, and the text before them to nothing."""
    if not request.tools or request.tool_choice == "none":
        return False
    if request.tool_choice == "required":
        return True
    strict = any(tool["function"].get("strict") for tool in request.tools)
    return request.form is None and (strict or not request.parallel_tool_calls)
