"""OpenAI completions <-> generate's types: a text, or token ids, written on."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Annotated

import pydantic
from fastapi import Request, Response

from lightning_jax.policy import Policy
from lightning_jax.server import openai_shared, wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateReply, GenerateRequest
from lightning_jax.server.generation import Generation, refusals
from lightning_jax.server.roles import Generators
from lightning_jax.text.tokenizer import StreamDecoder, Tokenizer

_DEFAULT_MAX_TOKENS = 16  # the API's own
_MAX_SAMPLES = 1024  # prompts x n of one request
_SOME = pydantic.Field(min_length=1)
_UNSUPPORTED = openai_shared.UNSUPPORTED | {"suffix": ("",), "prompt_embeds": ()}


class CompletionRequest(openai_shared.SamplingBody):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    prompt: str | Annotated[list[str], _SOME] | Annotated[list[int], _SOME] | Annotated[list[list[int]], _SOME]
    echo: bool | None = None
    max_tokens: int | None = pydantic.Field(None, ge=0)  # 0 with echo: the prompt alone, and its log-probs
    logprobs: int | None = pydantic.Field(None, ge=0, le=20)


async def completions(request: Request) -> Response:
    """POST .../completions"""
    generators: Generators = request.app.state.generators
    attempt = generators.attempt(request.path_params.get("token"))
    body = wire.parse(CompletionRequest, await wire.body_of(request))
    wire.refuse(body, _UNSUPPORTED)
    generator = generators.choose(request.path_params, body.model)
    writer = _Writer(body, generator.policy.tokenizer, body.model or generator.policy.name)
    generations: list[Generation] = []
    try:
        if body.max_tokens != 0:
            with refusals():  # all or none, as of the samples of one prompt
                generator.policy.check_room(len(writer.prompts) * (body.n or 1))
        for prompt in writer.prompts:
            asked = _request(body, prompt)
            if body.max_tokens == 0:
                writer.add_echo(generator.prompt_ids(asked, attempt))
            else:
                generations.append(await generator.start(asked, attempt))
                writer.add_echo(generations[-1].prompt_ids)
        await writer.score(generator.policy)
        if body.max_tokens == 0:
            return writer.without_samples()
        if body.stream:
            return wire.EventStream(generations, writer.events(generations, request), openai_shared.error_event)
        replies = [generation.reply(request.receive) for generation in generations]
        results = await asyncio.gather(*replies, return_exceptions=True)
        if failed := [result for result in results if isinstance(result, BaseException)]:
            raise failed[0]
    except BaseException:
        for generation in generations:
            generation.close()
        raise
    return wire.json_response(writer.response(results))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    if len(prompts) * (body.n or 1) > _MAX_SAMPLES:
        raise ApiError(f"prompt: {_MAX_SAMPLES} samples may be asked for at once", param="prompt")
    return prompts


def _request(body: CompletionRequest, prompt: str | list[int]) -> GenerateRequest:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens: 0 is for echo alone", param="max_tokens")
    return GenerateRequest(
        dialect="openai_completions",
        prompt=prompt,
        form=openai_shared.form_of(body),
        max_tokens=body.max_tokens or _DEFAULT_MAX_TOKENS,
        top_logprobs=body.logprobs or 0,
        **openai_shared.sampling_of(body),
    )


class _Writer:
    """A request's samples as the wire has them: those of the first prompt, those of the second, and so on."""

    def __init__(self, body: CompletionRequest, tokenizer: Tokenizer, model: str):
        self._body, self._tokenizer, self.prompts = body, tokenizer, _prompts(body)
        self._envelope = openai_shared.envelope("cmpl", "text_completion", model)
        self._echoes: list[_Echo] = []

    def add_echo(self, prompt_ids: Sequence[int]) -> None:
        """Prepares what is said of the next prompt."""
        prompt = self.prompts[len(self._echoes)]
        text = ""
        if self._body.echo:
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        self._echoes.append(_Echo(prompt_ids, text, continues=bool(prompt)))

    async def score(self, policy: Policy) -> None:
        """Gives the echoed prompts their log-probs, if these are asked for."""
        if not self._body.echo or self._body.logprobs is None:
            return
        for echo in self._echoes:
            scores = await asyncio.wrap_future(policy.score(echo.prompt_ids))
            tops = [
                list(zip(ids.tolist(), logprobs.tolist(), strict=True))[: self._body.logprobs]
                for ids, logprobs in zip(scores.top_ids, scores.top_logprobs, strict=True)
            ]
            first, *others = echo.prompt_ids
            logprobs = scores.logprobs.tolist()
            sampled = Delta(0, "", [], [first, *others], [0.0, *logprobs], len(logprobs) + 1, None, [[], *tops])
            # A beginning of the tokenizer's own is a token of the prompt, and no part of its text.
            unseen = first == self._tokenizer.bos_id and not echo.text.startswith(self._tokenizer.decode([first]))
            echo.logprobs = self._logprobs(sampled, _Offsets(StreamDecoder(self._tokenizer), unseen=unseen))
            echo.logprobs["token_logprobs"][0] = echo.logprobs["top_logprobs"][0] = None  # nothing comes before it

    def without_samples(self) -> Response:
        """The reply to a request for no new token."""
        nothing = Choice("", [], [], [], 0, "length", None)
        choices = []
        for echo in self._echoes:
            for _ in range(self._body.n or 1):
                choices.append(self._choice(len(choices), echo, "", nothing, "length", self._offsets(echo)))
        usage = openai_shared.usage(sum(len(echo.prompt_ids) for echo in self._echoes), 0, 0)
        if not self._body.stream:
            return wire.json_response(self._envelope | {"choices": choices, "usage": usage})
        events = [*(self._chunk(choice, lambda: usage) for choice in choices), self._end(usage)]
        return Response(b"".join(events), media_type="text/event-stream")

    def response(self, replies: Sequence[GenerateReply]) -> dict:
        choices = []
        for echo, reply in zip(self._echoes, replies, strict=True):
            for choice in reply.choices:
                offsets = self._offsets(echo)
                choices.append(self._choice(len(choices), echo, choice.content, choice, choice.finish_reason, offsets))
        counts = [sum(len(reply.prompt_ids) for reply in replies), sum(reply.completion_tokens for reply in replies)]
        usage = openai_shared.usage(*counts, sum(reply.cached_tokens for reply in replies))
        return self._envelope | {"choices": choices, "usage": usage}

    async def events(self, generations: Sequence[Generation], request: Request) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream. Every prompt is sampled at once, and told in order."""
        samples = self._body.n or 1

        def usage() -> dict:
            counts = [(len(g.prompt_ids), g.completion_tokens, g.cached_tokens) for g in generations]
            return openai_shared.usage(*map(sum, zip(*counts, strict=True)))

        for position, (echo, generation) in enumerate(zip(self._echoes, generations, strict=True)):
            begun, offsets = [False] * samples, [self._offsets(echo) for _ in range(samples)]
            async for delta in generation.events(request.receive):
                if delta is None:
                    yield wire.COMMENT
                    continue
                i, reason = delta.index, delta.choice.finish_reason if delta.choice is not None else None
                if not (delta.content or delta.token_ids or reason):
                    continue
                opening = None if begun[i] else echo
                choice = self._choice(position * samples + i, opening, delta.content, delta, reason, offsets[i])
                begun[i] = True
                yield self._chunk(choice, usage)
        yield self._end(usage())

    @property
    def _options(self) -> openai_shared.StreamOptions:
        return self._body.stream_options or openai_shared.StreamOptions()

    def _chunk(self, choice: dict, usage: Callable[[], dict]) -> bytes:
        """What is new of a sample, in a stream; `usage` tells what was used so far."""
        content = self._envelope | {"choices": [choice]}
        if self._options.include_usage:
            content["usage"] = usage() if self._options.continuous_usage_stats else None
        return wire.event(content)

    def _end(self, usage: dict) -> bytes:
        """A stream's last events."""
        total = wire.event(self._envelope | {"choices": [], "usage": usage}) if self._options.include_usage else b""
        return total + openai_shared.DONE

    def _choice(
        self,
        index: int,
        echo: "_Echo | None",
        text: str,
        sampled: Choice | Delta,
        reason: str | None,
        offsets: "_Offsets",
    ) -> dict:
        """A sample, or what is new of it; `echo` where it begins."""
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs(sampled, offsets)
            if echo is not None and echo.logprobs is not None:
                logprobs = {name: echo.logprobs[name] + logprobs[name] for name in logprobs}
        text = text if echo is None else echo.text + text
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if self._body.return_token_ids:
            choice["token_ids"] = sampled.token_ids
            if echo is not None:
                choice["prompt_token_ids"] = echo.prompt_ids
        return choice

    def _offsets(self, echo: "_Echo") -> "_Offsets":
        """Of a sample of this prompt."""
        return _Offsets(StreamDecoder(self._tokenizer, skip_special=True, continues=echo.continues), len(echo.text))

    def _logprobs(self, sampled: Choice | Delta, offsets: "_Offsets") -> dict:
        tokens, starts, tops = [], [], []
        entries = openai_shared.token_logprobs(sampled, self._tokenizer)
        for entry, token_id in zip(entries, sampled.token_ids, strict=False):  # without the end of the turn
            tokens.append(_spelling(entry))
            starts.append(offsets.next(token_id))
            tops.append({_spelling(likely): likely["logprob"] for likely in [*entry["top_logprobs"], entry]})
        logprobs = [entry["logprob"] for entry in entries]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": starts}


@dataclasses.dataclass
class _Echo:
    """A prompt: its ids, what a reply repeats of its text, and the log-probs of that if they are asked for.

    `continues`: its samples go on from a text, see `Tokenizer.decode`.
    """

    prompt_ids: Sequence[int]
    text: str
    continues: bool
    logprobs: dict | None = None


@dataclasses.dataclass
class _Offsets:
    """Where in the text each token begins, one after the other.

    Attributes:
        decoder: tells how much text comes of each.
        length: of the text so far.
        unseen: the next token is no part of the text.
    """

    decoder: StreamDecoder
    length: int = 0
    unseen: bool = False

    def next(self, token_id: int) -> int:
        start = self.length
        if not self.unseen:
            self.length += len(self.decoder.push([token_id]))
        self.unseen = False
        return start


def _spelling(entry: dict) -> str:
    """A token's text, or its bytes where they are part of a character, so that no two tokens are spelt alike."""
    raw = bytes(entry["bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
