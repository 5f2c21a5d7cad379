"""OpenAI completions <-> generate's types: a text, or token ids, written on."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import pydantic
from fastapi import Request, Response

from lightning_jax.server import openai_shared, wire
from lightning_jax.server.contract import ApiError, Choice, Delta, GenerateReply, GenerateRequest
from lightning_jax.server.generation import Generation
from lightning_jax.server.roles import Generators
from lightning_jax.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # the API's own
_MAX_SAMPLES = 1024  # prompts x n of one request
_UNSUPPORTED = openai_shared.UNSUPPORTED | {"suffix": ("",), "prompt_embeds": ()}


class CompletionRequest(openai_shared.SamplingBody):
    """The request body as far as it is used; other fields are refused (`_UNSUPPORTED`) or mean nothing here."""

    prompt: str | list[str] | list[int] | list[list[int]] = pydantic.Field(min_length=1)
    echo: bool | None = None
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
        for prompt in writer.prompts:
            generations.append(await generator.start(_request(body, prompt), attempt))
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
    if body.echo and body.logprobs is not None:
        raise ApiError("echo with logprobs is not supported: a prompt's log-probs are not computed", param="logprobs")
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

    def response(self, replies: Sequence[GenerateReply]) -> dict:
        choices = []
        for prompt, reply in zip(self.prompts, replies, strict=True):
            for choice in reply.choices:
                text = self._echo(prompt) + choice.content
                written = self._choice(len(choices), text, choice, choice.finish_reason, 0)
                if self._body.return_token_ids:
                    written["prompt_token_ids"] = reply.prompt_ids
                choices.append(written)
        counts = [sum(len(reply.prompt_ids) for reply in replies), sum(reply.completion_tokens for reply in replies)]
        usage = openai_shared.usage(*counts, sum(reply.cached_tokens for reply in replies))
        return self._envelope | {"choices": choices, "usage": usage}

    async def events(self, generations: Sequence[Generation], request: Request) -> AsyncGenerator[bytes, None]:
        """The chunks of a stream. Every prompt is sampled at once, and told in order."""
        options = self._body.stream_options or openai_shared.StreamOptions()
        samples = self._body.n or 1

        def usage() -> dict:
            counts = [(len(g.prompt_ids), g.completion_tokens, g.cached_tokens) for g in generations]
            return openai_shared.usage(*map(sum, zip(*counts, strict=True)))

        def chunk(choice: dict) -> bytes:
            content = self._envelope | {"choices": [choice]}
            if options.include_usage:
                content["usage"] = usage() if options.continuous_usage_stats else None
            return wire.event(content)

        for position, (prompt, generation) in enumerate(zip(self.prompts, generations, strict=True)):
            echoes = [self._echo(prompt)] * samples
            lengths = [0] * samples
            async for delta in generation.events(request.receive):
                if delta is None:
                    yield wire.COMMENT
                    continue
                reason = delta.choice.finish_reason if delta.choice is not None else None
                if not (echoes[delta.index] or delta.content or delta.token_ids or reason):
                    continue
                text = echoes[delta.index] + delta.content
                choice = self._choice(position * samples + delta.index, text, delta, reason, lengths[delta.index])
                if self._body.return_token_ids and not lengths[delta.index]:
                    choice["prompt_token_ids"] = generation.prompt_ids
                echoes[delta.index] = ""
                lengths[delta.index] += len(text)
                yield chunk(choice)
        if options.include_usage:
            yield wire.event(self._envelope | {"choices": [], "usage": usage()})
        yield openai_shared.DONE

    def _echo(self, prompt: str | list[int]) -> str:
        if not self._body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _choice(self, index: int, text: str, sampled: Choice | Delta, reason: str | None, offset: int) -> dict:
        logprobs = self._logprobs(sampled, offset) if self._body.logprobs is not None else None
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if self._body.return_token_ids:
            choice["token_ids"] = sampled.token_ids
        return choice

    def _logprobs(self, sampled: Choice | Delta, offset: int) -> dict:
        tokens, offsets, tops = [], [], []
        entries = openai_shared.token_logprobs(sampled, self._tokenizer)
        for entry in entries:
            tokens.append(_spelling(entry))
            offsets.append(offset)
            offset += len(entry["token"])
            tops.append({_spelling(likely): likely["logprob"] for likely in [*entry["top_logprobs"], entry]})
        logprobs = [entry["logprob"] for entry in entries]
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _spelling(entry: dict) -> str:
    """A token's text, or its bytes where they are part of a character, so that no two tokens are spelt alike."""
    raw = bytes(entry["bytes"])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
